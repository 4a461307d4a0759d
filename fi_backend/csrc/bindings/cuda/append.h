// Bindings of the append kernel: validate, device and stream, params, launch.
#pragma once

#include <bindings/append_checks.h>
#include <bindings/cuda/launch.h>
#include <fi_backend/page/append_launch.h>

namespace fi::bindings {

template <class In, class Cache>
AppendParams cuda_append_params(const AppendArguments& a, bool enable_pdl) {
  check_cuda("key", a.key);
  AppendParams params = checked_append_params(a, kDtypeOf<In>, kDtypeOf<Cache>, a.key.device());
  params.enable_pdl = enable_pdl;
  return params;
}

inline void run_append(const AppendParams& params, DLDevice device) {
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("append", launch_append(params, current_stream(device)));
}

// See set_slots.
template <class Types>
void append_slots(TensorView key, TensorView value, TensorView key_cache, TensorView value_cache,
                  TensorView slot_mapping, Optional<TensorView> k_scale,
                  Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                  bool enable_pdl) {
  using In = typename Types::In;
  using Cache = typename Types::Cache;
  AppendParams params = cuda_append_params<In, Cache>(
      {key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value, v_scale_value},
      enable_pdl);
  set_slots(params, key, slot_mapping);
  run_append(params, key.device());
}

// See set_positions.
template <class Types>
void append_positions(TensorView key, TensorView value, TensorView key_cache,
                      TensorView value_cache, TensorView batch_indices, TensorView positions,
                      TensorView kv_indices, TensorView kv_indptr, Optional<TensorView> k_scale,
                      Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                      bool enable_pdl) {
  using In = typename Types::In;
  using Cache = typename Types::Cache;
  AppendParams params = cuda_append_params<In, Cache>(
      {key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value, v_scale_value},
      enable_pdl);
  set_positions(params, key, batch_indices, positions, kv_indices, kv_indptr);
  run_append(params, key.device());
}

}  // namespace fi::bindings
