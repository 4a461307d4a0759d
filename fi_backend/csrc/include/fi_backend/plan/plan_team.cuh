// The threads that plan a line together: a block.
#pragma once

#include <fi_backend/common/reduce.cuh>

namespace fi {

struct WholeBlock {
  __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t num_threads() const { return blockDim.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

}  // namespace fi
