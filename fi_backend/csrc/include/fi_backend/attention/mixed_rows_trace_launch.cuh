// Read what a traced launch of the mixed kernel has recorded.
#pragma once

#include <fi_backend/attention/mixed_rows_trace_launch.h>

#include <fi_backend/attention/mixed_rows_trace.cuh>

namespace fi {

inline cudaError_t copy_block_traces(BlockTrace* traces, int num_blocks) {
  if (num_blocks > kMaxTracedBlocks) return cudaErrorInvalidValue;
  const size_t bytes = num_blocks * sizeof(BlockTrace);
  void* recorded = nullptr;
  cudaError_t error = cudaGetSymbolAddress(&recorded, block_traces);
  if (error == cudaSuccess) error = cudaMemcpy(traces, recorded, bytes, cudaMemcpyDeviceToHost);
  if (error == cudaSuccess) error = cudaMemset(recorded, 0, bytes);
  return error;
}

}  // namespace fi
