// Entry point of a few-row attention module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/params.h>

namespace fi {

struct FewRowsLaunch {
  int32_t num_reqs;
  int32_t num_workers;
  int64_t num_rows;        // of q, those of no request included
  int64_t partial_floats;  // in params.partials
  bool enable_pdl;
};

// Run the few-row line of a plan.
cudaError_t launch_few_rows(const AttentionParams& params, const FewRowsLaunch& launch,
                            cudaStream_t stream);

}  // namespace fi
