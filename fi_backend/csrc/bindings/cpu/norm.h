// Bindings of the normalisation kernels: validate, params, run.
#pragma once

#include <bindings/cpu/rows.h>
#include <fi_backend/norm/cpu/norm.h>

namespace fi::bindings {

// input, residual, out [.., hidden_size] of rank 1 to 3; weight [hidden_size]. With a residual,
// residual += input and the sum is normalised. out may be input.
template <class T>
void rmsnorm(TensorView input, TensorView weight, TensorView out, Optional<TensorView> residual,
             double eps, double weight_bias, int64_t num_threads) {
  const Rows rows = check_rows("input", input, kDtypeOf<T>);
  check_like("out", out, kDtypeOf<T>, input);
  check_tensor("weight", weight, kDtypeOf<T>, {rows.size}, kCpu);
  if (residual.has_value()) check_like("residual", residual.value(), kDtypeOf<T>, input);

  RmsNormParams params = {};
  params.input = input.data_ptr();
  params.weight = weight.data_ptr();
  params.out = out.data_ptr();
  params.residual = data_or_null<void>(residual);
  params.input_strides = row_strides<RowStrides>(input);
  params.out_strides = row_strides<RowStrides>(out);
  if (residual.has_value()) params.residual_strides = row_strides<RowStrides>(residual.value());
  params.num_outer = rows.num_outer;
  params.num_inner = rows.num_inner;
  params.hidden_size = static_cast<int32_t>(rows.size);
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  params.quant_scale_value = 1.0f;

  cpu::rmsnorm<T>(params, static_cast<int>(num_threads));
}

// input, out [.., hidden_size] of rank 1 to 3; gamma, beta float32 [hidden_size].
template <class T>
void layernorm(TensorView input, TensorView gamma, TensorView beta, TensorView out, double eps,
               int64_t num_threads) {
  const Rows rows = check_rows("input", input, kDtypeOf<T>);
  check_like("out", out, kDtypeOf<T>, input);
  check_tensor("gamma", gamma, kDtypeOf<float>, {rows.size}, kCpu);
  check_tensor("beta", beta, kDtypeOf<float>, {rows.size}, kCpu);

  LayerNormParams params = {};
  params.input = input.data_ptr();
  params.gamma = static_cast<const float*>(gamma.data_ptr());
  params.beta = static_cast<const float*>(beta.data_ptr());
  params.out = out.data_ptr();
  params.input_strides = row_strides<RowStrides>(input);
  params.out_strides = row_strides<RowStrides>(out);
  params.num_outer = rows.num_outer;
  params.num_inner = rows.num_inner;
  params.hidden_size = static_cast<int32_t>(rows.size);
  params.eps = static_cast<float>(eps);
  params.quant_scale_value = 1.0f;

  cpu::layernorm<T>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
