// Gated activations of rows on the CPU, in float arithmetic for every storage type.
#pragma once

#include "fi_backend/activation/activation_params.h"
#include "fi_backend/activation/cpu/gates.h"
#include "fi_backend/cpu/rows.h"

namespace fi::cpu {

template <class T, class Gate>
void gate_and_mul(const GatedActivationParams& p, int num_threads) {
  const int64_t size = p.hidden_size;
  for_each_row(p.num_outer, p.num_inner, size * int64_t{3 * sizeof(T)}, num_threads,
               [&](int64_t outer, int64_t inner) {
                 const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer +
                              inner * p.input_strides.inner;
                 const T* factor = x + size;
                 T* out = static_cast<T*>(p.out) + outer * p.out_strides.outer +
                          inner * p.out_strides.inner;
                 for_each_vector(size, [=](int64_t i, auto io) {
                   io.write(out + i, Gate{}(io.read(x + i)) * io.read(factor + i));
                 });
               });
}

}  // namespace fi::cpu
