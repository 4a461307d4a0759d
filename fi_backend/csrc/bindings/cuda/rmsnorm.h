// Binding of the RMS norm kernel: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/norm.h>
#include <fi_backend/norm/rmsnorm_launch.h>

namespace fi::bindings {

// See checked_rmsnorm_params. With a residual, residual += input and the sum is normalised; out may
// be input where it has its type.
template <class Types>
void rmsnorm(TensorView input, TensorView weight, TensorView out, Optional<TensorView> residual,
             Optional<TensorView> scale, double scale_value, double eps, double weight_bias,
             bool enable_pdl) {
  check_cuda("input", input);
  check_hidden_size(input);
  const DLDevice device = input.device();
  RmsNormParams params = checked_rmsnorm_params<typename Types::In, typename Types::Out>(
      input, weight, out, residual, scale, scale_value, eps, weight_bias, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("rmsnorm", launch_rmsnorm(params, current_stream(device)));
}

}  // namespace fi::bindings
