// Arguments of the normalisation kernels, shared by every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// A row is addressed by (outer, inner), so that [num_tokens, hidden] (num_inner = 1) and a strided
// [num_tokens, num_heads, head_dim] view are one case. Strides are in elements; the last dimension
// is contiguous.
struct RowStrides {
  int64_t outer;
  int64_t inner;
};

// out = x * rsqrt(mean(x^2) + eps) * (weight + weight_bias), where x = input, or
// x = input + residual, which is also stored to residual (rounded; the norm uses the exact sum).
// out may be input. An fp8 or int8 out stores saturate(out / quant_scale).
//
// NOTE: members are in the order of a kernel's first uses; see RopeParams for why.
struct RmsNormParams {
  int64_t num_outer;
  int64_t num_inner;
  int32_t hidden_size;
  bool stages_weight;  // CUDA: the launcher sets it; see launch_rmsnorm_kernel
  bool enable_pdl;     // CUDA: launch as a programmatic dependent of the kernel before
  const void* weight;  // [hidden_size]
  const void* input;   // [num_outer, num_inner, hidden_size]
  void* residual;      // [num_outer, num_inner, hidden_size], read and written; may be nullptr
  RowStrides input_strides;
  RowStrides residual_strides;
  RowStrides out_strides;
  void* out;                 // [num_outer, num_inner, hidden_size]
  const float* quant_scale;  // [1]; nullptr = quant_scale_value
  float eps;
  float weight_bias;        // 0, or 1 for the Gemma variants
  float quant_scale_value;  // 1 where out is not quantised
};

// out = (input - mean) * rsqrt(variance + eps) * gamma + beta, divided by quant_scale as above.
struct LayerNormParams {
  const void* input;         // [num_outer, num_inner, hidden_size]
  const float* gamma;        // [hidden_size]
  const float* beta;         // [hidden_size]
  void* out;                 // [num_outer, num_inner, hidden_size]
  const float* quant_scale;  // [1]; nullptr = quant_scale_value
  RowStrides input_strides;
  RowStrides out_strides;
  int64_t num_outer;
  int64_t num_inner;
  int32_t hidden_size;
  float eps;
  float quant_scale_value;  // 1 where out is not quantised
  bool enable_pdl;          // CUDA: launch as a programmatic dependent of the kernel before
};

}  // namespace fi
