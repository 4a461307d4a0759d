// Bindings of the rotary embedding kernels: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/rope_checks.h>
#include <fi_backend/rope/rope_launch.h>

namespace fi::bindings {

inline void run_rope(RopeParams& params, bool enable_pdl, DLDevice device) {
  params.enable_pdl = enable_pdl;
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("rope", launch_rope(params, current_stream(device)));
}

// q, k, q_out, k_out [num_tokens, num_heads, head_dim]; see set_positions and set_frequencies.
template <class T>
void rope(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
          Optional<TensorView> pos_ids, Optional<TensorView> indptr, Optional<TensorView> offsets,
          int64_t rotary_dim, bool interleave, double rope_scale, double rope_theta,
          double smooth_slope, double smooth_offset, bool enable_pdl) {
  check_cuda("q", q);
  check_head_ranks(q, k);
  const DLDevice device = q.device();
  RopeParams params = checked_rope_params({q, k, q_out, k_out}, kDtypeOf<T>, q.size(2), rotary_dim,
                                          interleave, device);
  set_frequencies(params, rope_scale, rope_theta, smooth_slope, smooth_offset);
  set_positions(params, pos_ids, indptr, offsets, device);
  run_rope(params, enable_pdl, device);
}

// q, k, q_out, k_out of rank 2, [num_tokens, num_heads * head_dim], or 3; see set_cos_sin.
template <class T>
void rope_cos_sin(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
                  TensorView positions, TensorView cos_sin_cache, int64_t head_dim, bool interleave,
                  bool enable_pdl) {
  check_cuda("q", q);
  const DLDevice device = q.device();
  check_cos_sin(cos_sin_cache, kDtypeOf<float>, head_dim, device);
  RopeParams params = checked_rope_params({q, k, q_out, k_out}, kDtypeOf<T>, head_dim,
                                          cos_sin_cache.size(1), interleave, device);
  set_cos_sin(params, positions, cos_sin_cache, device);
  run_rope(params, enable_pdl, device);
}

}  // namespace fi::bindings
