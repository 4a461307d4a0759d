// What the rope bindings of all targets share: the checks of everything that is not data, and the
// params made from their arguments.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/rope/rope_params.h>

#include <cmath>

namespace fi::bindings {

// The heads of a tensor [num_tokens, num_heads, head_dim] or [num_tokens, num_heads * head_dim].
struct Heads {
  int64_t num_tokens;
  int32_t num_heads;
  RopeStrides strides;
};

inline Heads check_heads(const char* name, const TensorView& tensor, DLDataType dtype,
                         int64_t head_dim, DLDevice device) {
  if (tensor.ndim() == 2) {
    check_tensor(name, tensor, dtype, {kAnySize, kAnySize}, device);
    if (tensor.size(1) % head_dim != 0) {
      TVM_FFI_THROW(ValueError) << name << ": the last dimension must be a multiple of head_size "
                                << head_dim << ", got " << tensor.size(1);
    }
    return {tensor.size(0),
            static_cast<int32_t>(tensor.size(1) / head_dim),
            {tensor.stride(0), head_dim}};
  }
  check_tensor(name, tensor, dtype, {kAnySize, kAnySize, head_dim}, device);
  return {
      tensor.size(0), static_cast<int32_t>(tensor.size(1)), {tensor.stride(0), tensor.stride(1)}};
}

inline void check_head_ranks(const TensorView& q, const TensorView& k) {
  if (q.ndim() != 3 || k.ndim() != 3) {
    TVM_FFI_THROW(ValueError) << "q and k: rank must be 3, got " << q.ndim() << " and " << k.ndim();
  }
}

// What is rotated: tensors of rank 2 or 3 as check_heads takes them.
struct RopeArguments {
  TensorView q;
  TensorView k;
  TensorView q_out;
  TensorView k_out;
};

// Check and fill in what every form of rope has.
inline RopeParams checked_rope_params(const RopeArguments& a, DLDataType dtype, int64_t head_dim,
                                      int64_t rotary_dim, bool interleave, DLDevice device) {
  const Heads q = check_heads("q", a.q, dtype, head_dim, device);
  const Heads k = check_heads("k", a.k, dtype, head_dim, device);
  const Heads q_out = check_heads("q_out", a.q_out, dtype, head_dim, device);
  const Heads k_out = check_heads("k_out", a.k_out, dtype, head_dim, device);
  check_written("q_out", a.q_out);
  check_written("k_out", a.k_out);
  if (k.num_tokens != q.num_tokens) {
    TVM_FFI_THROW(ValueError) << "k: must have as many tokens as q, " << q.num_tokens << ", got "
                              << k.num_tokens;
  }
  if (q_out.num_tokens != q.num_tokens || q_out.num_heads != q.num_heads ||
      k_out.num_tokens != k.num_tokens || k_out.num_heads != k.num_heads) {
    TVM_FFI_THROW(ValueError) << "q_out and k_out: shapes must be those of q and k, got "
                              << shape_text(a.q_out.shape().data(), a.q_out.shape().size())
                              << " and "
                              << shape_text(a.k_out.shape().data(), a.k_out.shape().size());
  }
  const int64_t longest = head_dim < kMaxRotaryDim ? head_dim : kMaxRotaryDim;
  if (rotary_dim < 2 || rotary_dim > longest || rotary_dim % 2 != 0) {
    TVM_FFI_THROW(ValueError) << "rotary_dim: must be even and in [2, " << longest << "], got "
                              << rotary_dim;
  }

  RopeParams params = {};
  params.q = a.q.data_ptr();
  params.k = a.k.data_ptr();
  params.q_out = a.q_out.data_ptr();
  params.k_out = a.k_out.data_ptr();
  params.q_strides = q.strides;
  params.k_strides = k.strides;
  params.q_out_strides = q_out.strides;
  params.k_out_strides = k_out.strides;
  params.num_tokens = q.num_tokens;
  params.num_qo_heads = q.num_heads;
  params.num_kv_heads = k.num_heads;
  params.head_dim = static_cast<int32_t>(head_dim);
  params.rotary_dim = static_cast<int32_t>(rotary_dim);
  params.interleave = interleave;
  return params;
}

// pos_ids [num_tokens], or both indptr [num_requests + 1] and offsets [num_requests].
inline void set_positions(RopeParams& params, const Optional<TensorView>& pos_ids,
                          const Optional<TensorView>& indptr, const Optional<TensorView>& offsets,
                          DLDevice device) {
  if (pos_ids.has_value()) {
    params.pos_ids_is_int64 =
        check_index_tensor("pos_ids", pos_ids.value(), params.num_tokens, device);
    params.pos_ids = pos_ids.value().data_ptr();
    return;
  }
  if (!indptr.has_value() || !offsets.has_value()) {
    TVM_FFI_THROW(ValueError) << "pos_ids, or both indptr and offsets, must be given";
  }
  params.indptr_is_int64 = check_index_tensor("indptr", indptr.value(), kAnySize, device);
  const int64_t num_requests = indptr.value().size(0) - 1;
  if (num_requests < 0) {
    TVM_FFI_THROW(ValueError) << "indptr: shape must be [num_requests + 1], got [0]";
  }
  params.offsets_is_int64 = check_index_tensor("offsets", offsets.value(), num_requests, device);
  params.indptr = indptr.value().data_ptr();
  params.offsets = offsets.value().data_ptr();
  params.num_requests = static_cast<int32_t>(num_requests);
}

inline void set_frequencies(RopeParams& params, double rope_scale, double rope_theta,
                            double smooth_slope, double smooth_offset) {
  if (!(rope_scale > 0) || !(rope_theta > 0)) {
    TVM_FFI_THROW(ValueError) << "rope_scale and rope_theta: must be above 0, got " << rope_scale
                              << " and " << rope_theta;
  }
  params.log2_theta = std::log2(rope_theta);
  params.rope_scale = static_cast<float>(rope_scale);
  params.smooth_slope = static_cast<float>(smooth_slope);
  params.smooth_offset = static_cast<float>(smooth_offset);
}

// cos_sin_cache `dtype` [max_position, rotary_dim]; head_dim is an argument of its own.
inline void check_cos_sin(const TensorView& cos_sin_cache, DLDataType dtype, int64_t head_dim,
                          DLDevice device) {
  check_tensor("cos_sin_cache", cos_sin_cache, dtype, {kAnySize, kAnySize}, device);
  if (head_dim < 1) {
    TVM_FFI_THROW(ValueError) << "head_size: must be at least 1, got " << head_dim;
  }
}

// positions [num_tokens]; the cache as check_cos_sin takes it.
inline void set_cos_sin(RopeParams& params, const TensorView& positions,
                        const TensorView& cos_sin_cache, DLDevice device) {
  params.pos_ids_is_int64 = check_index_tensor("positions", positions, params.num_tokens, device);
  params.pos_ids = positions.data_ptr();
  params.cos_sin = cos_sin_cache.data_ptr();
  params.cos_sin_is_float = cos_sin_cache.dtype() == kDtypeOf<float>;
  params.cos_sin_stride = cos_sin_cache.stride(0);
  params.max_position = cos_sin_cache.size(0);
}

}  // namespace fi::bindings
