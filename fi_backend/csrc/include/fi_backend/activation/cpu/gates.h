// The gates of gated activations: SiLU, GELU and its tanh approximation, on float vectors.
//
// All three are x * sigmoid-like(x), written so that large |x| neither overflows nor cancels; an
// infinity or NaN gives what the textbook formula gives.
#pragma once

#include "fi_backend/activation/gelu_tail.h"
#include "fi_backend/cpu/simd.h"

namespace fi::cpu {

// e^x to about 1 ulp, where exp(x) of simd.h loses |x| / 4 ulp by rounding x * log2(e).
// Below 2^-126 it is 0, above 2^127.5 infinity.
inline VecF precise_exp(VecF x) {
  x = x < -88.0f ? broadcast(-88.0f) : x;
  x = x > 89.0f ? broadcast(89.0f) : x;
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
  const VecF shifted = fma(x, broadcast(1.44269504088896341f), broadcast(kRoundToInteger));
  const VecF n = shifted - kRoundToInteger;
  // x - n * ln(2) in two steps; the first constant has few bits, so its product with n is exact.
  VecF f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  VecF p = broadcast(1.0f / 5040.0f);
  p = fma(p, f, broadcast(1.0f / 720.0f));
  p = fma(p, f, broadcast(1.0f / 120.0f));
  p = fma(p, f, broadcast(1.0f / 24.0f));
  p = fma(p, f, broadcast(1.0f / 6.0f));
  p = fma(p, f, broadcast(0.5f));
  p = fma(p, f, broadcast(1.0f));
  p = fma(p, f, broadcast(1.0f));
  // The integer sits in the low mantissa bits of shifted; move it to the exponent field.
  const VecU exponent = (as_bits(shifted) - (0x4b400000u - 127u)) << 23;
  return p * as_float(exponent);
}

struct Silu {
  VecF operator()(VecF x) const { return x / (1.0f + precise_exp(-x)); }
};

// x * Phi(x).
struct Gelu {
  VecF operator()(VecF x) const {
    const VecF u = 1.0f / fma(abs(x), broadcast(GeluTail::kScale), broadcast(1.0f));
    VecF p = broadcast(GeluTail::kP7);
    p = fma(p, u, broadcast(GeluTail::kP6));
    p = fma(p, u, broadcast(GeluTail::kP5));
    p = fma(p, u, broadcast(GeluTail::kP4));
    p = fma(p, u, broadcast(GeluTail::kP3));
    p = fma(p, u, broadcast(GeluTail::kP2));
    p = fma(p, u, broadcast(GeluTail::kP1));
    p = fma(p, u, broadcast(GeluTail::kP0));
    const VecF tail = 0.5f * u * p * precise_exp(-0.5f * x * x);
    return x * select(x < 0.0f, tail, 1.0f - tail);
  }
};

// x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
struct GeluTanh {
  VecF operator()(VecF x) const {
    constexpr float kMinusTwoRootTwoOverPi = -1.5957691216f;
    const VecF u = kMinusTwoRootTwoOverPi * fma(x * x * x, broadcast(0.044715f), x);
    return x / (1.0f + precise_exp(u));
  }
};

}  // namespace fi::cpu
