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

// Sum over a block that is a whole number of warps, up to kMaxWarps. All threads must call it.
// Two scratch buffers used in turn need one barrier a call: a thread that is a call ahead writes
// the other buffer, and it cannot be two calls ahead.
template <int kMaxWarps>
struct BlockSum {
  float (&scratch)[2][kMaxWarps];  // in shared memory
  int turn = 0;

  __device__ __forceinline__ float operator()(float x, int thread, int num_warps) {
    x = sum_over_lanes(x, kWarpSize);
    float* partial = scratch[turn];
    turn ^= 1;
    if (thread % kWarpSize == 0) partial[thread / kWarpSize] = x;
    __syncthreads();
    float sum = 0.f;
    for (int warp = 0; warp < num_warps; ++warp) sum += partial[warp];
    return sum;
  }
};

}  // namespace fi
