// Entry points of a merge module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/attention/merge_params.h>

namespace fi {

cudaError_t launch_merge_pair(const MergePairParams& params, cudaStream_t stream);
cudaError_t launch_merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace fi
