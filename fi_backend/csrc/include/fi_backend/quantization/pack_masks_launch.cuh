// Choose the grid of packing masks, and launch it.
#pragma once

#include <fi_backend/quantization/pack_masks_launch.h>

#include <algorithm>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/quantization/pack_masks.cuh>

namespace fi {

// The grid follows from capacities alone: the host knows no length.
inline cudaError_t pack_masks(const PackMasksParams& p, cudaStream_t stream) {
  if (p.num_requests == 0) return cudaSuccess;
  constexpr int64_t kBlocks = 1024;  // enough loads in flight on any GPU
  const int64_t useful = p.bytes_per_request / kPackMasksThreads + 1;
  const int64_t parts = std::min(useful, kBlocks / p.num_requests + 1);
  const GridShape grid = {unsigned(p.num_requests), unsigned(parts), 1};
  return launch(pack_masks_kernel, grid, kPackMasksThreads, 0, stream, false, p);
}

}  // namespace fi
