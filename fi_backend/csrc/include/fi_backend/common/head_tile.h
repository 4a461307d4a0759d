// The block shape of kernels that stream [rows, heads, head_dim] data: x = accesses within a head,
// y = heads, z = rows. Any number of heads works: those that do not fit a block go to the next.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kHeadTileThreads = 128;

struct HeadTile {
  int64_t num_blocks;
  int x, y, z;
};

// All arguments are at least 1.
FI_HOST_DEVICE HeadTile make_head_tile(int64_t num_rows, int num_heads, int accesses_per_head) {
  const int x = accesses_per_head < 32 ? accesses_per_head : 32;
  // Spread the heads evenly over the blocks they need.
  const int heads_that_fit = kHeadTileThreads / x;
  const int blocks_per_row = (num_heads + heads_that_fit - 1) / heads_that_fit;
  const int y = (num_heads + blocks_per_row - 1) / blocks_per_row;
  const int rows_that_fit = kHeadTileThreads / (x * y);
  const int z = rows_that_fit < 64 ? rows_that_fit : 64;  // CUDA's limit on blockDim.z
  return {(num_rows + z - 1) / z * blocks_per_row, x, y, z};
}

#if defined(__CUDACC__)
struct RowHead {
  int64_t row;
  int head;
};

// The row and head of this thread; both may lie past the end. Blocks of one row are neighbours.
__device__ __forceinline__ RowHead head_tile_position(int num_heads) {
  const unsigned blocks_per_row = (num_heads + blockDim.y - 1) / blockDim.y;
  const unsigned row_block = blockIdx.x / blocks_per_row;
  const unsigned head_block = blockIdx.x - row_block * blocks_per_row;
  return {int64_t(row_block) * blockDim.z + threadIdx.z,
          int(head_block * blockDim.y + threadIdx.y)};
}
#endif

}  // namespace fi
