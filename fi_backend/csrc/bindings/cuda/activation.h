// Bindings of the gated activation kernels: validate, device and stream, params, launch.
#pragma once

#include <bindings/activation_checks.h>
#include <bindings/cuda/launch.h>
#include <fi_backend/activation/activation_launch.h>

namespace fi::bindings {

// See checked_activation_params.
template <class T, cudaError_t (*launch)(const GatedActivationParams&, cudaStream_t)>
void gate_and_mul(TensorView input, TensorView out, bool enable_pdl) {
  check_cuda("input", input);
  const DLDevice device = input.device();
  GatedActivationParams params = checked_activation_params<T>(input, out, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("gate_and_mul", launch(params, current_stream(device)));
}

}  // namespace fi::bindings
