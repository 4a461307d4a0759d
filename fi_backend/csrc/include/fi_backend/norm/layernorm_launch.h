// Entry point of a layer norm module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/norm/norm_params.h>

namespace fi {

cudaError_t launch_layernorm(const LayerNormParams& params, cudaStream_t stream);

}  // namespace fi
