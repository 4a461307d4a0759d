// Binding of the RMS norm kernel: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <fi_backend/norm/rmsnorm_launch.h>

namespace fi::bindings {

// `tensor` must be [outer, hidden] or [outer, inner, hidden] as `input` is.
inline void check_rows(const char* name, const TensorView& tensor, DLDataType dtype,
                       const TensorView& input) {
  if (input.ndim() == 2) {
    check_tensor(name, tensor, dtype, {input.size(0), input.size(1)}, input.device());
  } else {
    check_tensor(name, tensor, dtype, {input.size(0), input.size(1), input.size(2)},
                 input.device());
  }
}

inline RowStrides row_strides(const TensorView& tensor) {
  return {tensor.stride(0), tensor.ndim() == 3 ? tensor.stride(1) : 0};
}

// input, residual, out [rows, hidden] or [tokens, heads, hidden]; weight [hidden]; quant_scale fp32
// [1]. With a residual, residual += input and the sum is normalised. out may be input.
template <class Types>
void rmsnorm(TensorView input, TensorView weight, TensorView out, Optional<TensorView> residual,
             Optional<TensorView> quant_scale, double quant_scale_value, double eps,
             double weight_bias, bool enable_pdl) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  check_cuda("input", input);
  if (input.ndim() != 2 && input.ndim() != 3) {
    TVM_FFI_THROW(ValueError) << "input: rank must be 2 or 3, got " << input.ndim();
  }
  const DLDevice device = input.device();
  const int64_t hidden = input.size(-1);
  check_rows("input", input, kDtypeOf<In>, input);
  check_rows("out", out, kDtypeOf<Out>, input);
  check_tensor("weight", weight, kDtypeOf<In>, {hidden}, device);
  if (residual.has_value()) check_rows("residual", residual.value(), kDtypeOf<In>, input);
  if (quant_scale.has_value()) {
    check_tensor("quant_scale", quant_scale.value(), kDtypeOf<float>, {1}, device);
  }
  constexpr int64_t kMaxHidden = int64_t(1) << 30;
  if (hidden > kMaxHidden) {
    TVM_FFI_THROW(ValueError) << "input: hidden size must be at most " << kMaxHidden << ", got "
                              << hidden;
  }

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const cudaStream_t stream = current_stream(device);

  RmsNormParams params = {};
  params.input = input.data_ptr();
  params.weight = weight.data_ptr();
  params.out = out.data_ptr();
  params.residual = data_or_null<void>(residual);
  params.quant_scale = data_or_null<float>(quant_scale);
  params.input_strides = row_strides(input);
  params.out_strides = row_strides(out);
  if (residual.has_value()) params.residual_strides = row_strides(residual.value());
  params.num_outer = input.size(0);
  params.num_inner = input.ndim() == 3 ? input.size(1) : 1;
  params.hidden_size = static_cast<int32_t>(hidden);
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  params.quant_scale_value = static_cast<float>(quant_scale_value);
  params.enable_pdl = enable_pdl;

  check_launch("rmsnorm", launch_rmsnorm(params, stream));
}

}  // namespace fi::bindings
