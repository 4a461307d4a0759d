// Bindings of the append kernel: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <fi_backend/page/append_launch.h>

#include <limits>

namespace fi::bindings {

// A scale of one head or of all: [1] or [num_kv_heads]; returns the stride over heads.
inline int32_t check_scale(const char* name, const TensorView& scale, int64_t heads,
                           DLDevice device) {
  check_tensor(name, scale, kDtypeOf<float>, {scale.numel() == 1 ? 1 : heads}, device);
  return scale.numel() == 1 ? 0 : 1;
}

// Validate what both forms share, and fill it in. Caches are [num_pages, page_size, num_kv_heads,
// head_dim] views in any memory order.
template <class In, class Cache>
AppendParams append_params(const TensorView& key, const TensorView& value,
                           const TensorView& key_cache, const TensorView& value_cache,
                           const Optional<TensorView>& k_scale, const Optional<TensorView>& v_scale,
                           double k_scale_value, double v_scale_value, int64_t num_tokens,
                           bool enable_pdl) {
  check_cuda("key", key);
  const DLDevice device = key.device();
  check_tensor("key", key, kDtypeOf<In>, {kAnySize, kAnySize, kAnySize}, device);
  const int64_t heads = key.size(1), dim_qk = key.size(2);
  check_tensor("value", value, kDtypeOf<In>, {key.size(0), heads, kAnySize}, device);
  const int64_t dim_vo = value.size(2);
  check_tensor("key_cache", key_cache, kDtypeOf<Cache>, {kAnySize, kAnySize, heads, dim_qk},
               device);
  const int64_t num_pages = key_cache.size(0), page_size = key_cache.size(1);
  check_tensor("value_cache", value_cache, kDtypeOf<Cache>, {num_pages, page_size, heads, dim_vo},
               device);
  if (num_tokens > key.size(0)) {
    TVM_FFI_THROW(ValueError) << "key: must have a row for each of the " << num_tokens
                              << " tokens, got " << key.size(0);
  }
  if (page_size < 1 || page_size > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "key_cache: page_size must be at least 1, got " << page_size;
  }

  AppendParams params = {};
  params.key = key.data_ptr();
  params.value = value.data_ptr();
  params.key_cache = key_cache.data_ptr();
  params.value_cache = value_cache.data_ptr();
  params.key_strides = {key.stride(0), key.stride(1)};
  params.value_strides = {value.stride(0), value.stride(1)};
  params.key_cache_strides = {key_cache.stride(0), key_cache.stride(1), key_cache.stride(2)};
  params.value_cache_strides = {value_cache.stride(0), value_cache.stride(1),
                                value_cache.stride(2)};
  params.num_tokens = num_tokens;
  params.num_pages = num_pages;
  params.page_size = static_cast<int32_t>(page_size);
  params.num_kv_heads = static_cast<int32_t>(heads);
  params.head_dim_qk = static_cast<int32_t>(dim_qk);
  params.head_dim_vo = static_cast<int32_t>(dim_vo);
  params.k_scale = data_or_null<float>(k_scale);
  params.v_scale = data_or_null<float>(v_scale);
  params.k_scale_value = static_cast<float>(k_scale_value);
  params.v_scale_value = static_cast<float>(v_scale_value);
  if (k_scale.has_value()) {
    params.k_scale_head_stride = check_scale("k_scale", k_scale.value(), heads, device);
  }
  if (v_scale.has_value()) {
    params.v_scale_head_stride = check_scale("v_scale", v_scale.value(), heads, device);
  }
  params.enable_pdl = enable_pdl;
  return params;
}

inline void run_append(const AppendParams& params, DLDevice device) {
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("append", launch_append(params, current_stream(device)));
}

// slot_mapping [num_tokens], int64 or int32; key and value may have more rows than that.
template <class In, class Cache>
void append_slots(TensorView key, TensorView value, TensorView key_cache, TensorView value_cache,
                  TensorView slot_mapping, Optional<TensorView> k_scale,
                  Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                  bool enable_pdl) {
  const bool is_int64 = check_index_tensor("slot_mapping", slot_mapping, kAnySize, key.device());
  AppendParams params =
      append_params<In, Cache>(key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value,
                               v_scale_value, slot_mapping.size(0), enable_pdl);
  params.slot_mapping = slot_mapping.data_ptr();
  params.slot_mapping_is_int64 = is_int64;
  run_append(params, key.device());
}

// batch_indices, positions int32 [num_tokens]; kv_indices int32 [any]; kv_indptr int32
// [num_requests + 1].
template <class In, class Cache>
void append_positions(TensorView key, TensorView value, TensorView key_cache,
                      TensorView value_cache, TensorView batch_indices, TensorView positions,
                      TensorView kv_indices, TensorView kv_indptr, Optional<TensorView> k_scale,
                      Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                      bool enable_pdl) {
  const DLDevice device = key.device();
  check_tensor("batch_indices", batch_indices, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_tokens = batch_indices.size(0);
  check_tensor("positions", positions, kDtypeOf<int32_t>, {num_tokens}, device);
  check_tensor("kv_indices", kv_indices, kDtypeOf<int32_t>, {kAnySize}, device);
  check_tensor("kv_indptr", kv_indptr, kDtypeOf<int32_t>, {kAnySize}, device);
  if (kv_indptr.size(0) < 1) {
    TVM_FFI_THROW(ValueError) << "kv_indptr: shape must be [num_requests + 1], got [0]";
  }
  AppendParams params =
      append_params<In, Cache>(key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value,
                               v_scale_value, num_tokens, enable_pdl);
  params.batch_indices = static_cast<const int32_t*>(batch_indices.data_ptr());
  params.positions = static_cast<const int32_t*>(positions.data_ptr());
  params.kv_indices = static_cast<const int32_t*>(kv_indices.data_ptr());
  params.kv_indptr = static_cast<const int32_t*>(kv_indptr.data_ptr());
  params.num_requests = static_cast<int32_t>(kv_indptr.size(0) - 1);
  run_append(params, device);
}

}  // namespace fi::bindings
