// Bindings of the append kernel: validate, params, run. Nothing is written if anything is wrong.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/page/cpu/append.h>
#include <fi_backend/page/cpu/positions.h>

#include <limits>

namespace fi::bindings {

inline cpu::Storage check_storage(const char* name, const TensorView& tensor) {
  const DLDataType dtype = tensor.dtype();
  if (dtype == kDtypeOf<float>) return cpu::Storage::kFloat;
  if (dtype == kDtypeOf<half>) return cpu::Storage::kHalf;
  if (dtype == kDtypeOf<bf16>) return cpu::Storage::kBf16;
  if (dtype == kDtypeOf<e4m3>) return cpu::Storage::kE4m3;
  if (dtype == kDtypeOf<e5m2>) return cpu::Storage::kE5m2;
  TVM_FFI_THROW(TypeError) << name << ": dtype must be float32, float16, bfloat16, float8_e4m3fn "
                           << "or float8_e5m2, got " << tvm::ffi::DLDataTypeToString(dtype);
}

// A scale of all heads, [] or [1], or one per head; returns its stride over heads.
inline int32_t check_scale(const char* name, const TensorView& scale, int64_t heads) {
  if (scale.ndim() == 0) {
    check_tensor(name, scale, kDtypeOf<float>, {}, kCpu);
    return 0;
  }
  check_tensor(name, scale, kDtypeOf<float>, {scale.numel() == 1 ? 1 : heads}, kCpu);
  return scale.numel() == 1 ? 0 : 1;
}

inline void check_positive_scale(const char* name, const float* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(scales[i] > 0)) {
      TVM_FFI_THROW(ValueError) << name << ": must be above 0, got " << scales[i];
    }
  }
}

// Validate what both forms share, and fill it in. Caches are [num_pages, page_size, num_kv_heads,
// head_dim] views in any memory order.
inline AppendParams append_params(const TensorView& key, const TensorView& value,
                                  const TensorView& key_cache, const TensorView& value_cache,
                                  const Optional<TensorView>& k_scale,
                                  const Optional<TensorView>& v_scale, double k_scale_value,
                                  double v_scale_value, int64_t num_tokens) {
  const cpu::Storage in = check_storage("key", key);
  check_shape("key", key, {kAnySize, kAnySize, kAnySize});
  check_device("key", key, kCpu);
  const int64_t heads = key.size(1), dim_qk = key.size(2);
  check_tensor("value", value, key.dtype(), {key.size(0), heads, kAnySize}, kCpu);
  const cpu::Storage out = check_storage("key_cache", key_cache);
  check_tensor("key_cache", key_cache, key_cache.dtype(), {kAnySize, kAnySize, heads, dim_qk},
               kCpu);
  const int64_t num_pages = key_cache.size(0), page_size = key_cache.size(1);
  const int64_t dim_vo = value.size(2);
  check_tensor("value_cache", value_cache, key_cache.dtype(), {num_pages, page_size, heads, dim_vo},
               kCpu);
  if (cpu::find_conversion(in, out) == nullptr) {
    TVM_FFI_THROW(TypeError) << "key_cache: dtype must be that of an fp8 key, "
                             << tvm::ffi::DLDataTypeToString(key.dtype()) << ", got "
                             << tvm::ffi::DLDataTypeToString(key_cache.dtype());
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
    params.k_scale_head_stride = check_scale("k_scale", k_scale.value(), heads);
  }
  if (v_scale.has_value()) {
    params.v_scale_head_stride = check_scale("v_scale", v_scale.value(), heads);
  }
  if (in != out && cpu::storage_bytes(out) == 1) {
    check_positive_scale("k_scale", k_scale.has_value() ? params.k_scale : &params.k_scale_value,
                         params.k_scale_head_stride == 0 ? 1 : heads);
    check_positive_scale("v_scale", v_scale.has_value() ? params.v_scale : &params.v_scale_value,
                         params.v_scale_head_stride == 0 ? 1 : heads);
  }
  return params;
}

// slot_mapping [num_tokens], int32 or int64. key and value may have more rows than that; where they
// have fewer, the slots past them must be negative.
inline void append_slots(TensorView key, TensorView value, TensorView key_cache,
                         TensorView value_cache, TensorView slot_mapping,
                         Optional<TensorView> k_scale, Optional<TensorView> v_scale,
                         double k_scale_value, double v_scale_value, int64_t num_threads) {
  const bool is_int64 = check_index_tensor("slot_mapping", slot_mapping, kAnySize, kCpu);
  AppendParams params = append_params(key, value, key_cache, value_cache, k_scale, v_scale,
                                      k_scale_value, v_scale_value, slot_mapping.size(0));
  params.slot_mapping = slot_mapping.data_ptr();
  params.slot_mapping_is_int64 = is_int64;
  for (int64_t i = 0; i < params.num_tokens; ++i) {
    cpu::CacheRow at;
    const cpu::Placement placement = cpu::place_token(params, i, &at);
    if (placement == cpu::Placement::kSkipped) continue;
    if (placement == cpu::Placement::kOutside) {
      TVM_FFI_THROW(ValueError) << "slot_mapping: must be below " << params.num_pages << " pages * "
                                << params.page_size << " tokens (negative: skip), got slot_mapping["
                                << i << "] = " << cpu::IndexArray{params.slot_mapping, is_int64}[i];
    }
    if (i >= key.size(0)) {
      TVM_FFI_THROW(ValueError) << "slot_mapping: entries past the " << key.size(0)
                                << " rows of key must be negative, got a slot at index " << i;
    }
  }

  cpu::append(params, check_storage("key", key), check_storage("key_cache", key_cache),
              static_cast<int>(num_threads));
}

// kv_indptr must rise from 0 or more to at most the number of page ids.
inline void check_page_bounds(const TensorView& kv_indptr, int64_t num_ids) {
  const int32_t* indptr = static_cast<const int32_t*>(kv_indptr.data_ptr());
  int32_t previous = 0;
  for (int64_t b = 0; b < kv_indptr.size(0); ++b) {
    if (indptr[b] < previous || indptr[b] > num_ids) {
      TVM_FFI_THROW(ValueError) << "kv_indptr: must rise from 0 or more to at most " << num_ids
                                << ", the size of kv_indices, got kv_indptr[" << b
                                << "] = " << indptr[b] << " after " << previous;
    }
    previous = indptr[b];
  }
}

// batch_indices, positions int32 [num_tokens]; kv_indices int32 [any]; kv_indptr int32
// [num_requests + 1].
inline void append_positions(TensorView key, TensorView value, TensorView key_cache,
                             TensorView value_cache, TensorView batch_indices, TensorView positions,
                             TensorView kv_indices, TensorView kv_indptr,
                             Optional<TensorView> k_scale, Optional<TensorView> v_scale,
                             double k_scale_value, double v_scale_value, int64_t num_threads) {
  check_tensor("batch_indices", batch_indices, kDtypeOf<int32_t>, {kAnySize}, kCpu);
  const int64_t num_tokens = batch_indices.size(0);
  check_tensor("positions", positions, kDtypeOf<int32_t>, {num_tokens}, kCpu);
  check_tensor("kv_indices", kv_indices, kDtypeOf<int32_t>, {kAnySize}, kCpu);
  check_tensor("kv_indptr", kv_indptr, kDtypeOf<int32_t>, {kAnySize}, kCpu);
  if (kv_indptr.size(0) < 1) {
    TVM_FFI_THROW(ValueError) << "kv_indptr: shape must be [num_requests + 1], got [0]";
  }
  check_page_bounds(kv_indptr, kv_indices.size(0));
  AppendParams params = append_params(key, value, key_cache, value_cache, k_scale, v_scale,
                                      k_scale_value, v_scale_value, num_tokens);
  if (num_tokens > key.size(0)) {
    TVM_FFI_THROW(ValueError) << "key: must have a row for each of the " << num_tokens
                              << " tokens, got " << key.size(0);
  }
  params.batch_indices = static_cast<const int32_t*>(batch_indices.data_ptr());
  params.positions = static_cast<const int32_t*>(positions.data_ptr());
  params.kv_indices = static_cast<const int32_t*>(kv_indices.data_ptr());
  params.kv_indptr = static_cast<const int32_t*>(kv_indptr.data_ptr());
  params.num_requests = static_cast<int32_t>(kv_indptr.size(0) - 1);
  for (int64_t i = 0; i < num_tokens; ++i) {
    cpu::CacheRow at;
    if (cpu::place_token(params, i, &at) == cpu::Placement::kOutside) {
      TVM_FFI_THROW(ValueError)
          << "batch_indices and positions: must name a token inside the pages "
          << "of one of " << params.num_requests << " requests and of " << params.num_pages
          << " cached pages, got request " << params.batch_indices[i] << " and position "
          << params.positions[i] << " at index " << i;
    }
  }

  cpu::append(params, check_storage("key", key), check_storage("key_cache", key_cache),
              static_cast<int>(num_threads));
}

// append_indptr [num_requests + 1], seq_lens [num_requests], int32 or int64; batch_indices and
// positions int32 [num_rows], written.
inline void batch_positions(TensorView append_indptr, TensorView seq_lens, TensorView batch_indices,
                            TensorView positions) {
  const bool indptr_is_int64 = check_index_tensor("append_indptr", append_indptr, kAnySize, kCpu);
  const int64_t num_requests = append_indptr.size(0) - 1;
  if (num_requests < 0) {
    TVM_FFI_THROW(ValueError) << "append_indptr: shape must be [num_requests + 1], got [0]";
  }
  const bool lens_is_int64 = check_index_tensor("seq_lens", seq_lens, num_requests, kCpu);
  check_tensor("batch_indices", batch_indices, kDtypeOf<int32_t>, {kAnySize}, kCpu);
  const int64_t num_rows = batch_indices.size(0);
  check_tensor("positions", positions, kDtypeOf<int32_t>, {num_rows}, kCpu);
  const cpu::IndexArray indptr = {append_indptr.data_ptr(), indptr_is_int64};
  const cpu::IndexArray lens = {seq_lens.data_ptr(), lens_is_int64};
  int64_t begin = indptr[0];
  for (int64_t b = 0; b < num_requests; ++b) {
    const int64_t end = indptr[b + 1];
    if (begin < 0 || end < begin || end > num_rows) {
      TVM_FFI_THROW(ValueError) << "append_indptr: must rise from 0 or more to at most nnz = "
                                << num_rows << ", got append_indptr[" << b << "] = " << begin
                                << " and append_indptr[" << b + 1 << "] = " << end;
    }
    if (lens[b] < end - begin) {
      TVM_FFI_THROW(ValueError) << "seq_lens: must include the appended tokens, got seq_lens[" << b
                                << "] = " << lens[b] << " for " << end - begin
                                << " appended tokens";
    }
    begin = end;
  }

  cpu::batch_positions(indptr, lens, num_requests, static_cast<int32_t*>(batch_indices.data_ptr()),
                       static_cast<int32_t*>(positions.data_ptr()), num_rows);
}

}  // namespace fi::bindings
