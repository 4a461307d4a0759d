// What the norm bindings of all targets share: the checks of their arguments and the params made
// from them.
#pragma once

#include <bindings/rows.h>
#include <fi_backend/norm/norm_params.h>

namespace fi::bindings {

// A quantised output holds saturate(value / scale): `scale` float32 [] or [1], or else scale_value.
template <class Params>
void set_quant_scale(Params& params, DLDataType out_dtype, const Optional<TensorView>& scale,
                     double scale_value, DLDevice device) {
  const bool is_quantized = out_dtype.bits == 8;
  if (scale.has_value()) {
    const TensorView& tensor = scale.value();
    tensor.ndim() == 0 ? check_tensor("scale", tensor, kDtypeOf<float>, {}, device)
                       : check_tensor("scale", tensor, kDtypeOf<float>, {1}, device);
  } else if (is_quantized && !(scale_value > 0)) {
    TVM_FFI_THROW(ValueError) << "scale: must be above 0, got " << scale_value;
  }
  params.quant_scale = data_or_null<float>(scale);
  params.quant_scale_value = static_cast<float>(scale_value);
}

template <class Params>
void set_rows(Params& params, const TensorView& input, const TensorView& out, const Rows& rows) {
  params.input = input.data_ptr();
  params.out = out.data_ptr();
  params.input_strides = row_strides<RowStrides>(input);
  params.out_strides = row_strides<RowStrides>(out);
  params.num_outer = rows.num_outer;
  params.num_inner = rows.num_inner;
  params.hidden_size = static_cast<int32_t>(rows.size);
}

// input, residual, out [.., hidden_size] of rank 1 to 3; weight [hidden_size].
template <class In, class Out>
RmsNormParams checked_rmsnorm_params(const TensorView& input, const TensorView& weight,
                                     const TensorView& out, const Optional<TensorView>& residual,
                                     const Optional<TensorView>& scale, double scale_value,
                                     double eps, double weight_bias, DLDevice device) {
  const Rows rows = check_rows("input", input, kDtypeOf<In>, device);
  check_like("out", out, kDtypeOf<Out>, input);
  check_tensor("weight", weight, kDtypeOf<In>, {rows.size}, device);
  if (residual.has_value()) check_like("residual", residual.value(), kDtypeOf<In>, input);
  check_written("out", out);
  check_written("residual", residual);

  RmsNormParams params = {};
  set_rows(params, input, out, rows);
  set_quant_scale(params, kDtypeOf<Out>, scale, scale_value, device);
  params.weight = weight.data_ptr();
  params.residual = data_or_null<void>(residual);
  if (residual.has_value()) params.residual_strides = row_strides<RowStrides>(residual.value());
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  return params;
}

// input, out [.., hidden_size] of rank 1 to 3; gamma, beta float32 [hidden_size].
template <class In, class Out>
LayerNormParams checked_layernorm_params(const TensorView& input, const TensorView& gamma,
                                         const TensorView& beta, const TensorView& out,
                                         const Optional<TensorView>& scale, double scale_value,
                                         double eps, DLDevice device) {
  const Rows rows = check_rows("input", input, kDtypeOf<In>, device);
  check_like("out", out, kDtypeOf<Out>, input);
  check_tensor("gamma", gamma, kDtypeOf<float>, {rows.size}, device);
  check_tensor("beta", beta, kDtypeOf<float>, {rows.size}, device);
  check_written("out", out);

  LayerNormParams params = {};
  set_rows(params, input, out, rows);
  set_quant_scale(params, kDtypeOf<Out>, scale, scale_value, device);
  params.gamma = static_cast<const float*>(gamma.data_ptr());
  params.beta = static_cast<const float*>(beta.data_ptr());
  params.eps = static_cast<float>(eps);
  return params;
}

}  // namespace fi::bindings
