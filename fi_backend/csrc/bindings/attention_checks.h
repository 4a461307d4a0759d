// What the attention bindings of all targets share: their arguments, the checks of everything that
// is not data, and the params made from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/params.h>
#include <fi_backend/plan/work_line.h>

namespace fi::bindings {

// The forms of a page table, of which exactly one is given; see PageTable.
struct PageTableArguments {
  Optional<TensorView> page_indptr;
  Optional<TensorView> page_indices;
  Optional<TensorView> block_table;
  Optional<TensorView> request_rows;
};

// The tensors and scalars of a run. Shapes as in AttentionParams; k_scales and v_scales override
// k_scale and v_scale.
struct AttentionArguments {
  TensorView q;
  TensorView k_cache;
  TensorView v_cache;
  TensorView out;
  Optional<TensorView> lse;
  TensorView plan_buffer;  // int32, see PlanView
  TensorView partials;     // f32
  TensorView qo_indptr;
  TensorView kv_lens;
  PageTableArguments pages;
  Optional<TensorView> alibi_slopes;
  Optional<TensorView> sinks;
  Optional<TensorView> custom_mask;
  Optional<TensorView> mask_indptr;
  Optional<TensorView> q_rows;
  Optional<TensorView> first_pages;
  Optional<TensorView> first_rows;
  Optional<TensorView> prior_out;
  Optional<TensorView> prior_lse;
  Optional<TensorView> prior_parts;
  Optional<TensorView> k_scales;
  Optional<TensorView> v_scales;
  double k_scale;
  double v_scale;
  double sm_scale;
  double soft_cap;
  double rope_scale;
  double rope_theta;
  int64_t num_workers;
};

inline const float* checked_scales(const char* name, const Optional<TensorView>& scales,
                                   int64_t num_heads, DLDevice device) {
  if (scales.has_value()) {
    check_tensor(name, scales.value(), kDtypeOf<float>, {num_heads}, device);
  }
  return data_or_null<const float>(scales);
}

// The one page-table form that the arguments describe.
inline PageTable page_table(const PageTableArguments& a, int64_t page_size, int64_t num_reqs,
                            DLDevice device) {
  PageTable table = {};
  table.page_size = static_cast<int32_t>(page_size);
  if (a.page_indptr.has_value() == a.block_table.has_value()) {
    TVM_FFI_THROW(ValueError) << "exactly one of page_indptr and block_table must be given, got "
                              << (a.block_table.has_value() ? "both" : "neither");
  }
  if (a.block_table.has_value()) {
    const TensorView& tensor = a.block_table.value();
    check_tensor("block_table", tensor, kDtypeOf<int32_t>, {kAnySize, kAnySize}, device);
    table.block_table = static_cast<const int32_t*>(tensor.data_ptr());
    table.row_stride = tensor.stride(0);
    if (a.request_rows.has_value()) {
      const TensorView& rows = a.request_rows.value();
      table.request_rows_is_int64 = check_index_tensor("request_rows", rows, num_reqs, device);
      table.request_rows = rows.data_ptr();
    } else if (tensor.size(0) < num_reqs) {
      TVM_FFI_THROW(ValueError) << "block_table: must have a row for each of " << num_reqs
                                << " requests, got " << tensor.size(0);
    }
    return table;
  }
  check_tensor("page_indptr", a.page_indptr.value(), kDtypeOf<int32_t>, {num_reqs + 1}, device);
  table.indptr = static_cast<const int32_t*>(a.page_indptr.value().data_ptr());
  if (a.page_indices.has_value()) {
    check_tensor("page_indices", a.page_indices.value(), kDtypeOf<int32_t>, {kAnySize}, device);
    table.indices = static_cast<const int32_t*>(a.page_indices.value().data_ptr());
  } else if (page_size != 1) {
    TVM_FFI_THROW(ValueError) << "page_indices: may be None only where page_size is 1 (ragged K "
                              << "and V), got page_size " << page_size;
  }
  return table;
}

// The states of rows over shared pages that the arguments describe; see PriorStates.
inline PriorStates prior_states(const AttentionArguments& a, int64_t head_dim_vo, int64_t num_reqs,
                                DLDevice device) {
  const bool is_given = a.first_rows.has_value();
  for (const auto* other : {&a.prior_out, &a.prior_lse, &a.prior_parts}) {
    if (other->has_value() != is_given || (a.first_pages.has_value() && !is_given)) {
      TVM_FFI_THROW(ValueError) << "first_rows, prior_out, prior_lse and prior_parts must be given "
                                << "together, and with first_pages";
    }
  }
  if (!is_given) return {};
  const TensorView &out = a.prior_out.value(), &lse = a.prior_lse.value();
  if (a.first_pages.has_value()) {
    check_tensor("first_pages", a.first_pages.value(), kDtypeOf<int32_t>, {num_reqs}, device);
  }
  check_tensor("first_rows", a.first_rows.value(), kDtypeOf<int32_t>, {num_reqs}, device);
  check_tensor("prior_out", out, kDtypeOf<float>, {kAnySize, a.q.size(1), head_dim_vo}, device);
  check_tensor("prior_lse", lse, kDtypeOf<float>, {out.size(0), a.q.size(1)}, device);
  check_tensor("prior_parts", a.prior_parts.value(), kDtypeOf<int32_t>, {1}, device);
  if (!out.IsContiguous() || !lse.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << "prior_out and prior_lse must be contiguous";
  }
  return {data_or_null<const float>(a.prior_out), data_or_null<const float>(a.prior_lse),
          data_or_null<const int32_t>(a.first_rows), data_or_null<const int32_t>(a.prior_parts)};
}

// Check all arguments but the contents of plan_buffer and the size of partials, which is the
// target's. Traits: Q, Kv and Out are host types; kHeadDimQk, kHeadDimVo.
template <class Traits>
AttentionParams checked_params(const AttentionArguments& a, DLDevice device) {
  constexpr int kQk = Traits::kHeadDimQk;
  constexpr int kVo = Traits::kHeadDimVo;
  check_tensor("q", a.q, kDtypeOf<typename Traits::Q>, {kAnySize, kAnySize, kQk}, device);
  const int64_t num_rows = a.q.size(0), num_qo_heads = a.q.size(1);
  check_cache("k_cache", a.k_cache, kDtypeOf<typename Traits::Kv>,
              {kAnySize, kAnySize, kAnySize, kQk}, device);
  const int64_t page_size = a.k_cache.size(1), num_kv_heads = a.k_cache.size(2);
  check_cache("v_cache", a.v_cache, kDtypeOf<typename Traits::Kv>,
              {a.k_cache.size(0), page_size, num_kv_heads, kVo}, device);
  int64_t num_out_rows = num_rows;
  if (a.q_rows.has_value()) {
    check_tensor("q_rows", a.q_rows.value(), kDtypeOf<int32_t>, {kAnySize}, device);
    num_out_rows = a.out.size(0);  // a plan may keep several states of a row
  }
  check_tensor("out", a.out, kDtypeOf<typename Traits::Out>, {num_out_rows, num_qo_heads, kVo},
               device);
  if (a.lse.has_value()) {
    check_tensor("lse", a.lse.value(), kDtypeOf<float>, {num_out_rows, num_qo_heads}, device);
  }
  check_written("out", a.out);
  check_written("lse", a.lse);
  check_tensor("kv_lens", a.kv_lens, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_reqs = a.kv_lens.size(0);
  check_tensor("qo_indptr", a.qo_indptr, kDtypeOf<int32_t>, {num_reqs + 1}, device);
  if (page_size < 1 || num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "k_cache: page_size must be positive and num_kv_heads a divisor "
                              << "of " << num_qo_heads << " query heads, got " << page_size
                              << " and " << num_kv_heads;
  }
  if (a.alibi_slopes.has_value()) {
    check_tensor("alibi_slopes", a.alibi_slopes.value(), kDtypeOf<float>, {num_qo_heads}, device);
  }
  if (a.sinks.has_value()) {
    check_tensor("sinks", a.sinks.value(), kDtypeOf<float>, {num_qo_heads}, device);
  }
  if (a.custom_mask.has_value() != a.mask_indptr.has_value()) {
    TVM_FFI_THROW(ValueError) << "custom_mask and mask_indptr must be given together";
  }
  if (a.custom_mask.has_value()) {
    check_tensor("custom_mask", a.custom_mask.value(), {kDLUInt, 8, 1}, {kAnySize}, device);
    check_tensor("mask_indptr", a.mask_indptr.value(), kDtypeOf<int32_t>, {num_reqs + 1}, device);
  }
  check_tensor("plan_buffer", a.plan_buffer, kDtypeOf<int32_t>, {kAnySize}, device);
  check_tensor("partials", a.partials, kDtypeOf<float>, {kAnySize}, device);
  if (a.num_workers < 1 || a.plan_buffer.size(0) < plan_ints(num_reqs, a.num_workers)) {
    TVM_FFI_THROW(ValueError) << "plan_buffer: must have at least "
                              << plan_ints(num_reqs, a.num_workers) << " elements for " << num_reqs
                              << " requests and " << a.num_workers << " workers, got "
                              << a.plan_buffer.size(0);
  }

  AttentionParams params = {};
  params.q = a.q.data_ptr();
  params.k_cache = a.k_cache.data_ptr();
  params.v_cache = a.v_cache.data_ptr();
  params.out = a.out.data_ptr();
  params.lse = data_or_null<float>(a.lse);
  params.plan = static_cast<int32_t*>(a.plan_buffer.data_ptr());
  params.partials = static_cast<float*>(a.partials.data_ptr());
  params.qo_indptr = static_cast<const int32_t*>(a.qo_indptr.data_ptr());
  params.kv_lens = static_cast<const int32_t*>(a.kv_lens.data_ptr());
  params.q_rows = data_or_null<const int32_t>(a.q_rows);
  params.first_pages = data_or_null<const int32_t>(a.first_pages);
  params.prior = prior_states(a, kVo, num_reqs, device);
  params.alibi_slopes = data_or_null<const float>(a.alibi_slopes);
  params.sinks = data_or_null<const float>(a.sinks);
  params.custom_mask = data_or_null<const uint8_t>(a.custom_mask);
  params.mask_indptr = data_or_null<const int32_t>(a.mask_indptr);
  params.k_scale = checked_scales("k_scale", a.k_scales, num_kv_heads, device);
  params.v_scale = checked_scales("v_scale", a.v_scales, num_kv_heads, device);
  params.k_scale_value = static_cast<float>(a.k_scale);
  params.v_scale_value = static_cast<float>(a.v_scale);
  params.pages = page_table(a.pages, page_size, num_reqs, device);
  params.k_strides = {a.k_cache.stride(0), a.k_cache.stride(1), a.k_cache.stride(2)};
  params.v_strides = {a.v_cache.stride(0), a.v_cache.stride(1), a.v_cache.stride(2)};
  params.q_row_stride = a.q.stride(0);
  params.q_head_stride = a.q.stride(1);
  params.out_row_stride = a.out.stride(0);
  params.out_head_stride = a.out.stride(1);
  if (a.lse.has_value()) {
    params.lse_row_stride = a.lse.value().stride(0);
    params.lse_head_stride = a.lse.value().stride(1);
  }
  params.num_qo_heads = static_cast<int32_t>(num_qo_heads);
  params.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  params.sm_scale = static_cast<float>(a.sm_scale);
  params.soft_cap = a.soft_cap > 0 ? static_cast<float>(a.soft_cap) : 0.0f;
  params.rope_scale = static_cast<float>(a.rope_scale);
  params.rope_theta = static_cast<float>(a.rope_theta);
  return params;
}

}  // namespace fi::bindings
