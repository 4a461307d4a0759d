// Entry point of a rotary embedding module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/rope/rope_params.h>

namespace fi {

cudaError_t launch_rope(const RopeParams& params, cudaStream_t stream);

}  // namespace fi
