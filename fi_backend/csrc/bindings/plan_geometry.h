// What the planners of all targets share: checks of their arguments, and the geometry they plan.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/few_rows_shape.h>
#include <fi_backend/attention/many_rows_shape.h>
#include <fi_backend/plan/work_line.h>

namespace fi::bindings {

// What a target's kernels want of a plan.
struct TileLimits {
  int32_t few_rows;
  int32_t tile_rows;
  int32_t cut_tokens;
  int32_t min_piece_tokens;
  int32_t item_overhead;
  int32_t teams_per_sm;
  int32_t section_tokens;
  int32_t shares_sms;
};

// Small pieces: one request of 1024 tokens and 8 kv heads must keep 132 SMs busy. Where memory is
// busy, an item's page ids, queries and first tiles take as long to come as 128 tokens take to
// read.
//
// same_types: the caches have q's type, else fp8. on_sm90: the kernels for sm_90a run the plan.
// has_mixed: the kernel for both lines does, if there is one.
inline TileLimits cuda_limits(int64_t head_dim_qk, int64_t head_dim_vo, bool same_types,
                              bool on_sm90, bool has_mixed) {
  constexpr int kSectionBytes = 24 << 20;  // leaves half of the smallest L2 to everything else
  const int qk = static_cast<int>(head_dim_qk);
  const int vo = static_cast<int>(head_dim_vo);
  const int kv_bytes = same_types ? 2 : 1;
  const bool is_sm90 = on_sm90 && has_sm90_head_dims(qk, vo, kv_bytes);
  return {cuda_few_rows_limit(qk, vo),
          is_sm90 ? sm90_tile_rows(qk, vo, kv_bytes) : many_row_tile(qk, vo),
          64,
          64,
          16,
          few_rows_teams_per_sm(qk, vo),
          kSectionBytes / (kv_bytes * (qk + vo)),
          is_sm90 && same_types && has_mixed && has_mixed_rows_dims(qk, vo)};
}

inline int64_t plan_buffer_ints(int64_t max_reqs, int64_t num_workers) {
  if (max_reqs < 0 || num_workers < 1 || num_workers > kMaxWorkers) {
    TVM_FFI_THROW(ValueError) << "max_reqs must be at least 0 and num_workers from 1 to "
                              << kMaxWorkers << ", got " << max_reqs << " and " << num_workers;
  }
  return plan_ints(max_reqs, num_workers);
}

// Check everything but the lengths, which may live on a device. kept_states: see kept_parts.h.
inline WorkGeometry make_geometry(const TensorView& plan_buffer, const TensorView& qo_indptr,
                                  const TensorView& kv_lens, int64_t num_qo_heads,
                                  int64_t num_kv_heads, const TileLimits& limits, bool causal,
                                  int64_t window_left, int64_t num_workers, int64_t split,
                                  bool many_rows_only, DLDevice device, int64_t kept_states = 0) {
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_reqs = kv_lens.size(0);
  check_tensor("qo_indptr", qo_indptr, kDtypeOf<int32_t>, {num_reqs + 1}, device);
  check_tensor("plan_buffer", plan_buffer, kDtypeOf<int32_t>, {kAnySize}, device);
  if (num_kv_heads < 1 || num_qo_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "num_qo_heads must be a positive multiple of num_kv_heads, got "
                              << num_qo_heads << " and " << num_kv_heads;
  }
  if (window_left < -1 || window_left > INT32_MAX || split < -1 || split > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "window_left and split must be -1 or an int32 of at least 0, got "
                              << window_left << " and " << split;
  }
  const int64_t needed = plan_buffer_ints(num_reqs, num_workers);
  if (plan_buffer.size(0) < needed) {
    TVM_FFI_THROW(ValueError) << "plan_buffer must have at least " << needed << " elements for "
                              << num_reqs << " requests and " << num_workers << " workers, got "
                              << plan_buffer.size(0) << "; size it with plan_buffer_ints()";
  }
  if (reinterpret_cast<uintptr_t>(plan_buffer.data_ptr()) % kPlanAlignment != 0) {
    TVM_FFI_THROW(ValueError) << "plan_buffer: must be aligned to " << kPlanAlignment
                              << " bytes; take it from the start of an allocation";
  }

  WorkGeometry geometry = {};
  geometry.num_reqs = static_cast<int32_t>(num_reqs);
  geometry.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  geometry.group_size = static_cast<int32_t>(num_qo_heads / num_kv_heads);
  geometry.few_rows_limit = many_rows_only ? 0 : limits.few_rows;
  geometry.tile_rows = limits.tile_rows;
  geometry.causal = causal;
  geometry.window_left = static_cast<int32_t>(window_left);
  geometry.split = static_cast<int32_t>(split);
  geometry.num_workers = static_cast<int32_t>(num_workers);
  geometry.cut_tokens = limits.cut_tokens;
  geometry.min_piece_tokens = limits.min_piece_tokens;
  geometry.item_overhead = limits.item_overhead;
  geometry.teams_per_sm = limits.teams_per_sm;
  geometry.section_tokens = limits.section_tokens;
  geometry.shares_sms = limits.shares_sms;
  geometry.kept_states = static_cast<int32_t>(kept_states);
  return geometry;
}

// The data of first_pages, int32 [num_reqs], or nullptr.
inline const int32_t* checked_first_pages(const Optional<TensorView>& first_pages, int64_t num_reqs,
                                          DLDevice device) {
  if (first_pages.has_value()) {
    check_tensor("first_pages", first_pages.value(), kDtypeOf<int32_t>, {num_reqs}, device);
  }
  return data_or_null<const int32_t>(first_pages);
}

}  // namespace fi::bindings
