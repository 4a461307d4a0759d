// Pack the masks of a step; see pack_masks_params.h.
#pragma once

#include <fi_backend/quantization/pack_masks.h>

#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kPackMasksThreads = 256;

// Count the booleans of the requests before this one. Every thread of the block calls it.
__device__ __forceinline__ int64_t count_masks_before(const PackMasksParams& p, int64_t request) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int64_t mine = 0;
  for (int64_t r = threadIdx.x; r < request; r += kPackMasksThreads) mine += count_masks(p, r);
  if (mine > 0) atomicAdd(&total, static_cast<unsigned long long>(mine));
  __syncthreads();
  return static_cast<int64_t>(total);
}

// Grid: [num_requests, parts]; the blocks of a request take its bytes in turn.
__global__ void __launch_bounds__(kPackMasksThreads)
    pack_masks_kernel(const __grid_constant__ PackMasksParams p) {
  ptx::grid_dependency_wait();
  const int64_t request = blockIdx.x;
  const int64_t begin = count_masks_before(p, request);
  const int64_t num_masks = count_masks(p, request);
  uint8_t* bits = p.bits + request * p.bytes_per_request;
  const int64_t num_bytes = count_mask_bytes(p, num_masks);
  const int64_t step = int64_t(gridDim.y) * kPackMasksThreads;
  for (int64_t i = int64_t(blockIdx.y) * kPackMasksThreads + threadIdx.x; i < num_bytes;
       i += step) {
    bits[i] = pack_mask_byte(p, begin, num_masks, i);
  }
}

}  // namespace fi
