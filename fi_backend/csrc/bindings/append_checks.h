// What the append bindings of all targets share: their arguments, the checks of everything that is
// not data, and the params made from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/page/append_params.h>

#include <algorithm>
#include <limits>

namespace fi::bindings {

// The new rows and where they go. Shapes as in AppendParams; k_scale and v_scale override
// k_scale_value and v_scale_value.
struct AppendArguments {
  TensorView key;
  TensorView value;
  TensorView key_cache;
  TensorView value_cache;
  Optional<TensorView> k_scale;
  Optional<TensorView> v_scale;
  double k_scale_value;
  double v_scale_value;
};

// Whether storing divides by a scale: where it converts to fp8.
inline bool uses_scales(DLDataType dtype, DLDataType cache_dtype) {
  return dtype != cache_dtype && (cache_dtype == kDtypeOf<e4m3> || cache_dtype == kDtypeOf<e5m2>);
}

inline void check_positive_scale(const char* name, double scale) {
  if (!(scale > 0)) TVM_FFI_THROW(ValueError) << name << ": must be above 0, got " << scale;
}

// A scale of all heads, [] or [1], or one per head; returns its stride over heads.
inline int32_t checked_scale_stride(const char* name, const Optional<TensorView>& scales,
                                    int64_t num_heads, DLDevice device) {
  if (!scales.has_value()) return 0;
  const TensorView& tensor = scales.value();
  if (tensor.ndim() == 0) {
    check_tensor(name, tensor, kDtypeOf<float>, {}, device);
    return 0;
  }
  check_tensor(name, tensor, kDtypeOf<float>, {tensor.numel() == 1 ? 1 : num_heads}, device);
  return tensor.numel() == 1 ? 0 : 1;
}

// Check and fill in what both forms share; the target has checked that it converts between the
// two dtypes. A scale tensor's values are not looked at.
inline AppendParams checked_append_params(const AppendArguments& a, DLDataType dtype,
                                          DLDataType cache_dtype, DLDevice device) {
  check_tensor("key", a.key, dtype, {kAnySize, kAnySize, kAnySize}, device);
  const int64_t heads = a.key.size(1), dim_qk = a.key.size(2);
  check_tensor("value", a.value, dtype, {a.key.size(0), heads, kAnySize}, device);
  const int64_t dim_vo = a.value.size(2);
  check_cache("key_cache", a.key_cache, cache_dtype, {kAnySize, kAnySize, heads, dim_qk}, device);
  const int64_t num_pages = a.key_cache.size(0), page_size = a.key_cache.size(1);
  check_cache("value_cache", a.value_cache, cache_dtype, {num_pages, page_size, heads, dim_vo},
              device);
  check_written("key_cache", a.key_cache);
  check_written("value_cache", a.value_cache);
  if (page_size < 1 || page_size > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "key_cache: page_size must be at least 1, got " << page_size;
  }
  if (uses_scales(dtype, cache_dtype)) {
    if (!a.k_scale.has_value()) check_positive_scale("k_scale", a.k_scale_value);
    if (!a.v_scale.has_value()) check_positive_scale("v_scale", a.v_scale_value);
  }

  AppendParams params = {};
  params.key = a.key.data_ptr();
  params.value = a.value.data_ptr();
  params.key_cache = a.key_cache.data_ptr();
  params.value_cache = a.value_cache.data_ptr();
  params.k_scale = data_or_null<float>(a.k_scale);
  params.v_scale = data_or_null<float>(a.v_scale);
  params.key_strides = {a.key.stride(0), a.key.stride(1)};
  params.value_strides = {a.value.stride(0), a.value.stride(1)};
  params.key_cache_strides = {a.key_cache.stride(0), a.key_cache.stride(1), a.key_cache.stride(2)};
  params.value_cache_strides = {a.value_cache.stride(0), a.value_cache.stride(1),
                                a.value_cache.stride(2)};
  params.num_pages = num_pages;
  params.page_size = static_cast<int32_t>(page_size);
  params.by_page_size = make_fast_divider(static_cast<uint32_t>(page_size));
  params.num_kv_heads = static_cast<int32_t>(heads);
  params.head_dim_qk = static_cast<int32_t>(dim_qk);
  params.head_dim_vo = static_cast<int32_t>(dim_vo);
  params.k_scale_value = static_cast<float>(a.k_scale_value);
  params.v_scale_value = static_cast<float>(a.v_scale_value);
  params.k_scale_head_stride = checked_scale_stride("k_scale", a.k_scale, heads, device);
  params.v_scale_head_stride = checked_scale_stride("v_scale", a.v_scale, heads, device);
  return params;
}

// slot_mapping [num_slots], int32 or int64. Rows of key without a slot and slots without a row are
// no tokens; the latter must be negative, which only a target that reads them can check.
inline void set_slots(AppendParams& params, const TensorView& key, const TensorView& slot_mapping) {
  params.slot_mapping_is_int64 =
      check_index_tensor("slot_mapping", slot_mapping, kAnySize, key.device());
  params.slot_mapping = slot_mapping.data_ptr();
  params.num_tokens = std::min(slot_mapping.size(0), key.size(0));
}

// batch_indices, positions int32 [num_tokens]; kv_indices int32 [any]; kv_indptr int32
// [num_requests + 1].
inline void set_positions(AppendParams& params, const TensorView& key,
                          const TensorView& batch_indices, const TensorView& positions,
                          const TensorView& kv_indices, const TensorView& kv_indptr) {
  const DLDevice device = key.device();
  check_tensor("batch_indices", batch_indices, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_tokens = batch_indices.size(0);
  check_tensor("positions", positions, kDtypeOf<int32_t>, {num_tokens}, device);
  check_tensor("kv_indices", kv_indices, kDtypeOf<int32_t>, {kAnySize}, device);
  check_tensor("kv_indptr", kv_indptr, kDtypeOf<int32_t>, {kAnySize}, device);
  if (kv_indptr.size(0) < 1) {
    TVM_FFI_THROW(ValueError) << "kv_indptr: shape must be [num_requests + 1], got [0]";
  }
  if (num_tokens > key.size(0)) {
    TVM_FFI_THROW(ValueError) << "key: must have a row for each of the " << num_tokens
                              << " tokens, got " << key.size(0);
  }
  params.batch_indices = static_cast<const int32_t*>(batch_indices.data_ptr());
  params.positions = static_cast<const int32_t*>(positions.data_ptr());
  params.kv_indptr = static_cast<const int32_t*>(kv_indptr.data_ptr());
  params.kv_indices = static_cast<const int32_t*>(kv_indices.data_ptr());
  params.num_tokens = num_tokens;
  params.num_kv_indices = kv_indices.size(0);
  params.num_requests = static_cast<int32_t>(kv_indptr.size(0) - 1);
}

}  // namespace fi::bindings
