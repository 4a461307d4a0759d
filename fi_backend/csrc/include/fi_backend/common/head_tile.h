// The block shape of kernels that stream [rows, heads, head_dim] data: x = accesses within a head,
// y = heads, z = rows. Heads and head dims beyond the block are looped over, so any count works.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kHeadTileThreads = 256;

struct HeadTile {
  int64_t num_blocks;
  int x, y, z;
};

// All arguments are at least 1.
FI_HOST_DEVICE HeadTile make_head_tile(int64_t num_rows, int num_heads, int accesses_per_head) {
  const int x = accesses_per_head < 32 ? accesses_per_head : 32;
  // Spread the heads evenly over the passes they need.
  const int heads_that_fit = kHeadTileThreads / x;
  const int passes = (num_heads + heads_that_fit - 1) / heads_that_fit;
  const int y = (num_heads + passes - 1) / passes;
  const int rows_that_fit = kHeadTileThreads / (x * y);
  const int z = rows_that_fit < 64 ? rows_that_fit : 64;  // CUDA's limit on blockDim.z
  return {(num_rows + z - 1) / z, x, y, z};
}

}  // namespace fi
