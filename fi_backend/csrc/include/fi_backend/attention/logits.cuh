// From q . k to base-2 logits, and from a row's softmax state to its result, as params.h defines
// them. Both attention kernels use this.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/attention/variant.h>
#include <fi_backend/common/div.h>
#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/ptx/math.cuh>

namespace fi {

// The maximum of a row that has seen no key.
__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// A row's maximum grows only when a logit exceeds it by this much: a weight may be above 1 as well
// as below, and most tiles then need neither a maximum over the lanes nor a rescaling. Weights stay
// below 2^8, far from the end of fp16.
inline constexpr float kMaxSlack = 8.f;

// tanh to 2e-7 of 1: a logit under a cap needs no better relative error near 0, the hardware's tanh
// has 11 bits only, and tanhf takes enough registers to make kernels spill that unroll over logits.
__device__ __forceinline__ float soft_cap_tanh(float x) {
  return 1.f - __fdividef(2.f, ptx::exp2_approx(x * (2.f * kLog2e)) + 1.f);
}

// What a packed row of a work item needs to know about itself.
struct LogitRow {
  float scale;       // from q . k to a base-2 logit; under a soft cap, to the argument of tanh
  float slope;       // ALiBi slope * log2(e); 0 = none
  int32_t begin;     // keys [begin, end) that it sees, but for the custom mask
  int32_t end;       // = begin where it sees none
  int32_t position;  // its own place among the keys
  int32_t qo_idx;    // query token within the request
  int32_t head;      // query head
};

// A row's scale alone turns q . k into a logit.
__device__ __forceinline__ bool is_scale_only(const AttentionParams& p) {
  return p.soft_cap == 0.f && p.alibi_slopes == nullptr;
}

// The keys that every row of the piece's request sees: among them nothing needs a mask. Empty under
// a custom mask.
__device__ __forceinline__ KvRange keys_all_see(const AttentionParams& p, const WorkGeometry& g,
                                                const WorkPiece& piece) {
  if (p.custom_mask != nullptr) return {0, 0};
  // Both ends of what a row sees grow with the row.
  return {visible_tokens(g, piece.qo_len, piece.kv_len, piece.qo_len - 1).begin,
          visible_tokens(g, piece.qo_len, piece.kv_len, 0).end};
}

struct RowResult {
  float factor;  // from the unnormalised sum of values to out; 0 where the row saw no key
  float lse;
};

// End a row whose weights are 2^(logit - max), with `sum` over all its keys; or those of a variant
// without softmax. The lse takes as many instructions as all else: only if it is wanted.
template <class Variant>
__device__ __forceinline__ RowResult finish_row(const AttentionParams& p, const WorkPiece& piece,
                                                const LogitRow& row, float max, float sum,
                                                bool wants_lse = true) {
  const float v_scale = p.v_scale != nullptr ? p.v_scale[piece.kv_head] : p.v_scale_value;
  if constexpr (!Variant::kUsesSoftmax) return {v_scale, minus_infinity()};
  const bool is_empty = sum == 0.f;
  const float origin = row.slope * static_cast<float>(piece.kv_len - piece.qo_len);
  float scale = 1.f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[row.head] * kLog2e - origin;
    const float top = fmaxf(max, sink);
    scale = exp2f(max - top);
    sum = sum * scale + exp2f(sink - top);
    max = top;
  }
  // Neither branches nor calls, if the lse is always wanted: rows are finished side by side.
  const float factor = is_empty ? 0.f : __fdividef(scale, sum) * v_scale;
  if (!wants_lse) return {factor, minus_infinity()};
  return {factor, is_empty ? minus_infinity() : max + log2f(sum) + origin};
}

}  // namespace fi
