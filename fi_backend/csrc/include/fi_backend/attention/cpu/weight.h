// 2^x for softmax weights: x <= 0 up to rounding, and 0 where x is -inf or the result is subnormal.
#pragma once

#include <fi_backend/cpu/simd.h>

namespace fi::cpu {

// Minimax in relative error over [-0.5, 0.5] with p(0) = 1: to 3e-9.
inline VecF weight_exp2(VecF x) {
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
  const VecF shifted = x + kRoundToInteger;
  const VecF f = x - (shifted - kRoundToInteger);
  VecF p = broadcast(1.5594681303e-4f);
  p = fma(p, f, broadcast(1.3406643715e-3f));
  p = fma(p, f, broadcast(9.6176929597e-3f));
  p = fma(p, f, broadcast(5.5503105516e-2f));
  p = fma(p, f, broadcast(2.4022652783e-1f));
  p = fma(p, f, broadcast(6.9314721497e-1f));
  p = fma(p, f, broadcast(1.0f));
  // The integer is in the low bits of shifted: add it to the exponent field of p.
  const VecF result = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return select(x < -126.0f, VecF{}, result);
}

}  // namespace fi::cpu
