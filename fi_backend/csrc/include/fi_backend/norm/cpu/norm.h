// Normalisation of rows on the CPU, in float arithmetic for every storage type.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "fi_backend/cpu/rows.h"
#include "fi_backend/norm/norm_params.h"

namespace fi::cpu {

// Floats that this thread keeps between calls, so that only a longer row than ever allocates.
inline float* scratch_row(int64_t size) {
  thread_local std::vector<float> row;
  if (static_cast<int64_t>(row.size()) < size) row.resize(size);
  return row.data();
}

// Out's value of v: a quantised type holds it over `scale`.
template <class Out>
inline VecF scaled_for(VecF v, float scale) {
  return sizeof(Out) == 1 ? v / scale : v;
}

// A row is read twice, the second time from the cache. With a residual the second pass reads the
// unrounded sums: the residual itself where it is stored as float, else a scratch row.
template <class T, class Out>
void rmsnorm(const RmsNormParams& p, int num_threads) {
  const T* weight = static_cast<const T*>(p.weight);
  const float quant_scale = p.quant_scale != nullptr ? *p.quant_scale : p.quant_scale_value;
  const VecF bias = broadcast(p.weight_bias);
  const int64_t size = p.hidden_size;
  const int64_t bytes_per_row = size * int64_t{sizeof(T)} * (p.residual != nullptr ? 4 : 2);
  const auto inverse_rms = [&](float sum_of_squares) {
    return broadcast(1.0f / std::sqrt(sum_of_squares / static_cast<float>(size) + p.eps));
  };
  for_each_row(
      p.num_outer, p.num_inner, bytes_per_row, num_threads, [&](int64_t outer, int64_t inner) {
        const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer +
                     inner * p.input_strides.inner;
        Out* out =
            static_cast<Out*>(p.out) + outer * p.out_strides.outer + inner * p.out_strides.inner;
        if (p.residual == nullptr) {
          const VecF scale = inverse_rms(sum_row(size, [=](int64_t i, auto io) {
            const VecF v = io.read(x + i);
            return v * v;
          }));
          for_each_vector(size, [=](int64_t i, auto io) {
            const VecF v = io.read(x + i) * scale * (io.read(weight + i) + bias);
            io.write(out + i, scaled_for<Out>(v, quant_scale));
          });
          return;
        }
        T* residual = static_cast<T*>(p.residual) + outer * p.residual_strides.outer +
                      inner * p.residual_strides.inner;
        float* sums;
        if constexpr (std::is_same_v<T, float>) {
          sums = residual;
        } else {
          sums = scratch_row(size);
        }
        const VecF scale = inverse_rms(sum_row(size, [=](int64_t i, auto io) {
          const VecF v = io.read(x + i) + io.read(residual + i);
          io.write(residual + i, v);
          if constexpr (!std::is_same_v<T, float>) io.write(sums + i, v);
          return v * v;
        }));
        for_each_vector(size, [=](int64_t i, auto io) {
          const VecF v = io.read(sums + i) * scale * (io.read(weight + i) + bias);
          io.write(out + i, scaled_for<Out>(v, quant_scale));
        });
      });
}

// The variance is that of the centred row: E[x^2] - E[x]^2 would cancel.
template <class T, class Out>
void layernorm(const LayerNormParams& p, int num_threads) {
  const float *gamma = p.gamma, *beta = p.beta;
  const float quant_scale = p.quant_scale != nullptr ? *p.quant_scale : p.quant_scale_value;
  const int64_t size = p.hidden_size;
  const float inverse_size = 1.0f / static_cast<float>(size);
  for_each_row(
      p.num_outer, p.num_inner, size * int64_t{2 * sizeof(T)}, num_threads,
      [&](int64_t outer, int64_t inner) {
        const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer +
                     inner * p.input_strides.inner;
        Out* out =
            static_cast<Out*>(p.out) + outer * p.out_strides.outer + inner * p.out_strides.inner;
        const VecF mean = broadcast(
            inverse_size * sum_row(size, [=](int64_t i, auto io) { return io.read(x + i); }));
        const float variance = inverse_size * sum_row(size, [=](int64_t i, auto io) {
                                 const VecF centred = io.read(x + i) - mean;
                                 return centred * centred;
                               });
        const VecF scale = broadcast(1.0f / std::sqrt(variance + p.eps));
        for_each_vector(size, [=](int64_t i, auto io) {
          const VecF v = (io.read(x + i) - mean) * scale * io.read(gamma + i) + io.read(beta + i);
          io.write(out + i, scaled_for<Out>(v, quant_scale));
        });
      });
}

}  // namespace fi::cpu
