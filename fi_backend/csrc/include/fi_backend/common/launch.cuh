// Host side of kernel launches, compiled by nvcc.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/common/grid.h>
#include <fi_backend/common/head_tile.h>
#include <fi_backend/common/macros.h>

namespace fi {

// True if every architecture this file is compiled for has griddepcontrol. A kernel without it,
// launched as a dependent, would read before the kernel in front has written.
constexpr bool compiled_with_pdl() {
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  for (int arch : kArchs) {
    if (arch < 900) return false;
  }
  return true;
}

// Launch `kernel(args...)` on `stream`, with shared_bytes of dynamic shared memory. The result
// reports a refused launch, not a failing kernel.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), GridShape grid, dim3 block, int shared_bytes,
                   cudaStream_t stream, bool enable_pdl, const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = enable_pdl && compiled_with_pdl() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// A grid of one dimension.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t num_blocks, dim3 block, int shared_bytes,
                   cudaStream_t stream, bool enable_pdl, const Args&... args) {
  if (num_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const GridShape grid = {static_cast<unsigned>(num_blocks), 1, 1};
  return launch(kernel, grid, block, shared_bytes, stream, enable_pdl, args...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t num_blocks, dim3 block, cudaStream_t stream,
                   bool enable_pdl, const Args&... args) {
  return launch(kernel, num_blocks, block, 0, stream, enable_pdl, args...);
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), const HeadTile& tile, int shared_bytes,
                   cudaStream_t stream, bool enable_pdl, const Params& params) {
  const dim3 block(tile.x, tile.y, tile.z);
  return launch(kernel, tile.grid, block, shared_bytes, stream, enable_pdl, params);
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), const HeadTile& tile, cudaStream_t stream,
                   bool enable_pdl, const Params& params) {
  return launch(kernel, tile, 0, stream, enable_pdl, params);
}

// True if kVecSize elements of T at `base`, and at any sum of `strides` (in elements) from it, can
// move as one access.
template <class T, int kVecSize, class... Strides>
bool is_aligned(const void* base, Strides... strides) {
  const uint64_t address = reinterpret_cast<uintptr_t>(base);
  const uint64_t offsets = (uint64_t(0) | ... | uint64_t(strides));
  return address % (kVecSize * sizeof(T)) == 0 && offsets % kVecSize == 0;
}

}  // namespace fi
