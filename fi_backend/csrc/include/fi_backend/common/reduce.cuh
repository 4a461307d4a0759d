// Sums over a group of threads. The order of additions depends on the group's size alone, so the
// same input gives the same bits in every launch.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over aligned groups of `size` lanes, a power of two up to a warp. All lanes must call it.
__device__ __forceinline__ float sum_over_lanes(float x, int size) {
  for (int offset = size / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Sum over `size` threads: aligned lanes of a warp as above, or a whole block of that many threads,
// a multiple of the warp up to kMaxThreads. All threads must call it, and once a kernel for each
// kUse, which has shared memory of its own.
template <int kMaxThreads, int kUse = 0>
__device__ __forceinline__ float sum_over_threads(float x, int size, int thread) {
  if (size <= kWarpSize) return sum_over_lanes(x, size);
  constexpr int kStep = 4;  // partial sums that one load reads
  alignas(16) __shared__ float partial[(kMaxThreads / kWarpSize + kStep - 1) / kStep * kStep];
  x = sum_over_lanes(x, kWarpSize);
  if (thread % kWarpSize == 0) partial[thread / kWarpSize] = x;
  __syncthreads();
  const int num_warps = size / kWarpSize;
  float sum = 0.f;
#pragma unroll 1
  for (int first = 0; first < num_warps; first += kStep) {
    const float4 part = *reinterpret_cast<const float4*>(&partial[first]);
    sum += part.x;
    sum += first + 1 < num_warps ? part.y : 0.f;
    sum += first + 2 < num_warps ? part.z : 0.f;
    sum += first + 3 < num_warps ? part.w : 0.f;
  }
  return sum;
}

}  // namespace fi
