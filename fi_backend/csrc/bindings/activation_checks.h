// What the activation bindings of all targets share: the checks and the params made from them.
#pragma once

#include <bindings/rows.h>
#include <fi_backend/activation/activation_params.h>

namespace fi::bindings {

// input [.., 2 * hidden_size], out [.., hidden_size], of rank 1 to 3.
template <class T>
GatedActivationParams checked_activation_params(const TensorView& input, const TensorView& out,
                                                DLDevice device) {
  const Rows rows = check_rows("input", input, kDtypeOf<T>, device);
  if (rows.size % 2 != 0) {
    TVM_FFI_THROW(ValueError) << "input: the last dimension must be even (gate and factor), got "
                              << rows.size;
  }
  check_like("out", out, kDtypeOf<T>, input, rows.size / 2);
  check_written("out", out);

  GatedActivationParams params = {};
  params.input = input.data_ptr();
  params.out = out.data_ptr();
  params.input_strides = row_strides<GatedActivationParams::Strides>(input);
  params.out_strides = row_strides<GatedActivationParams::Strides>(out);
  params.num_outer = rows.num_outer;
  params.num_inner = rows.num_inner;
  params.hidden_size = rows.size / 2;
  return params;
}

}  // namespace fi::bindings
