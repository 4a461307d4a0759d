// Arguments of the rotary position embedding kernels, shared by every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

inline constexpr int kMaxRotaryDim = 1024;

// Element strides of rows [num_tokens, num_heads, head_dim], last dimension contiguous.
struct RopeStrides {
  int64_t token;
  int64_t head;
};

// Rotate the first rotary_dim values of every head of q and k by angles that depend on the token's
// position; copy the others. Pair i is (x[i], x[i + rotary_dim / 2]), or (x[2i], x[2i + 1]) where
// interleaved. Outputs may be the inputs.
//
// The position of token t is pos_ids[t]; or, without pos_ids, offsets[b] + t - indptr[b] for the
// request b that owns it, and tokens that no request owns are not written. Nor are, on CUDA, tokens
// whose position is not in the cos_sin cache.
//
// The angle of pair i is position * f(i), f(i) = theta^(-2i / rotary_dim) * (s + (1 - s) / scale)
// with s = clamp(theta^(-2i / rotary_dim) * smooth_slope + smooth_offset, 0, 1): all 0 for plain
// scaling, else the ramp of Llama 3.1. With a cos_sin_cache, angles come from there instead.
//
// NOTE: members are in the order of a kernel's first uses. A launch writes its parameters anew, so
// a kernel waits for memory at the first use of each 64 bytes of them.
struct RopeParams {
  const void* pos_ids;  // [num_tokens], int32 or int64; nullptr = the other form
  const void* q;        // [num_tokens, num_qo_heads, head_dim]
  const void* k;        // [num_tokens, num_kv_heads, head_dim]
  int64_t num_tokens;
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  bool pos_ids_is_int64;
  bool interleave;
  bool cos_sin_is_float;  // else they have the type of q, which the fused step alone reads
  bool indptr_is_int64;
  bool offsets_is_int64;
  bool enable_pdl;  // CUDA: launch as a programmatic dependent of the kernel before
  int32_t head_dim;
  int32_t rotary_dim;     // even
  RopeStrides q_strides;  // in elements, as all strides here
  RopeStrides k_strides;
  int64_t max_position;    // rows of cos_sin
  const void* cos_sin;     // [max_position, rotary_dim], cosines then sines; nullptr = computed
  int64_t cos_sin_stride;  // of a position
  void* q_out;             // [num_tokens, num_qo_heads, head_dim]
  void* k_out;             // [num_tokens, num_kv_heads, head_dim]
  RopeStrides q_out_strides;
  RopeStrides k_out_strides;
  const void* indptr;   // [num_requests + 1], int32 or int64
  const void* offsets;  // [num_requests], int32 or int64
  int32_t num_requests;
  double log2_theta;
  float rope_scale;
  float smooth_slope;
  float smooth_offset;
};

}  // namespace fi
