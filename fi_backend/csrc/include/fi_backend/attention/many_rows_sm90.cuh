// Attention of requests with many query rows, on the asynchronous tensor cores of sm_90a.
//
// A CTA per SM walks the units of its workers of the plan. See many_rows_sm90_shape.cuh for who
// does what, many_rows_sm90_loads.cuh for the warpgroup that loads and many_rows_sm90_compute.cuh
// for those that compute.
#pragma once

#include <fi_backend/attention/many_rows_sm90_compute.cuh>
#include <fi_backend/attention/many_rows_sm90_loads.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/setmaxnreg.cuh>

namespace fi {

template <class Traits>
__device__ __forceinline__ void init_barriers(const ManyRowsSm90Params& params,
                                              Sm90Memory<Traits>& memory) {
  constexpr int kComputeWarps = kComputeThreads / kWarpSize;
  const auto init = [](uint64_t* barriers, int size, int count) {
    for (int i = 0; i < size; ++i) ptx::mbarrier_init(ptx::shared_address(barriers + i), count);
  };
  const int tile_arrivals = Sm90Loader<Traits>::tile_arrivals(params);
  init(&memory.unit_wanted, 1, 1);
  init(memory.unit_found, Traits::kUnits, 1);
  init(memory.unit_full, Traits::kUnits, kGroupThreads);
  init(memory.unit_empty, Traits::kUnits, kComputeWarps + kGroupThreads / kWarpSize);
  init(memory.k_full, Traits::kStages, tile_arrivals);
  init(memory.v_full, Traits::kStages, tile_arrivals);
  init(memory.k_empty, Traits::kStages, kComputeWarps);
  init(memory.v_empty, Traits::kStages, kComputeWarps);
  ptx::mbarrier_init_fence();
}

#if FI_HAS_WGMMA
inline constexpr int kSm90LaunchBound = kSm90Threads;
#else
// What is compiled for other architectures does nothing: the launcher tells it by this bound.
inline constexpr int kSm90LaunchBound = kWarpSize;
#endif

// Grid: at most a CTA per SM. Dynamic shared memory: sizeof(Sm90Memory<Traits>) and its alignment.
template <class Traits>
__global__ void __launch_bounds__(kSm90LaunchBound, 1)
    many_rows_sm90_kernel(const __grid_constant__ ManyRowsSm90Params params) {
  ptx::grid_dependency_wait();
#if FI_HAS_WGMMA
  // Most steps of an engine have but few-row work.
  if (params.attention.plan[kHasWorkInt + kManyRows] == 0) return;
  extern __shared__ __align__(1024) uint8_t sm90_shared_memory[];
  auto& memory = *reinterpret_cast<Sm90Memory<Traits>*>(sm90_shared_memory);
  if (threadIdx.x == 0) init_barriers<Traits>(params, memory);
  __syncthreads();
  // The same in all lanes, which the compiler cannot see by itself.
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  if (group == kNumGroups) {
    ptx::release_registers<Traits::kLoadRegisters>();
    Sm90Loader<Traits>(params, memory).run();
  } else {
    ptx::take_registers<Traits::kComputeRegisters>();
    Sm90Computer<Traits>(params, memory, group).run();
  }
#endif
  // Dependents start as blocks end: there is no place where all threads are done with the
  // workspace.
}

}  // namespace fi
