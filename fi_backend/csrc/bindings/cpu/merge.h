// Bindings of the merge kernels: validate, params, run.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/cpu/merge.h>

namespace fi::bindings {

// Element strides of v [.., num_heads, head_dim] and lse [.., num_heads], rows first.
inline StateStrides state_strides(const TensorView& v, const Optional<TensorView>& lse) {
  StateStrides strides = {v.stride(0), v.stride(-2), 0, 0};
  if (lse.has_value()) {
    strides.lse_row = lse.value().stride(0);
    strides.lse_head = lse.value().stride(-1);
  }
  return strides;
}

// v_* [num_rows, num_heads, head_dim], lse_* f32 [num_rows, num_heads], mask bool [num_rows].
template <class In, class Out>
void merge_pair(TensorView v_a, TensorView lse_a, TensorView v_b, TensorView lse_b,
                TensorView v_out, Optional<TensorView> lse_out, Optional<TensorView> mask,
                int64_t num_threads) {
  const DLDevice device = {kDLCPU, 0};
  check_tensor("v_a", v_a, kDtypeOf<In>, {kAnySize, kAnySize, kAnySize}, device);
  const int64_t rows = v_a.size(0), heads = v_a.size(1), dim = v_a.size(2);
  check_tensor("v_b", v_b, kDtypeOf<In>, {rows, heads, dim}, device);
  check_tensor("v_out", v_out, kDtypeOf<Out>, {rows, heads, dim}, device);
  check_tensor("lse_a", lse_a, kDtypeOf<float>, {rows, heads}, device);
  check_tensor("lse_b", lse_b, kDtypeOf<float>, {rows, heads}, device);
  if (lse_out.has_value()) {
    check_tensor("lse_out", lse_out.value(), kDtypeOf<float>, {rows, heads}, device);
  }
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

  cpu::merge_pair<In, Out>(params, static_cast<int>(num_threads));
}

// v [num_rows, num_states, num_heads, head_dim], lse f32 [num_rows, num_states, num_heads],
// v_out [num_rows, num_heads, head_dim], lse_out f32 [num_rows, num_heads].
template <class In, class Out>
void merge_states(TensorView v, TensorView lse, TensorView v_out, Optional<TensorView> lse_out,
                  int64_t num_threads) {
  const DLDevice device = {kDLCPU, 0};
  check_tensor("v", v, kDtypeOf<In>, {kAnySize, kAnySize, kAnySize, kAnySize}, device);
  const int64_t rows = v.size(0), states = v.size(1), heads = v.size(2), dim = v.size(3);
  check_tensor("lse", lse, kDtypeOf<float>, {rows, states, heads}, device);
  check_tensor("v_out", v_out, kDtypeOf<Out>, {rows, heads, dim}, device);
  if (lse_out.has_value()) {
    check_tensor("lse_out", lse_out.value(), kDtypeOf<float>, {rows, heads}, device);
  }

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

  cpu::merge_states<In, Out>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
