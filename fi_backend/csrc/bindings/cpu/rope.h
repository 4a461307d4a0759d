// Bindings of the rotary embedding kernels: validate, params, run.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/rope/cpu/rope.h>

namespace fi::bindings {

// The heads of a tensor [num_tokens, num_heads, head_dim] or [num_tokens, num_heads * head_dim].
struct Heads {
  int64_t num_tokens;
  int32_t num_heads;
  RopeStrides strides;
};

template <class T>
Heads check_heads(const char* name, const TensorView& tensor, int64_t head_dim) {
  if (tensor.ndim() == 2) {
    check_tensor(name, tensor, kDtypeOf<T>, {kAnySize, kAnySize}, kCpu);
    if (tensor.size(1) % head_dim != 0) {
      TVM_FFI_THROW(ValueError) << name << ": the last dimension must be a multiple of head_size "
                                << head_dim << ", got " << tensor.size(1);
    }
    return {tensor.size(0),
            static_cast<int32_t>(tensor.size(1) / head_dim),
            {tensor.stride(0), head_dim}};
  }
  check_tensor(name, tensor, kDtypeOf<T>, {kAnySize, kAnySize, head_dim}, kCpu);
  return {
      tensor.size(0), static_cast<int32_t>(tensor.size(1)), {tensor.stride(0), tensor.stride(1)}};
}

template <class T>
RopeParams rope_params(const TensorView& q, const TensorView& k, const TensorView& q_out,
                       const TensorView& k_out, int64_t head_dim, int64_t rotary_dim,
                       bool interleave) {
  const Heads heads_q = check_heads<T>("q", q, head_dim);
  const Heads heads_k = check_heads<T>("k", k, head_dim);
  const Heads heads_q_out = check_heads<T>("q_out", q_out, head_dim);
  const Heads heads_k_out = check_heads<T>("k_out", k_out, head_dim);
  if (heads_k.num_tokens != heads_q.num_tokens) {
    TVM_FFI_THROW(ValueError) << "k: must have as many tokens as q, " << heads_q.num_tokens
                              << ", got " << heads_k.num_tokens;
  }
  if (heads_q_out.num_tokens != heads_q.num_tokens || heads_q_out.num_heads != heads_q.num_heads ||
      heads_k_out.num_tokens != heads_k.num_tokens || heads_k_out.num_heads != heads_k.num_heads) {
    TVM_FFI_THROW(ValueError) << "q_out and k_out: shapes must be those of q and k, got "
                              << shape_text(q_out.shape().data(), q_out.shape().size()) << " and "
                              << shape_text(k_out.shape().data(), k_out.shape().size());
  }
  const int64_t longest = head_dim < cpu::kMaxRotaryDim ? head_dim : cpu::kMaxRotaryDim;
  if (rotary_dim < 2 || rotary_dim > longest || rotary_dim % 2 != 0) {
    TVM_FFI_THROW(ValueError) << "rotary_dim: must be even and in [2, " << longest << "], got "
                              << rotary_dim;
  }

  RopeParams params = {};
  params.q = q.data_ptr();
  params.k = k.data_ptr();
  params.q_out = q_out.data_ptr();
  params.k_out = k_out.data_ptr();
  params.q_strides = heads_q.strides;
  params.k_strides = heads_k.strides;
  params.q_out_strides = heads_q_out.strides;
  params.k_out_strides = heads_k_out.strides;
  params.num_tokens = heads_q.num_tokens;
  params.num_qo_heads = heads_q.num_heads;
  params.num_kv_heads = heads_k.num_heads;
  params.head_dim = static_cast<int32_t>(head_dim);
  params.rotary_dim = static_cast<int32_t>(rotary_dim);
  params.interleave = interleave;
  return params;
}

// indptr must not decrease, nor leave [0, num_tokens].
inline void check_request_bounds(const RopeParams& params) {
  const cpu::IndexArray indptr = {params.indptr, params.indptr_is_int64};
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

// q, k, q_out, k_out [num_tokens, num_heads, head_dim]; pos_ids [num_tokens], or indptr
// [num_requests + 1] and offsets [num_requests].
template <class T>
void rope(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
          Optional<TensorView> pos_ids, Optional<TensorView> indptr, Optional<TensorView> offsets,
          int64_t rotary_dim, bool interleave, double rope_scale, double rope_theta,
          double smooth_slope, double smooth_offset, int64_t num_threads) {
  if (q.ndim() != 3 || k.ndim() != 3) {
    TVM_FFI_THROW(ValueError) << "q and k: rank must be 3, got " << q.ndim() << " and " << k.ndim();
  }
  RopeParams params = rope_params<T>(q, k, q_out, k_out, q.size(2), rotary_dim, interleave);
  if (!(rope_scale > 0) || !(rope_theta > 0)) {
    TVM_FFI_THROW(ValueError) << "rope_scale and rope_theta: must be above 0, got " << rope_scale
                              << " and " << rope_theta;
  }
  if (pos_ids.has_value()) {
    params.pos_ids_is_int64 =
        check_index_tensor("pos_ids", pos_ids.value(), params.num_tokens, kCpu);
    params.pos_ids = pos_ids.value().data_ptr();
  } else {
    if (!indptr.has_value() || !offsets.has_value()) {
      TVM_FFI_THROW(ValueError) << "pos_ids, or both indptr and offsets, must be given";
    }
    params.indptr_is_int64 = check_index_tensor("indptr", indptr.value(), kAnySize, kCpu);
    const int64_t num_requests = indptr.value().size(0) - 1;
    if (num_requests < 0) {
      TVM_FFI_THROW(ValueError) << "indptr: shape must be [num_requests + 1], got [0]";
    }
    params.offsets_is_int64 = check_index_tensor("offsets", offsets.value(), num_requests, kCpu);
    params.indptr = indptr.value().data_ptr();
    params.offsets = offsets.value().data_ptr();
    params.num_requests = static_cast<int32_t>(num_requests);
    check_request_bounds(params);
  }
  params.rope_scale = static_cast<float>(rope_scale);
  params.rope_theta = static_cast<float>(rope_theta);
  params.smooth_slope = static_cast<float>(smooth_slope);
  params.smooth_offset = static_cast<float>(smooth_offset);

  cpu::rope<T>(params, static_cast<int>(num_threads));
}

// q, k, q_out, k_out of rank 2, [num_tokens, num_heads * head_dim], or 3; positions [num_tokens];
// cos_sin_cache float32 [max_position, rotary_dim].
template <class T>
void rope_cos_sin(TensorView q, TensorView k, TensorView q_out, TensorView k_out,
                  TensorView positions, TensorView cos_sin_cache, int64_t head_dim, bool interleave,
                  int64_t num_threads) {
  check_tensor("cos_sin_cache", cos_sin_cache, kDtypeOf<float>, {kAnySize, kAnySize}, kCpu);
  if (head_dim < 1) {
    TVM_FFI_THROW(ValueError) << "head_size: must be at least 1, got " << head_dim;
  }
  RopeParams params =
      rope_params<T>(q, k, q_out, k_out, head_dim, cos_sin_cache.size(1), interleave);
  params.pos_ids_is_int64 = check_index_tensor("positions", positions, params.num_tokens, kCpu);
  params.pos_ids = positions.data_ptr();
  const cpu::IndexArray ids = {params.pos_ids, params.pos_ids_is_int64};
  const int64_t max_position = cos_sin_cache.size(0);
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= max_position) {
      TVM_FFI_THROW(ValueError) << "positions: must be in [0, " << max_position
                                << "), the rows of cos_sin_cache, got positions[" << t
                                << "] = " << ids[t];
    }
  }
  params.cos_sin = static_cast<const float*>(cos_sin_cache.data_ptr());
  params.cos_sin_stride = cos_sin_cache.stride(0);

  cpu::rope<T>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
