// Entry point that only a module has which traces the mixed kernel.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/mixed_rows_trace.h>

namespace fi {

// Copy what the last launch recorded, and forget it.
cudaError_t take_block_traces(BlockTrace* traces, int num_blocks);

}  // namespace fi
