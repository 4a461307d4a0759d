// Choose the kernel, the access width and the grid of a layer norm, and launch it.
#pragma once

#include <fi_backend/norm/layernorm_launch.h>

#include <fi_backend/norm/layernorm.cuh>
#include <fi_backend/norm/norm_rows_launch.cuh>

namespace fi {

template <class Traits>
cudaError_t launch_layernorm_kernel(const LayerNormParams& p, cudaStream_t stream) {
  void (*in_registers)(LayerNormParams) = nullptr;
  if constexpr (Traits::kVecSize > 1) in_registers = layernorm_kernel<Traits>;
  return launch_norm_rows(in_registers, layernorm_long_kernel<Traits>,
                          p.hidden_size / Traits::kVecSize, p, stream);
}

template <class In, class Out>
cudaError_t layernorm(const LayerNormParams& params, cudaStream_t stream) {
  if (params.num_outer == 0 || params.num_inner == 0 || params.hidden_size == 0) {
    return cudaSuccess;
  }
  LayerNormParams p = params;
  // Address rows as one dimension where the strides allow it, which spares a division per row.
  if (is_flat(p.input_strides, p.num_inner) && is_flat(p.out_strides, p.num_inner)) {
    p.input_strides.outer = p.input_strides.inner;
    p.out_strides.outer = p.out_strides.inner;
    p.num_outer *= p.num_inner;
    p.num_inner = 1;
  }
  constexpr int kVec = kVecSizeFor<In, Out>;
  const bool is_vectorizable =
      p.hidden_size % kVec == 0 && is_aligned<float, 4>(p.gamma) && is_aligned<float, 4>(p.beta) &&
      is_aligned<In, kVec>(p.input, p.input_strides.outer, p.input_strides.inner) &&
      is_aligned<Out, kVec>(p.out, p.out_strides.outer, p.out_strides.inner);
  return is_vectorizable ? launch_layernorm_kernel<LayerNormTraits<In, Out, kVec>>(p, stream)
                         : launch_layernorm_kernel<LayerNormTraits<In, Out, 1>>(p, stream);
}

}  // namespace fi
