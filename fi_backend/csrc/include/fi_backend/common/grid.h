// Grids of [outer, inner] blocks. Inner blocks of one outer index are neighbours; which one it is,
// a block knows without a division, whose latency would come before its first load.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

struct GridShape {
  unsigned x, y, z;
};

// Outer indices go over y and z, of which the device allows 65535 each. Up to z - 1 blocks lie past
// the last outer index: kernels have to check theirs. Both arguments are at least 1.
inline GridShape make_grid(int64_t outer, int64_t inner) {
  constexpr int64_t kMaxBlocks = 65535;
  const int64_t z = (outer + kMaxBlocks - 1) / kMaxBlocks;
  return {unsigned(inner), unsigned((outer + z - 1) / z), unsigned(z)};
}

#if defined(__CUDACC__)
__device__ __forceinline__ int64_t outer_block_index() {
  return int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
}
#endif

}  // namespace fi
