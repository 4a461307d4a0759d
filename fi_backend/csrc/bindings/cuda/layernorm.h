// Binding of the layer norm kernel: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/norm.h>
#include <fi_backend/norm/layernorm_launch.h>

namespace fi::bindings {

// See checked_layernorm_params.
template <class Types>
void layernorm(TensorView input, TensorView gamma, TensorView beta, TensorView out,
               Optional<TensorView> scale, double scale_value, double eps, bool enable_pdl) {
  check_cuda("input", input);
  check_hidden_size(input);
  const DLDevice device = input.device();
  LayerNormParams params = checked_layernorm_params<typename Types::In, typename Types::Out>(
      input, gamma, beta, out, scale, scale_value, eps, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("layernorm", launch_layernorm(params, current_stream(device)));
}

}  // namespace fi::bindings
