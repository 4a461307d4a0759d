// The gates of gated activations: SiLU, GELU and its tanh approximation.
//
// All three are x * sigmoid-like(x), written so that large |x| neither overflows nor cancels; an
// infinity or NaN gives what the textbook formula gives.
//
// T stores the result. Rows of 16-bit values leave time for about 40 instructions a value while
// they move, and their rounding hides an error of 1e-5: they take single-instruction
// approximations.
#pragma once

#include <fi_backend/activation/gelu_tail.h>

#include <fi_backend/common/dtypes.cuh>
#include <fi_backend/ptx/math.cuh>

namespace fi {

template <class T>
__device__ __forceinline__ float gate_exp(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  if constexpr (kIs16BitFloat<T>) return ptx::exp2_approx(x * kLog2e);
  return expf(x);
}

template <class T>
__device__ __forceinline__ float gate_reciprocal(float x) {
  if constexpr (kIs16BitFloat<T>) return ptx::reciprocal_approx(x);
  return 1.f / x;
}

template <class T>
struct Silu {
  __device__ __forceinline__ float operator()(float x) const {
    return x * gate_reciprocal<T>(1.f + gate_exp<T>(-x));
  }
};

// x * Phi(x).
template <class T>
struct Gelu {
  __device__ __forceinline__ float operator()(float x) const {
    const float u = gate_reciprocal<T>(fmaf(fabsf(x), GeluTail::kScale, 1.f));
    float p = GeluTail::kP7;
    p = fmaf(p, u, GeluTail::kP6);
    p = fmaf(p, u, GeluTail::kP5);
    p = fmaf(p, u, GeluTail::kP4);
    p = fmaf(p, u, GeluTail::kP3);
    p = fmaf(p, u, GeluTail::kP2);
    p = fmaf(p, u, GeluTail::kP1);
    p = fmaf(p, u, GeluTail::kP0);
    const float tail = 0.5f * u * p * gate_exp<T>(-0.5f * x * x);
    return x * (x < 0.f ? tail : 1.f - tail);
  }
};

// x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
template <class T>
struct GeluTanh {
  __device__ __forceinline__ float operator()(float x) const {
    constexpr float kMinusTwoRootTwoOverPi = -1.5957691216f;
    const float minus_2u = kMinusTwoRootTwoOverPi * fmaf(x * x * x, 0.044715f, x);
    return x * gate_reciprocal<T>(1.f + gate_exp<T>(minus_2u));
  }
};

}  // namespace fi
