// Arguments of the fused step between the qkv projection and attention.
#pragma once

#include <fi_backend/page/append_params.h>
#include <fi_backend/rope/rope_params.h>

namespace fi {

inline constexpr int kMaxRopeAppendHeadDim = 512;

// For every token: q and k are normalised, if they have a weight, as RmsNormParams says, each head
// by itself, and rotated as RopeParams says, by angles from the cos_sin cache; q goes to q_out, k
// and v go to their caches as AppendParams says. All in fp32, each result rounded once.
//
// Tokens past append.num_tokens have no place in the caches. A token whose position is not in the
// cos_sin cache is skipped altogether.
struct RopeAppendParams {
  RopeParams rope;       // k_out is not used; cos_sin may have the type of q
  AppendParams append;   // key is rope.k
  const void* q_weight;  // [head_dim]; nullptr = q is not normalised
  const void* k_weight;  // [head_dim]; nullptr = k is not normalised
  float eps;
  float weight_bias;  // 0, or 1 for the Gemma variants
};

}  // namespace fi
