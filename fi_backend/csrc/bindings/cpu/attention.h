// Binding of the attention kernels: validate, params, run one line of a plan.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/cpu/run_line.h>

#include <atomic>

namespace fi::bindings {

// Layers run, counted for the life of the module.
inline std::atomic<int64_t>& attention_runs() {
  static std::atomic<int64_t> count{0};
  return count;
}
inline int64_t attention_call_count() { return attention_runs().load(); }

inline void check_plan_field(const char* name, int64_t planned, int64_t wanted) {
  if (planned != wanted) {
    TVM_FFI_THROW(ValueError) << "plan_buffer: planned for " << name << " = " << planned
                              << ", but run got " << wanted << "; plan again";
  }
}

inline void set_scale(const char* name, const Optional<TensorView>& tensor, double value,
                      int64_t num_heads, DLDevice device, const float*& scales, float& scale) {
  if (tensor.has_value()) {
    check_tensor(name, tensor.value(), kDtypeOf<float>, {num_heads}, device);
    scales = static_cast<const float*>(tensor.value().data_ptr());
  }
  scale = static_cast<float>(value);
}

// The one page-table form that the arguments describe.
inline PageTable page_table(const Optional<TensorView>& page_indptr,
                            const Optional<TensorView>& page_indices,
                            const Optional<TensorView>& block_table,
                            const Optional<TensorView>& request_rows, int64_t page_size,
                            int64_t num_reqs, DLDevice device) {
  PageTable table = {};
  table.page_size = static_cast<int32_t>(page_size);
  if (page_indptr.has_value() == block_table.has_value()) {
    TVM_FFI_THROW(ValueError) << "exactly one of page_indptr and block_table must be given, got "
                              << (block_table.has_value() ? "both" : "neither");
  }
  if (block_table.has_value()) {
    const TensorView& tensor = block_table.value();
    check_tensor("block_table", tensor, kDtypeOf<int32_t>, {kAnySize, kAnySize}, device);
    table.block_table = static_cast<const int32_t*>(tensor.data_ptr());
    table.row_stride = tensor.stride(0);
    if (request_rows.has_value()) {
      const TensorView& rows = request_rows.value();
      table.request_rows_is_int64 = rows.dtype() == kDtypeOf<int64_t>;
      check_tensor("request_rows", rows,
                   table.request_rows_is_int64 ? kDtypeOf<int64_t> : kDtypeOf<int32_t>, {num_reqs},
                   device);
      table.request_rows = rows.data_ptr();
    } else if (tensor.size(0) < num_reqs) {
      TVM_FFI_THROW(ValueError) << "block_table: must have a row for each of " << num_reqs
                                << " requests, got " << tensor.size(0);
    }
    return table;
  }
  check_tensor("page_indptr", page_indptr.value(), kDtypeOf<int32_t>, {num_reqs + 1}, device);
  table.indptr = static_cast<const int32_t*>(page_indptr.value().data_ptr());
  if (page_indices.has_value()) {
    check_tensor("page_indices", page_indices.value(), kDtypeOf<int32_t>, {kAnySize}, device);
    table.indices = static_cast<const int32_t*>(page_indices.value().data_ptr());
  } else if (page_size != 1) {
    TVM_FFI_THROW(ValueError) << "page_indices: may be None only where page_size is 1 (ragged K "
                              << "and V), got page_size " << page_size;
  }
  return table;
}

// Run this line of the plan; return whether the other line has work too.
// q [num_rows, num_qo_heads, qk], k_cache [num_pages, page_size, num_kv_heads, qk], v_cache
// [.., vo], out [num_rows, num_qo_heads, vo], lse f32 [num_rows, num_qo_heads].
template <class Traits>
bool run_attention(TensorView q, TensorView k_cache, TensorView v_cache, TensorView out,
                   Optional<TensorView> lse, TensorView plan_buffer, TensorView partials,
                   TensorView qo_indptr, TensorView kv_lens, Optional<TensorView> page_indptr,
                   Optional<TensorView> page_indices, Optional<TensorView> block_table,
                   Optional<TensorView> request_rows, Optional<TensorView> alibi_slopes,
                   Optional<TensorView> sinks, Optional<TensorView> custom_mask,
                   Optional<TensorView> mask_indptr, Optional<TensorView> k_scales,
                   Optional<TensorView> v_scales, double k_scale, double v_scale, double sm_scale,
                   double soft_cap, int64_t window_left, bool causal, double rope_scale,
                   double rope_theta, int64_t num_workers) {
  constexpr int kQk = Traits::kHeadDimQk;
  constexpr int kVo = Traits::kHeadDimVo;
  const DLDevice device = {kDLCPU, 0};
  check_tensor("q", q, kDtypeOf<typename Traits::Q>, {kAnySize, kAnySize, kQk}, device);
  const int64_t num_rows = q.size(0), num_qo_heads = q.size(1);
  check_tensor("k_cache", k_cache, kDtypeOf<typename Traits::Kv>,
               {kAnySize, kAnySize, kAnySize, kQk}, device);
  const int64_t page_size = k_cache.size(1), num_kv_heads = k_cache.size(2);
  check_tensor("v_cache", v_cache, kDtypeOf<typename Traits::Kv>,
               {k_cache.size(0), page_size, num_kv_heads, kVo}, device);
  check_tensor("out", out, kDtypeOf<typename Traits::Out>, {num_rows, num_qo_heads, kVo}, device);
  if (lse.has_value()) {
    check_tensor("lse", lse.value(), kDtypeOf<float>, {num_rows, num_qo_heads}, device);
  }
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_reqs = kv_lens.size(0);
  check_tensor("qo_indptr", qo_indptr, kDtypeOf<int32_t>, {num_reqs + 1}, device);
  if (page_size < 1 || num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "k_cache: page_size must be positive and num_kv_heads a divisor "
                              << "of " << num_qo_heads << " query heads, got " << page_size
                              << " and " << num_kv_heads;
  }
  if (alibi_slopes.has_value()) {
    check_tensor("alibi_slopes", alibi_slopes.value(), kDtypeOf<float>, {num_qo_heads}, device);
  }
  if (sinks.has_value()) {
    check_tensor("sinks", sinks.value(), kDtypeOf<float>, {num_qo_heads}, device);
  }
  if (custom_mask.has_value() != mask_indptr.has_value()) {
    TVM_FFI_THROW(ValueError) << "custom_mask and mask_indptr must be given together";
  }
  if (custom_mask.has_value()) {
    check_tensor("custom_mask", custom_mask.value(), {kDLUInt, 8, 1}, {kAnySize}, device);
    check_tensor("mask_indptr", mask_indptr.value(), kDtypeOf<int32_t>, {num_reqs + 1}, device);
  }
  check_tensor("plan_buffer", plan_buffer, kDtypeOf<int32_t>, {kAnySize}, device);
  check_tensor("partials", partials, kDtypeOf<float>, {kAnySize}, device);
  if (num_workers < 1 || plan_buffer.size(0) < plan_ints(num_reqs, num_workers)) {
    TVM_FFI_THROW(ValueError) << "plan_buffer: must have at least "
                              << plan_ints(num_reqs, num_workers) << " elements for " << num_reqs
                              << " requests and " << num_workers << " workers, got "
                              << plan_buffer.size(0);
  }
  if (partials.size(0) < cpu::arena_floats(num_workers, kQk, kVo)) {
    TVM_FFI_THROW(ValueError) << "partials: must have at least "
                              << cpu::arena_floats(num_workers, kQk, kVo) << " elements, got "
                              << partials.size(0) << "; size it with partial_floats()";
  }
  const PlanView plan =
      view_plan(static_cast<int32_t*>(plan_buffer.data_ptr()), static_cast<int32_t>(num_reqs),
                static_cast<int32_t>(num_workers));
  const WorkGeometry& planned = *plan.geometry;
  check_plan_field("num_reqs", planned.num_reqs, num_reqs);
  check_plan_field("num_workers", planned.num_workers, num_workers);
  check_plan_field("num_kv_heads", planned.num_kv_heads, num_kv_heads);
  check_plan_field("group_size", planned.group_size, num_qo_heads / num_kv_heads);
  check_plan_field("window_left", planned.window_left, window_left);
  check_plan_field("causal", planned.causal, causal);
  check_plan_field("tile_rows", planned.tile_rows, many_row_tile(kQk, kVo));
  const auto* indptr = static_cast<const int32_t*>(qo_indptr.data_ptr());
  if (indptr[num_reqs] > num_rows) {
    TVM_FFI_THROW(ValueError) << "q: must have qo_indptr[-1] = " << indptr[num_reqs]
                              << " rows or more, got " << num_rows;
  }

  AttentionParams params = {};
  params.q = q.data_ptr();
  params.k_cache = k_cache.data_ptr();
  params.v_cache = v_cache.data_ptr();
  params.out = out.data_ptr();
  params.lse = data_or_null<float>(lse);
  params.plan = static_cast<const int32_t*>(plan_buffer.data_ptr());
  params.partials = cpu::align_arena(static_cast<float*>(partials.data_ptr()));
  params.qo_indptr = indptr;
  params.kv_lens = static_cast<const int32_t*>(kv_lens.data_ptr());
  params.alibi_slopes = data_or_null<const float>(alibi_slopes);
  params.sinks = data_or_null<const float>(sinks);
  params.custom_mask = data_or_null<const uint8_t>(custom_mask);
  params.mask_indptr = data_or_null<const int32_t>(mask_indptr);
  set_scale("k_scale", k_scales, k_scale, num_kv_heads, device, params.k_scale,
            params.k_scale_value);
  set_scale("v_scale", v_scales, v_scale, num_kv_heads, device, params.v_scale,
            params.v_scale_value);
  params.pages =
      page_table(page_indptr, page_indices, block_table, request_rows, page_size, num_reqs, device);
  params.k_strides = {k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)};
  params.v_strides = {v_cache.stride(0), v_cache.stride(1), v_cache.stride(2)};
  params.q_row_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.out_row_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  if (lse.has_value()) {
    params.lse_row_stride = lse.value().stride(0);
    params.lse_head_stride = lse.value().stride(1);
  }
  params.num_qo_heads = static_cast<int32_t>(num_qo_heads);
  params.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  params.sm_scale = static_cast<float>(sm_scale);
  params.soft_cap = soft_cap > 0 ? static_cast<float>(soft_cap) : 0.0f;
  params.rope_scale = static_cast<float>(rope_scale);
  params.rope_theta = static_cast<float>(rope_theta);

  if (plan.has_work[Traits::kLine]) {
    // A plan with work in both lines is one run of the layer: its first line counts it.
    if (Traits::kLine == kFewRows || !plan.has_work[kFewRows]) {
      attention_runs().fetch_add(1, std::memory_order_relaxed);
    }
    cpu::run_line<Traits>(params, plan);
  }
  return plan.has_work[kNumLines - 1 - Traits::kLine] != 0;
}

}  // namespace fi::bindings
