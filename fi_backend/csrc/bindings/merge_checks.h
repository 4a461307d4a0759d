// What the merge bindings of all targets share: the checks of their arguments, and the params made
// from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/merge_params.h>

namespace fi::bindings {

// Check a tensor of log-sum-exps where there is one: any strides, for kernels take them all.
inline void check_lse(const char* name, const Optional<TensorView>& lse,
                      std::initializer_list<int64_t> sizes, DLDevice device) {
  if (lse.has_value()) check_strided(name, lse.value(), kDtypeOf<float>, sizes, device);
}

inline void check_head_dim(const char* name, int64_t head_dim) {
  if (head_dim < 1) {
    TVM_FFI_THROW(ValueError) << name << ": head_dim must be at least 1, got " << head_dim;
  }
}

// Element strides of v [.., num_heads, head_dim] and lse [.., num_heads], rows first.
inline StateStrides state_strides(const TensorView& v, const Optional<TensorView>& lse) {
  StateStrides strides = {v.stride(0), v.stride(-2), 0, 0};
  if (lse.has_value()) {
    strides.lse_row = lse.value().stride(0);
    strides.lse_head = lse.value().stride(-1);
  }
  return strides;
}

// In and Out are the host types of the values. v_* [num_rows, num_heads, head_dim], lse_* f32
// [num_rows, num_heads], mask bool [num_rows]. In place: v_out = v_a and lse_out = lse_a.
template <class In, class Out>
MergePairParams checked_pair_params(const TensorView& v_a, const TensorView& lse_a,
                                    const TensorView& v_b, const TensorView& lse_b,
                                    const TensorView& v_out, const Optional<TensorView>& lse_out,
                                    const Optional<TensorView>& mask, DLDevice device) {
  check_tensor("v_a", v_a, kDtypeOf<In>, {kAnySize, kAnySize, kAnySize}, device);
  const int64_t rows = v_a.size(0), heads = v_a.size(1), dim = v_a.size(2);
  check_head_dim("v_a", dim);
  check_tensor("v_b", v_b, kDtypeOf<In>, {rows, heads, dim}, device);
  check_tensor("v_out", v_out, kDtypeOf<Out>, {rows, heads, dim}, device);
  check_lse("lse_a", lse_a, {rows, heads}, device);
  check_lse("lse_b", lse_b, {rows, heads}, device);
  check_lse("lse_out", lse_out, {rows, heads}, device);
  check_written("v_out", v_out);
  check_written("lse_out", lse_out);
  if (mask.has_value()) check_tensor("mask", mask.value(), kDtypeOf<bool>, {rows}, device);

  MergePairParams params = {};
  params.v_a = v_a.data_ptr();
  params.v_b = v_b.data_ptr();
  params.lse_a = static_cast<const float*>(lse_a.data_ptr());
  params.lse_b = static_cast<const float*>(lse_b.data_ptr());
  params.v_out = v_out.data_ptr();
  params.lse_out = data_or_null<float>(lse_out);
  params.mask = data_or_null<const uint8_t>(mask);
  params.a_strides = state_strides(v_a, lse_a);
  params.b_strides = state_strides(v_b, lse_b);
  params.out_strides = state_strides(v_out, lse_out);
  params.num_rows = rows;
  params.num_heads = static_cast<int32_t>(heads);
  params.head_dim = static_cast<int32_t>(dim);
  return params;
}

// v [num_rows, num_states, num_heads, head_dim], lse f32 [num_rows, num_states, num_heads],
// v_out [num_rows, num_heads, head_dim], lse_out f32 [num_rows, num_heads].
template <class In, class Out>
MergeStatesParams checked_states_params(const TensorView& v, const TensorView& lse,
                                        const TensorView& v_out,
                                        const Optional<TensorView>& lse_out, DLDevice device) {
  check_tensor("v", v, kDtypeOf<In>, {kAnySize, kAnySize, kAnySize, kAnySize}, device);
  const int64_t rows = v.size(0), states = v.size(1), heads = v.size(2), dim = v.size(3);
  check_head_dim("v", dim);
  check_lse("lse", lse, {rows, states, heads}, device);
  check_tensor("v_out", v_out, kDtypeOf<Out>, {rows, heads, dim}, device);
  check_lse("lse_out", lse_out, {rows, heads}, device);
  check_written("v_out", v_out);
  check_written("lse_out", lse_out);

  MergeStatesParams params = {};
  params.v = v.data_ptr();
  params.lse = static_cast<const float*>(lse.data_ptr());
  params.v_out = v_out.data_ptr();
  params.lse_out = data_or_null<float>(lse_out);
  params.in_strides = state_strides(v, lse);
  params.v_state_stride = v.stride(1);
  params.lse_state_stride = lse.stride(1);
  params.out_strides = state_strides(v_out, lse_out);
  params.num_rows = rows;
  params.num_states = static_cast<int32_t>(states);
  params.num_heads = static_cast<int32_t>(heads);
  params.head_dim = static_cast<int32_t>(dim);
  return params;
}

}  // namespace fi::bindings
