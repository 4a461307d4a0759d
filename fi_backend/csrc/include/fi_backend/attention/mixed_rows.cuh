// Both lines of a step in one kernel for sm_90a: requests with few query rows keep memory busy
// while those with many keep the tensor cores busy.
//
// A CTA fills an SM. As many as the plan says (plan/shared_sms.h) begin with the few-row line, the
// others with the many-row line; who is done with few rows goes on with what is left of the other
// line. Both use the same shared memory, one after the other.
#pragma once

#include <fi_backend/attention/few_rows.cuh>
#include <fi_backend/attention/many_rows_sm90.cuh>

namespace fi {

// What the kernel records of itself: nothing, in modules that serve.
struct NoTrace {
  __device__ __forceinline__ static void begin(int /*line*/) {}
  __device__ __forceinline__ static void end(int /*line*/) {}
};

struct MixedRowsParams {
  ManyRowsSm90Params many;
  FewRowsParams few;  // with other partials than many has
};

// The few-row line reads K and V once and from memory, the other line many times and from L2. Not
// all SMs read from memory: each has more on its way.
template <class Traits>
struct StreamingFewRows : Traits {
  static constexpr bool kEvictsFirst = true;
  static constexpr int kMaxStages = kFewRowsMaxStages;
};

template <class Few, class Many>
constexpr int mixed_rows_bytes(int few_bytes) {
  constexpr int kManyBytes = int(sizeof(Sm90Memory<Many>));
  return few_bytes > kManyBytes ? few_bytes : kManyBytes;
}

// The stages that the few-row line may have beside nothing else on an SM.
template <class Few>
constexpr FewRowsShape mixed_few_rows_shape() {
  constexpr int kBytes = 227 * 1024;
  return few_rows_shape<Few>(kBytes, 0);
}

// The line that a block begins with. Neighbouring blocks get neighbouring SMs, which share their
// way to memory: were the first blocks those of one line, a step would take up to a fifth longer,
// or not, from one run to the next. So both lines are spread evenly over the grid.
struct BlockRole {
  bool begins_with_few;
  int few_before;  // blocks before this one that begin with few rows

  __device__ __forceinline__ BlockRole(int block, int num_blocks, int few_blocks)
      : few_before(block * few_blocks / num_blocks) {
    begins_with_few = (block + 1) * few_blocks / num_blocks > few_before;
  }
};

#if FI_HAS_WGMMA
// The few-row line's shared memory becomes the other line's, whose tiles the copy engine writes.
template <class Few>
__device__ __forceinline__ void leave_few_rows(const FewRowsParams& p, uint8_t* shared_memory) {
  ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    auto& shared = *reinterpret_cast<FewRowsShared<Few>*>(shared_memory);
    const auto invalidate = [](const SlotBarriers* slots, int count) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        ptx::mbarrier_invalidate(ptx::shared_address(&slots[i].full));
        ptx::mbarrier_invalidate(ptx::shared_address(&slots[i].empty));
      }
    };
    invalidate(shared.stage_barriers[kKeys], p.ring_slots[kKeys]);
    invalidate(shared.stage_barriers[kValues], p.ring_slots[kValues]);
    invalidate(shared.unit_barriers, Few::kUnitSlots);
  }
  __syncthreads();
}
#endif

// Grid: at most a CTA per SM. Trace: NoTrace, or BlockTracer (mixed_rows_trace.cuh).
template <class Few, class Many, class Trace>
__global__ void __launch_bounds__(kSm90LaunchBound<Many>, 1)
    mixed_rows_kernel(const __grid_constant__ MixedRowsParams params) {
  ptx::grid_dependency_wait();
#if FI_HAS_WGMMA
  static_assert(Few::kThreads <= Many::kThreads, "a block does either line");
  extern __shared__ __align__(1024) uint8_t mixed_shared_memory[];
  const int32_t* plan = params.many.attention.plan;
  // What is known here is asked for again later: few rows leave no register to keep it in.
  const auto few_blocks = [&] { return min(plan[kFewRowBlocksInt], int(fresh_num_blocks())); };
  const auto role = [&] { return BlockRole(fresh_block(), int(fresh_num_blocks()), few_blocks()); };
  if (role().begins_with_few) {
    Trace::begin(kFewRows);
    if (fresh_thread() < Few::kThreads) {
      run_few_rows<Few>(params.few, mixed_shared_memory, role().few_before, few_blocks());
    }
    Trace::end(kFewRows);
    if (plan[kHasWorkInt + kManyRows] == kNoWork) return;
    leave_few_rows<Few>(params.few, mixed_shared_memory);
  }
  // The line's first workers are the blocks that begin with it.
  const BlockRole at = role();
  const int others = int(fresh_num_blocks()) - few_blocks();
  const int worker = at.begins_with_few ? others + at.few_before : fresh_block() - at.few_before;
  Trace::begin(kManyRows);
  run_many_rows<Many>(params.many, *reinterpret_cast<Sm90Memory<Many>*>(mixed_shared_memory),
                      worker, others);
  Trace::end(kManyRows);
#endif
}

}  // namespace fi
