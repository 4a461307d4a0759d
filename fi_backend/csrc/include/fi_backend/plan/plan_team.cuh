// The threads that plan a line together: a block, or some of its warps while others plan another.
#pragma once

#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/named_barrier.cuh>

namespace fi {

struct WholeBlock {
  __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t num_threads() const { return blockDim.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// Warps that follow each other; `barrier` is theirs alone while they plan.
struct SomeWarps {
  int32_t first_thread;
  int32_t threads;
  int32_t barrier;

  __device__ __forceinline__ uint32_t thread() const { return threadIdx.x - first_thread; }
  __device__ __forceinline__ uint32_t num_threads() const { return threads; }
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(barrier, threads); }
};

}  // namespace fi
