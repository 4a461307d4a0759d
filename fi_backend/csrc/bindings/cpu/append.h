// Bindings of the append kernel: validate, params, run. Nothing is written if anything is wrong.
#pragma once

#include <bindings/append_checks.h>
#include <fi_backend/page/cpu/append.h>
#include <fi_backend/page/cpu/positions.h>

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

inline void check_positive_scales(const char* name, const float* scales, int64_t count) {
  for (int64_t i = 0; scales != nullptr && i < count; ++i) check_positive_scale(name, scales[i]);
}

inline AppendParams cpu_append_params(const AppendArguments& a) {
  const cpu::Storage in = check_storage("key", a.key);
  const cpu::Storage out = check_storage("key_cache", a.key_cache);
  if (cpu::find_conversion(in, out) == nullptr) {
    TVM_FFI_THROW(TypeError) << "key_cache: dtype must be that of an fp8 key, "
                             << tvm::ffi::DLDataTypeToString(a.key.dtype()) << ", got "
                             << tvm::ffi::DLDataTypeToString(a.key_cache.dtype());
  }
  const AppendParams params = checked_append_params(a, a.key.dtype(), a.key_cache.dtype(), kCpu);
  if (uses_scales(a.key.dtype(), a.key_cache.dtype())) {
    const int64_t heads = params.num_kv_heads;
    check_positive_scales("k_scale", params.k_scale, params.k_scale_head_stride == 0 ? 1 : heads);
    check_positive_scales("v_scale", params.v_scale, params.v_scale_head_stride == 0 ? 1 : heads);
  }
  return params;
}

inline void run_append(const AppendParams& params, const AppendArguments& a, int64_t num_threads) {
  cpu::append(params, check_storage("key", a.key), check_storage("key_cache", a.key_cache),
              static_cast<int>(num_threads));
}

// See set_slots.
inline void append_slots(TensorView key, TensorView value, TensorView key_cache,
                         TensorView value_cache, TensorView slot_mapping,
                         Optional<TensorView> k_scale, Optional<TensorView> v_scale,
                         double k_scale_value, double v_scale_value, int64_t num_threads) {
  const AppendArguments a = {key,     value,   key_cache,     value_cache,
                             k_scale, v_scale, k_scale_value, v_scale_value};
  AppendParams params = cpu_append_params(a);
  set_slots(params, key, slot_mapping);
  const IndexArray slots = {params.slot_mapping, params.slot_mapping_is_int64};
  for (int64_t i = 0; i < slot_mapping.size(0); ++i) {
    cpu::CacheRow at;
    const cpu::Placement placement = cpu::place_token(params, i, &at);
    if (placement == cpu::Placement::kSkipped) continue;
    if (placement == cpu::Placement::kOutside) {
      TVM_FFI_THROW(ValueError) << "slot_mapping: must be below " << params.num_pages << " pages * "
                                << params.page_size << " tokens (negative: skip), got slot_mapping["
                                << i << "] = " << slots[i];
    }
    if (i >= params.num_tokens) {
      TVM_FFI_THROW(ValueError) << "slot_mapping: entries past the " << key.size(0)
                                << " rows of key must be negative, got a slot at index " << i;
    }
  }

  run_append(params, a, num_threads);
}

// kv_indptr must rise from 0 or more to at most the number of page ids.
inline void check_page_bounds(const AppendParams& params) {
  int32_t previous = 0;
  for (int64_t b = 0; b <= params.num_requests; ++b) {
    const int32_t bound = params.kv_indptr[b];
    if (bound < previous || bound > params.num_kv_indices) {
      TVM_FFI_THROW(ValueError) << "kv_indptr: must rise from 0 or more to at most "
                                << params.num_kv_indices << ", the size of kv_indices, got "
                                << "kv_indptr[" << b << "] = " << bound << " after " << previous;
    }
    previous = bound;
  }
}

// See set_positions.
inline void append_positions(TensorView key, TensorView value, TensorView key_cache,
                             TensorView value_cache, TensorView batch_indices, TensorView positions,
                             TensorView kv_indices, TensorView kv_indptr,
                             Optional<TensorView> k_scale, Optional<TensorView> v_scale,
                             double k_scale_value, double v_scale_value, int64_t num_threads) {
  const AppendArguments a = {key,     value,   key_cache,     value_cache,
                             k_scale, v_scale, k_scale_value, v_scale_value};
  AppendParams params = cpu_append_params(a);
  set_positions(params, key, batch_indices, positions, kv_indices, kv_indptr);
  check_page_bounds(params);
  for (int64_t i = 0; i < params.num_tokens; ++i) {
    cpu::CacheRow at;
    if (cpu::place_token(params, i, &at) == cpu::Placement::kOutside) {
      TVM_FFI_THROW(ValueError)
          << "batch_indices and positions: must name a token inside the pages "
          << "of one of " << params.num_requests << " requests and of " << params.num_pages
          << " cached pages, got request " << params.batch_indices[i] << " and position "
          << params.positions[i] << " at index " << i;
    }
  }

  run_append(params, a, num_threads);
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
  const IndexArray indptr = {append_indptr.data_ptr(), indptr_is_int64};
  const IndexArray lens = {seq_lens.data_ptr(), lens_is_int64};
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
