// Entry point of a many-row attention module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/params.h>

namespace fi {

// Run the many-row line of a plan of num_reqs requests and num_workers workers.
cudaError_t launch_many_rows(const AttentionParams& params, int32_t num_reqs, int32_t num_workers,
                             bool enable_pdl, cudaStream_t stream);

}  // namespace fi
