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
// a multiple of the warp up to kMaxThreads. All threads must call it, and once a kernel.
template <int kMaxThreads>
__device__ __forceinline__ float sum_over_threads(float x, int size, int thread) {
  if (size <= kWarpSize) return sum_over_lanes(x, size);
  __shared__ float partial[kMaxThreads / kWarpSize];
  x = sum_over_lanes(x, kWarpSize);
  if (thread % kWarpSize == 0) partial[thread / kWarpSize] = x;
  __syncthreads();
  float sum = 0.f;
  for (int warp = 0; warp < size / kWarpSize; ++warp) sum += partial[warp];
  return sum;
}

}  // namespace fi
