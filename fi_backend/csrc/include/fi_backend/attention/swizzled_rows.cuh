// Rows of 16-byte chunks in shared memory, laid out for ldmatrix.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kChunkBytes = 16;  // what one cp.async moves, and a row of ldmatrix

// Rows of kRowBytes, their chunks permuted so that 8 rows at one chunk index, which is what
// ldmatrix reads at a time, lie in 8 different groups of banks. The first row begins at a multiple
// of 128 bytes.
template <int kRowBytes_>
struct SwizzledRows {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  // Chunks are permuted within groups: as many as the row length leaves in each other's way.
  static constexpr int kGroup = kChunks % 8 == 0   ? 8
                                : kChunks % 4 == 0 ? 4
                                : kChunks % 2 == 0 ? 2
                                                   : 1;
  static constexpr int kGroupBytes = kGroup * kChunkBytes;

  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ permutation(row)) * kChunkBytes;
  }
  // From the address of a chunk to that of the same chunk `rows` later, where the sum of the two
  // row indices carries no bit.
  __device__ __forceinline__ static uint32_t skip_rows(uint32_t address, int rows) {
    return (address ^ (permutation(rows) * kChunkBytes)) + rows * kRowBytes;
  }
  // From the address of a chunk to that of the one `chunks` later, if the sum of the two indices
  // carries no bit: chunk 0 or 1 and an even distance, or chunk 0 to 3 and a multiple of 4.
  __device__ __forceinline__ static uint32_t skip(uint32_t address, int chunks) {
    const int bytes = chunks * kChunkBytes;
    return (address ^ (bytes % kGroupBytes)) + bytes / kGroupBytes * kGroupBytes;
  }

 private:
  __device__ __forceinline__ static constexpr int permutation(int row) {
    return row / (8 / kGroup) % kGroup;
  }
};

}  // namespace fi
