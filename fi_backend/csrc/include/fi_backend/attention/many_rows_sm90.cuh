// Attention of requests with many query rows, on the asynchronous tensor cores of sm_90a.
//
// A CTA per SM walks the units of its workers of the plan. See many_rows_sm90_shape.cuh for who
// does what, many_rows_sm90_loads.cuh for the warpgroup that loads, many_rows_sm90_widen.cuh
// for the one that widens fp8, and many_rows_sm90_compute.cuh for those that compute.
#pragma once

#include <fi_backend/attention/many_rows_sm90_compute.cuh>
#include <fi_backend/attention/many_rows_sm90_loads.cuh>
#include <fi_backend/attention/many_rows_sm90_widen.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/load_global.cuh>
#include <fi_backend/ptx/setmaxnreg.cuh>

namespace fi {

template <class Traits>
__device__ __forceinline__ void init_barriers(const ManyRowsSm90Params& params,
                                              Sm90Memory<Traits>& memory) {
  constexpr int kComputeWarps = Traits::kComputeThreads / kWarpSize;
  const auto init = [](uint64_t* barriers, int size, int count) {
    for (int i = 0; i < size; ++i) ptx::mbarrier_init(ptx::shared_address(barriers + i), count);
  };
  const int tile_arrivals = Sm90Loader<Traits>::tile_arrivals(params);
  init(&memory.unit_wanted, 1, 1);
  init(memory.unit_found, Traits::kUnits, 1);
  init(memory.unit_full, Traits::kUnits, Sm90Loader<Traits>::unit_arrivals(params));
  init(memory.unit_empty, Traits::kUnits, Traits::kThreads / kWarpSize);
  init(memory.loaded_k().full, Traits::kLoadedStages, tile_arrivals);
  init(memory.loaded_v().full, Traits::kLoadedStages, tile_arrivals);
  init(memory.k_empty, Traits::kStages, kComputeWarps);
  init(memory.v_empty, Traits::kStages, kComputeWarps);
  if constexpr (Traits::kIsFp8Cache) {
    constexpr int kWideningWarps = kGroupThreads / kWarpSize;
    init(memory.k_full, Traits::kStages, kWideningWarps);
    init(memory.v_full, Traits::kStages, kWideningWarps);
    init(memory.narrow_empty[0], 2 * Traits::kLoadedStages, kWideningWarps);
  }
  ptx::mbarrier_init_fence();
}

// Read what the search for units begins with, and bring what it reads next into L2, all at once:
// that it takes one after the other would cost a cold start a microsecond each. The warpgroup that
// loads calls this.
template <class Traits>
__device__ __forceinline__ void load_plan(const ManyRowsSm90Params& params,
                                          Sm90Memory<Traits>& memory, int32_t first_worker,
                                          uint32_t num_dealt) {
  const AttentionParams& p = params.attention;
  const PlanView plan = view_plan(p.plan, params.num_reqs, params.num_workers);
  const int thread = threadIdx.x % kGroupThreads;
  const auto touch = [&](const auto* array) {
    constexpr int kCount = 128 / sizeof(*array);  // of a cache line
    if (thread * kCount < params.num_reqs) ptx::prefetch_to_l2(array + thread * kCount);
  };
  touch(plan.prefix_cost[kManyRows]);
  touch(p.qo_indptr);
  touch(p.kv_lens);
  if (thread < kPlanHeaderInts) memory.plan_header[thread] = p.plan[thread];
  if (thread == kWarpSize) Sm90Units<Traits>(params, memory).start(plan, first_worker, num_dealt);
}

#if FI_HAS_WGMMA
template <class Traits>
inline constexpr int kSm90LaunchBound = Traits::kThreads;

// The work of a thread block, if there is any in the plan; see ManyRowsWalk::begin(). All
// Traits::kThreads threads call this, with the registers that the launch bound leaves them.
template <class Traits>
__device__ __forceinline__ void run_many_rows(const ManyRowsSm90Params& params,
                                              Sm90Memory<Traits>& memory, int32_t first_worker,
                                              uint32_t num_dealt) {
  if (threadIdx.x / kGroupThreads == Traits::kGroups) {
    load_plan<Traits>(params, memory, first_worker, num_dealt);
  } else if (threadIdx.x == 0) {
    init_barriers<Traits>(params, memory);
  } else if (threadIdx.x == kGroupThreads && params.has_maps()) {
    ptx::prefetch_tensor_map(params.k.map);
    ptx::prefetch_tensor_map(params.v.map);
  }
  __syncthreads();
  // Most steps of an engine have but few-row work.
  if (memory.plan_header[kHasWorkInt + kManyRows] == kNoWork) return;
  // The same in all lanes, which the compiler cannot see by itself.
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  if constexpr (Traits::kIsFp8Cache) {
    if (group > Traits::kGroups) {
      ptx::release_registers<Traits::kLoadRegisters>();
      Sm90Widener<Traits>(memory).run();
      return;
    }
  }
  if (group == Traits::kGroups) {
    ptx::release_registers<Traits::kLoadRegisters>();
    Sm90Loader<Traits>(params, memory).run();
  } else {
    ptx::take_registers<Traits::kComputeRegisters>();
    Sm90Computer<Traits>(params, memory, group).run();
  }
}
#else
// What is compiled for other architectures does nothing: the launcher tells it by this bound.
template <class Traits>
inline constexpr int kSm90LaunchBound = kWarpSize;
#endif

// Grid: at most a CTA per SM. Dynamic shared memory: sizeof(Sm90Memory<Traits>) and its alignment.
template <class Traits>
__global__ void __launch_bounds__(kSm90LaunchBound<Traits>, 1)
    many_rows_sm90_kernel(const __grid_constant__ ManyRowsSm90Params params) {
  ptx::grid_dependency_wait();
#if FI_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t sm90_shared_memory[];
  auto& memory = *reinterpret_cast<Sm90Memory<Traits>*>(sm90_shared_memory);
  run_many_rows<Traits>(params, memory, blockIdx.x, gridDim.x);
#endif
  // Dependents start as blocks end: there is no place where all threads are done with the
  // workspace.
}

}  // namespace fi
