// Entry point of a fused rope and append module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/rope/rope_append_params.h>

namespace fi {

cudaError_t launch_rope_append(const RopeAppendParams& params, cudaStream_t stream);

}  // namespace fi
