// Entry points of a gated activation module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/activation/activation_params.h>

namespace fi {

cudaError_t launch_silu_and_mul(const GatedActivationParams& params, cudaStream_t stream);
cudaError_t launch_gelu_and_mul(const GatedActivationParams& params, cudaStream_t stream);
cudaError_t launch_gelu_tanh_and_mul(const GatedActivationParams& params, cudaStream_t stream);

}  // namespace fi
