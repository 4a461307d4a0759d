// Entry points of a module that runs both lines of a plan at once; each holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/params.h>

namespace fi {

// What the host knows of a step besides the params.
struct MixedRowsLaunch {
  int32_t num_reqs;        // as planned
  int32_t num_workers;     // as planned
  int64_t num_rows;        // of q, those of no request included
  int64_t num_pages;       // of the caches
  int64_t partial_floats;  // in params.partials
  int64_t many_floats;     // the first of them, for the many-row line; few rows have the others
  bool enable_pdl;
};

// Run both lines of a plan, on a device for which has_mixed_rows() is true.
cudaError_t launch_mixed_rows(const AttentionParams& params, const MixedRowsLaunch& launch,
                              cudaStream_t stream);

// True if the module has code for the current device.
cudaError_t has_mixed_rows(bool& result);

}  // namespace fi
