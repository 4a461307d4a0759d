// Binding of mask packing: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/pack_masks_checks.h>
#include <fi_backend/quantization/pack_masks_launch.h>

namespace fi::bindings {

// See checked_pack_masks_params.
inline void pack_masks(TensorView bits, TensorView masks, TensorView kv_lens, int64_t num_rows) {
  check_cuda("bits", bits);
  const DLDevice device = bits.device();
  const PackMasksParams params = checked_pack_masks_params(bits, masks, kv_lens, num_rows, device);
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("pack_masks", launch_pack_masks(params, current_stream(device)));
}

}  // namespace fi::bindings
