// Bindings of the normalisation kernels: validate, params, run.
#pragma once

#include <bindings/norm_checks.h>
#include <fi_backend/norm/cpu/norm.h>

namespace fi::bindings {

// See checked_rmsnorm_params. With a residual, residual += input and the sum is normalised; out may
// be input where it has its type.
template <class Types>
void rmsnorm(TensorView input, TensorView weight, TensorView out, Optional<TensorView> residual,
             Optional<TensorView> scale, double scale_value, double eps, double weight_bias,
             int64_t num_threads) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  const RmsNormParams params = checked_rmsnorm_params<In, Out>(input, weight, out, residual, scale,
                                                               scale_value, eps, weight_bias, kCpu);
  cpu::rmsnorm<In, Out>(params, static_cast<int>(num_threads));
}

// See checked_layernorm_params.
template <class Types>
void layernorm(TensorView input, TensorView gamma, TensorView beta, TensorView out,
               Optional<TensorView> scale, double scale_value, double eps, int64_t num_threads) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  const LayerNormParams params =
      checked_layernorm_params<In, Out>(input, gamma, beta, out, scale, scale_value, eps, kCpu);
  cpu::layernorm<In, Out>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
