// Entry point of a many-row attention module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/params.h>

namespace fi {

// What the host knows of a step besides the params.
struct ManyRowsLaunch {
  int32_t num_reqs;     // as planned
  int32_t num_workers;  // as planned
  int64_t num_pages;    // of the caches
  bool enable_pdl;
};

// Run the many-row line of a plan.
cudaError_t launch_many_rows(const AttentionParams& params, const ManyRowsLaunch& launch,
                             cudaStream_t stream);

}  // namespace fi
