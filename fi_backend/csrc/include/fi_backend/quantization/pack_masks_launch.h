// Entry point of the mask packing module.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/quantization/pack_masks_params.h>

namespace fi {

cudaError_t launch_pack_masks(const PackMasksParams& params, cudaStream_t stream);

}  // namespace fi
