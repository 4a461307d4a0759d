// Entry point of an append module; each module holds one instantiation.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/page/append_params.h>

namespace fi {

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

}  // namespace fi
