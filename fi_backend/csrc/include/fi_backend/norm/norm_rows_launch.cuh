// Host code that the launchers of all normalisations share.
#pragma once

#include <fi_backend/common/launch.cuh>
#include <fi_backend/norm/norm_rows.cuh>

namespace fi {

// Threads enough for a row of `num_vecs` accesses, kNormVecsPerThread each: whole warps, or a power
// of two of lanes, several rows a block then.
inline dim3 make_row_block(int num_vecs) {
  constexpr unsigned kMinThreads = 128;
  const unsigned threads = (num_vecs + kNormVecsPerThread - 1) / kNormVecsPerThread;
  if (threads > kWarpSize) return dim3((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  unsigned lanes = 1;
  while (lanes < threads) lanes *= 2;
  return dim3(lanes, kMinThreads / lanes);
}

// The block of a kernel that loops over a row of `num_vecs` accesses.
inline dim3 make_long_row_block(int num_vecs) {
  constexpr int kMaxWarps = kNormMaxThreads / kWarpSize;
  const int warps = (num_vecs + kWarpSize - 1) / kWarpSize;
  return dim3((warps < kMaxWarps ? warps : kMaxWarps) * kWarpSize);
}

// Whether the registers of one block hold a row of `num_vecs` accesses.
inline bool fits_registers(int num_vecs) {
  return num_vecs <= kNormVecsPerThread * kNormMaxThreads;
}

// Launch what holds a row of `num_vecs` accesses in registers, or what loops over it.
// `in_registers` is nullptr where rows are not made of vectors; its threads get so much dynamic
// shared memory each.
template <class Params>
cudaError_t launch_norm_rows(void (*in_registers)(Params), void (*looping)(Params), int num_vecs,
                             const Params& p, cudaStream_t stream,
                             int shared_bytes_per_thread = 0) {
  const int64_t num_rows = p.num_outer * p.num_inner;
  if (in_registers != nullptr && fits_registers(num_vecs)) {
    const dim3 block = make_row_block(num_vecs);
    const int64_t num_blocks = (num_rows + block.y - 1) / block.y;
    const int shared_bytes = int(block.x * block.y) * shared_bytes_per_thread;
    return launch(in_registers, num_blocks, block, shared_bytes, stream, p.enable_pdl, p);
  }
  return launch(looping, num_rows, make_long_row_block(num_vecs), stream, p.enable_pdl, p);
}

// Whether rows of several inner positions are as far apart as if they were one dimension.
inline bool is_flat(const RowStrides& strides, int64_t num_inner) {
  return strides.outer == strides.inner * num_inner;
}

}  // namespace fi
