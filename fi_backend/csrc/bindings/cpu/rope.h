// Bindings of the rotary embedding kernels: validate, params, run.
#pragma once

#include <bindings/rope_checks.h>
#include <fi_backend/rope/cpu/rope.h>

namespace fi::bindings {

// indptr must not decrease, nor leave [0, num_tokens].
inline void check_request_bounds(const RopeParams& params) {
  const IndexArray indptr = {params.indptr, params.indptr_is_int64};
  int64_t previous = 0;
  for (int64_t b = 0; b <= params.num_requests; ++b) {
    if (indptr[b] < previous || indptr[b] > params.num_tokens) {
      TVM_FFI_THROW(ValueError) << "indptr: must rise from 0 or more to at most "
                                << params.num_tokens << " tokens, got indptr[" << b
                                << "] = " << indptr[b] << " after " << previous;
    }
    previous = indptr[b];
  }
}

inline void check_positions_in_cache(const RopeParams& params) {
  const IndexArray ids = {params.pos_ids, params.pos_ids_is_int64};
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= params.max_position) {
      TVM_FFI_THROW(ValueError) << "positions: must be in [0, " << params.max_position
                                << "), the rows of cos_sin_cache, got positions[" << t
                                << "] = " << ids[t];
    }
  }
}

// q, k, q_out, k_out [num_tokens, num_heads, head_dim]; see set_positions and set_frequencies.
template <class T>
void rope(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
          Optional<TensorView> pos_ids, Optional<TensorView> indptr, Optional<TensorView> offsets,
          int64_t rotary_dim, bool interleave, double rope_scale, double rope_theta,
          double smooth_slope, double smooth_offset, int64_t num_threads) {
  check_head_ranks(q, k);
  RopeParams params = checked_rope_params({q, k, q_out, k_out}, kDtypeOf<T>, q.size(2), rotary_dim,
                                          interleave, kCpu);
  set_frequencies(params, rope_scale, rope_theta, smooth_slope, smooth_offset);
  set_positions(params, pos_ids, indptr, offsets, kCpu);
  if (params.indptr != nullptr) check_request_bounds(params);

  cpu::rope<T>(params, static_cast<int>(num_threads));
}

// q, k, q_out, k_out of rank 2, [num_tokens, num_heads * head_dim], or 3; see set_cos_sin.
template <class T>
void rope_cos_sin(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
                  TensorView positions, TensorView cos_sin_cache, int64_t head_dim, bool interleave,
                  int64_t num_threads) {
  check_cos_sin(cos_sin_cache, kDtypeOf<float>, head_dim, kCpu);
  RopeParams params = checked_rope_params({q, k, q_out, k_out}, kDtypeOf<T>, head_dim,
                                          cos_sin_cache.size(1), interleave, kCpu);
  set_cos_sin(params, positions, cos_sin_cache, kCpu);
  check_positions_in_cache(params);

  cpu::rope<T>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
