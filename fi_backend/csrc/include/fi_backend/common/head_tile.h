// The block shape of kernels that stream [rows, heads, head_dim] data: x = accesses within a head,
// y = heads, z = rows. Any number of heads works: those that do not fit a block go to the next.
#pragma once

#include <fi_backend/common/grid.h>
#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kHeadTileThreads = 128;

// So many threads keep a GPU busy whatever each of them does: half of what 132 SMs hold at 64
// registers. Fewer finish sooner where there are more of them, each with fewer heads.
inline constexpr int64_t kManyThreads = 1 << 16;

struct HeadTile {
  GridShape grid;  // [row blocks, head blocks]
  int x, y, z;
};

// All arguments are at least 1.
inline HeadTile make_head_tile(int64_t num_rows, int num_heads, int accesses_per_head) {
  const int x = accesses_per_head < kHeadTileThreads ? accesses_per_head : kHeadTileThreads;
  // Spread the heads evenly over the blocks they need.
  const int heads_that_fit = kHeadTileThreads / x;
  const int blocks_per_row = (num_heads + heads_that_fit - 1) / heads_that_fit;
  const int y = (num_heads + blocks_per_row - 1) / blocks_per_row;
  const int rows_that_fit = kHeadTileThreads / (x * y);
  const int z = rows_that_fit < 64 ? rows_that_fit : 64;  // CUDA's limit on blockDim.z
  return {make_grid((num_rows + z - 1) / z, blocks_per_row), x, y, z};
}

#if defined(__CUDACC__)
struct RowHead {
  int64_t row;
  int head;
};

// The row and head of this thread; both may lie past the end.
__device__ __forceinline__ RowHead head_tile_position() {
  return {outer_block_index() * blockDim.z + threadIdx.z,
          int(blockIdx.x * blockDim.y + threadIdx.y)};
}
#endif

}  // namespace fi
