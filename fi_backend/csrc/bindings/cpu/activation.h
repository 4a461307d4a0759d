// Binding of the gated activation kernels: validate, params, run.
#pragma once

#include <bindings/cpu/rows.h>
#include <fi_backend/activation/cpu/activation.h>

namespace fi::bindings {

// input [.., 2 * hidden_size], out [.., hidden_size], of rank 1 to 3.
template <class T, class Gate>
void gate_and_mul(TensorView input, TensorView out, int64_t num_threads) {
  const Rows rows = check_rows("input", input, kDtypeOf<T>);
  if (rows.size % 2 != 0) {
    TVM_FFI_THROW(ValueError) << "input: the last dimension must be even (gate and factor), got "
                              << rows.size;
  }
  check_like("out", out, kDtypeOf<T>, input, rows.size / 2);

  GatedActivationParams params = {};
  params.input = input.data_ptr();
  params.out = out.data_ptr();
  params.input_strides = row_strides<GatedActivationParams::Strides>(input);
  params.out_strides = row_strides<GatedActivationParams::Strides>(out);
  params.num_outer = rows.num_outer;
  params.num_inner = rows.num_inner;
  params.hidden_size = rows.size / 2;

  cpu::gate_and_mul<T, Gate>(params, static_cast<int>(num_threads));
}

template <class T>
void silu_and_mul(TensorView input, TensorView out, int64_t num_threads) {
  gate_and_mul<T, cpu::Silu>(input, out, num_threads);
}

template <class T>
void gelu_and_mul(TensorView input, TensorView out, int64_t num_threads) {
  gate_and_mul<T, cpu::Gelu>(input, out, num_threads);
}

template <class T>
void gelu_tanh_and_mul(TensorView input, TensorView out, int64_t num_threads) {
  gate_and_mul<T, cpu::GeluTanh>(input, out, num_threads);
}

}  // namespace fi::bindings
