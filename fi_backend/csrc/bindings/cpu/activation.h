// Binding of the gated activation kernels: validate, params, run.
#pragma once

#include <bindings/activation_checks.h>
#include <fi_backend/activation/cpu/activation.h>

namespace fi::bindings {

template <class T, class Gate>
void gate_and_mul(const TensorView& input, const TensorView& out, int64_t num_threads) {
  const GatedActivationParams params = checked_activation_params<T>(input, out, kCpu);
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
