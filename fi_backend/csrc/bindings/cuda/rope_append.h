// Bindings of the fused rope and append: validate, device and stream, params, launch.
#pragma once

#include <bindings/append_checks.h>
#include <bindings/cuda/launch.h>
#include <bindings/rope_checks.h>
#include <fi_backend/rope/rope_append_launch.h>

namespace fi::bindings {

// What both forms take. q, q_out [num_tokens, num_qo_heads, head_dim]; key, value and the caches as
// checked_append_params takes them; pos_ids as set_cos_sin does; cos_sin_cache
// [max_position, rotary_dim], float or the dtype of q; q_weight, k_weight [head_dim].
struct RopeAppendArguments {
  TensorView q;
  TensorView q_out;
  TensorView pos_ids;
  TensorView cos_sin_cache;
  bool interleave;
  Optional<TensorView> q_weight;
  Optional<TensorView> k_weight;
  double eps;
  double weight_bias;
  AppendArguments append;
};

inline void check_weight(const char* name, const Optional<TensorView>& weight, DLDataType dtype,
                         int64_t head_dim, DLDevice device) {
  if (weight.has_value()) check_tensor(name, weight.value(), dtype, {head_dim}, device);
}

inline RopeAppendParams checked_rope_append_params(const RopeAppendArguments& a, DLDataType dtype,
                                                   DLDataType cache_dtype, bool enable_pdl) {
  check_cuda("q", a.q);
  const DLDevice device = a.q.device();
  const TensorView& key = a.append.key;
  RopeAppendParams params = {};
  params.append = checked_append_params(a.append, dtype, cache_dtype, device);
  check_head_ranks(a.q, key);
  const int64_t head_dim = a.q.size(2);
  const int64_t longest = std::max<int64_t>(head_dim, params.append.head_dim_vo);
  if (longest < 1 || longest > kMaxRopeAppendHeadDim) {
    TVM_FFI_THROW(ValueError) << "q and value: head_dim must be in [1, " << kMaxRopeAppendHeadDim
                              << "], got " << longest << "; call rope and append one by one";
  }
  const DLDataType angle_dtype = a.cos_sin_cache.dtype();
  if (angle_dtype != kDtypeOf<float> && angle_dtype != dtype) {
    TVM_FFI_THROW(TypeError) << "cos_sin_cache: dtype must be float32 or that of q, "
                             << tvm::ffi::DLDataTypeToString(dtype) << ", got "
                             << tvm::ffi::DLDataTypeToString(angle_dtype);
  }
  check_cos_sin(a.cos_sin_cache, angle_dtype, head_dim, device);
  params.rope = checked_rope_params({a.q, key, a.q_out, key}, dtype, head_dim,
                                    a.cos_sin_cache.size(1), a.interleave, device);
  set_cos_sin(params.rope, a.pos_ids, a.cos_sin_cache, device);
  check_weight("q_weight", a.q_weight, dtype, head_dim, device);
  check_weight("k_weight", a.k_weight, dtype, head_dim, device);
  params.q_weight = data_or_null<void>(a.q_weight);
  params.k_weight = data_or_null<void>(a.k_weight);
  params.eps = static_cast<float>(a.eps);
  params.weight_bias = static_cast<float>(a.weight_bias);
  params.rope.enable_pdl = enable_pdl;
  return params;
}

inline void run_rope_append(const RopeAppendParams& params, DLDevice device) {
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("rope_append", launch_rope_append(params, current_stream(device)));
}

// See set_slots.
template <class Types>
void rope_append_slots(TensorView q, TensorView key, TensorView value, TensorView q_out,
                       TensorView pos_ids, TensorView cos_sin_cache, TensorView key_cache,
                       TensorView value_cache, TensorView slot_mapping, bool interleave,
                       Optional<TensorView> q_weight, Optional<TensorView> k_weight, double eps,
                       double weight_bias, Optional<TensorView> k_scale,
                       Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                       bool enable_pdl) {
  RopeAppendParams params = checked_rope_append_params(
      {q,
       q_out,
       pos_ids,
       cos_sin_cache,
       interleave,
       q_weight,
       k_weight,
       eps,
       weight_bias,
       {key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value, v_scale_value}},
      kDtypeOf<typename Types::In>, kDtypeOf<typename Types::Cache>, enable_pdl);
  set_slots(params.append, key, slot_mapping);
  run_rope_append(params, q.device());
}

// See set_positions of the append.
template <class Types>
void rope_append_positions(TensorView q, TensorView key, TensorView value, TensorView q_out,
                           TensorView pos_ids, TensorView cos_sin_cache, TensorView key_cache,
                           TensorView value_cache, TensorView batch_indices, TensorView positions,
                           TensorView kv_indices, TensorView kv_indptr, bool interleave,
                           Optional<TensorView> q_weight, Optional<TensorView> k_weight, double eps,
                           double weight_bias, Optional<TensorView> k_scale,
                           Optional<TensorView> v_scale, double k_scale_value, double v_scale_value,
                           bool enable_pdl) {
  RopeAppendParams params = checked_rope_append_params(
      {q,
       q_out,
       pos_ids,
       cos_sin_cache,
       interleave,
       q_weight,
       k_weight,
       eps,
       weight_bias,
       {key, value, key_cache, value_cache, k_scale, v_scale, k_scale_value, v_scale_value}},
      kDtypeOf<typename Types::In>, kDtypeOf<typename Types::Cache>, enable_pdl);
  set_positions(params.append, key, batch_indices, positions, kv_indices, kv_indptr);
  run_rope_append(params, q.device());
}

}  // namespace fi::bindings
