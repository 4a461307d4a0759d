// Binding of the attention kernels: validate, params, run one line of a plan.
#pragma once

#include <bindings/attention_variant.h>
#include <bindings/cpu/page_ids.h>
#include <bindings/run_count.h>
#include <fi_backend/attention/cpu/run_line.h>

namespace fi::bindings {

inline void check_plan_field(const char* name, int64_t planned, int64_t wanted) {
  if (planned != wanted) {
    TVM_FFI_THROW(ValueError) << "plan_buffer: planned for " << name << " = " << planned
                              << ", but run got " << wanted << "; plan again";
  }
}

// Run this line of the plan; return whether the other line has work too.
// q [num_rows, num_qo_heads, qk], k_cache [num_pages, page_size, num_kv_heads, qk], v_cache
// [.., vo], out [num_rows, num_qo_heads, vo], lse f32 [num_rows, num_qo_heads]. Members of a custom
// variant come last.
template <class Traits, class... Members>
bool run_with_members(TensorView q, TensorView k_cache, TensorView v_cache, TensorView out,
                      Optional<TensorView> lse, TensorView plan_buffer, TensorView partials,
                      TensorView qo_indptr, TensorView kv_lens, Optional<TensorView> page_indptr,
                      Optional<TensorView> page_indices, Optional<TensorView> block_table,
                      Optional<TensorView> request_rows, Optional<TensorView> alibi_slopes,
                      Optional<TensorView> sinks, Optional<TensorView> custom_mask,
                      Optional<TensorView> mask_indptr, Optional<TensorView> q_rows,
                      Optional<TensorView> first_pages, Optional<TensorView> first_rows,
                      Optional<TensorView> prior_out, Optional<TensorView> prior_lse,
                      Optional<TensorView> prior_parts, Optional<TensorView> k_scales,
                      Optional<TensorView> v_scales, double k_scale, double v_scale,
                      double sm_scale, double soft_cap, int64_t window_left, bool causal,
                      double rope_scale, double rope_theta, int64_t num_workers,
                      typename Member<Members>::Argument... members) {
  constexpr int kQk = Traits::kHeadDimQk;
  constexpr int kVo = Traits::kHeadDimVo;
  const PageTableArguments pages = {page_indptr, page_indices, block_table, request_rows};
  const AttentionArguments arguments = {
      q,           k_cache,     v_cache,    out,         lse,          plan_buffer,
      partials,    qo_indptr,   kv_lens,    pages,       alibi_slopes, sinks,
      custom_mask, mask_indptr, q_rows,     first_pages, first_rows,   prior_out,
      prior_lse,   prior_parts, k_scales,   v_scales,    k_scale,      v_scale,
      sm_scale,    soft_cap,    rope_scale, rope_theta,  num_workers};
  AttentionParams params = checked_params<Traits>(arguments, kCpu);
  check_variant_options<typename Traits::Variant>(arguments);
  set_variant<typename Traits::Variant, Members...>(params, kCpu, members...);
  const int64_t num_reqs = kv_lens.size(0);
  if (partials.size(0) < cpu::arena_floats(num_workers, kQk, kVo)) {
    TVM_FFI_THROW(ValueError) << "partials: must have at least "
                              << cpu::arena_floats(num_workers, kQk, kVo) << " elements, got "
                              << partials.size(0) << "; size it with partial_floats()";
  }
  params.partials = cpu::align_arena(params.partials);
  const PlanView plan =
      view_plan(static_cast<int32_t*>(plan_buffer.data_ptr()), static_cast<int32_t>(num_reqs),
                static_cast<int32_t>(num_workers));
  const WorkGeometry& planned = *plan.geometry;
  check_plan_field("num_reqs", planned.num_reqs, num_reqs);
  check_plan_field("num_workers", planned.num_workers, num_workers);
  check_plan_field("num_kv_heads", planned.num_kv_heads, params.num_kv_heads);
  check_plan_field("group_size", planned.group_size, params.num_qo_heads / params.num_kv_heads);
  check_plan_field("window_left", planned.window_left, window_left);
  check_plan_field("causal", planned.causal, causal);
  check_plan_field("tile_rows", planned.tile_rows, many_row_tile(kQk, kVo));
  const int64_t rows = q_rows.has_value() ? q_rows.value().size(0) : q.size(0);
  if (params.qo_indptr[num_reqs] > rows) {
    TVM_FFI_THROW(ValueError) << (q_rows.has_value() ? "q_rows" : "q")
                              << ": must have qo_indptr[-1] = " << params.qo_indptr[num_reqs]
                              << " rows or more, got " << rows;
  }

  if (plan.has_work[Traits::kLine]) {
    check_page_ids(params, num_reqs, k_cache.size(0), window_left);
    // A plan with work in both lines is one run of the layer, which its first line counts; what
    // groups of requests share is a part of another.
    if (Traits::kLine == kFewRows || (!plan.has_work[kFewRows] && !q_rows.has_value())) {
      count_attention_run();
    }
    cpu::run_line<Traits>(params, plan);
  }
  return plan.has_work[kNumLines - 1 - Traits::kLine] != 0;
}

template <class Traits, class... Members>
constexpr auto run_for(variants::MemberList<Members...>) {
  return run_with_members<Traits, Members...>;
}

// With the arguments that the variant's members take.
template <class Traits>
inline constexpr auto run_attention = run_for<Traits>(typename Traits::Variant::Members());

}  // namespace fi::bindings
