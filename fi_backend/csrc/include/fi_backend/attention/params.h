// Arguments of the attention kernels, shared by every target and both kernels of a step.
//
// out[i] = softmax(logits[i]) @ V, lse[i] = log2(sum(2^logits[i])), with logits in base 2:
//   x = q . k * sm_scale * k_scale;  x = soft_cap * tanh(x / soft_cap), if soft_cap > 0;
//   x += alibi_slope * (kv_idx - qo_idx);  logit = x * log2(e), or -inf where masked.
// A sink is one more logit without a value: it joins the denominator, hence also lse. A row that
// sees no key gives exactly (0, -inf).
#pragma once

#include <fi_backend/common/macros.h>
#include <fi_backend/layout/paged_kv.h>

namespace fi {

inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr int kMaxVariantBytes = 128;

// States of rows over keys that come before those of kv_lens: the rows of groups that share pages
// (plan/shared_prefix.h, plan/outer_levels.h).
struct PriorStates {
  const float* out;           // [* num_parts, num_qo_heads, head_dim_vo], without v_scale and sinks
  const float* lse;           // [* num_parts, num_qo_heads], base 2; -inf where there is no part
  const int32_t* first_rows;  // [num_reqs], of each request that has some; nullptr = none has
  const int32_t* num_parts;   // [1], states of a row, one after the other, over parts of the keys

  // Whether a request has some. first_pages: see AttentionParams; without them, all have.
  FI_HOST_DEVICE bool are_of(const int32_t* first_pages, int32_t first_page) const {
    return first_rows != nullptr && (first_pages == nullptr || first_page > 0);
  }
};

struct AttentionParams {
  const void* q;             // [num_rows, num_qo_heads, head_dim_qk]
  const void* k_cache;       // [num_pages, page_size, num_kv_heads, head_dim_qk]
  const void* v_cache;       // [num_pages, page_size, num_kv_heads, head_dim_vo]
  void* out;                 // [num_rows, num_qo_heads, head_dim_vo]; rows of no request stay as is
  float* lse;                // [num_rows, num_qo_heads], base 2; nullptr if unwanted
  int32_t* plan;             // see PlanView; a run uses its counters, and leaves them 0
  float* partials;           // workspace, see PartialArea, ManyRowsPartials and cpu/scratch.h
  const int32_t* qo_indptr;  // [num_reqs + 1], as planned
  const int32_t* kv_lens;    // [num_reqs], as planned
  const int32_t* q_rows;     // [num_rows] of out, row of q for each; nullptr = the same
  const int32_t* first_pages;  // [num_reqs], of a page list, where kv_lens begin; nullptr = 0
  PriorStates prior;           // set if first_pages is; of all requests if that is not
  const float* alibi_slopes;   // [num_qo_heads]; nullptr = none
  const float* sinks;          // [num_qo_heads], natural-log logits; nullptr = none
  const uint8_t* custom_mask;  // little-endian bits [qo_len, kv_len] per request; nullptr = none
  const int32_t* mask_indptr;  // [num_reqs + 1], byte offsets in custom_mask
  const float* k_scale;        // [num_kv_heads]; nullptr = k_scale_value for all
  const float* v_scale;        // [num_kv_heads]; nullptr = v_scale_value for all
  PageTable pages;
  KvStrides k_strides;  // in elements, as all strides here
  KvStrides v_strides;
  int64_t q_row_stride;
  int64_t q_head_stride;
  int64_t out_row_stride;
  int64_t out_head_stride;
  int64_t lse_row_stride;
  int64_t lse_head_stride;
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  float sm_scale;
  float k_scale_value;
  float v_scale_value;  // multiplies out, not lse
  float soft_cap;       // 0 = off
  float rope_scale;     // positions are divided by it
  float rope_theta;     // 0 = off; else q and K are rotated in the kernel, half-rotation layout
  alignas(8) unsigned char variant[kMaxVariantBytes];  // its members, see attention/variant.h
};

}  // namespace fi
