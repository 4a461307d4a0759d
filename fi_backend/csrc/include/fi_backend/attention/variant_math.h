// Fast arithmetic for the functions of attention variants: single instructions of a GPU, or code
// that a compiler turns into vectors on a CPU. Relative errors are about 2^-22; that of fast_exp
// grows with |x| beyond 1, in proportion.
#pragma once

#include <fi_backend/common/macros.h>

#if defined(__CUDACC__)
#include <fi_backend/ptx/math.cuh>
#else
#include <cmath>
#include <cstring>
#endif

namespace fi::variants {

// 2^x; 0 below 2^-126, and at least 2^127 beyond that.
FI_HOST_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  return ptx::exp2_approx(x);
#elif defined(__CUDACC__)
  return x;  // host code of nvcc never computes
#else
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
  const float inside = x < -126.0f ? -126.0f : x > 127.0f ? 127.0f : x;
  const float shifted = inside + kRoundToInteger;
  const float f = inside - (shifted - kRoundToInteger);  // in [-0.5, 0.5]
  float p = 1.5594681303e-4f;
  p = p * f + 1.3406643715e-3f;
  p = p * f + 9.6176929597e-3f;
  p = p * f + 5.5503105516e-2f;
  p = p * f + 2.4022652783e-1f;
  p = p * f + 6.9314721497e-1f;
  p = p * f + 1.0f;
  // The integer is in the low bits of shifted: add it to the exponent field of p.
  uint32_t bits, integer;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&integer, &shifted, sizeof(integer));
  bits += integer << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return x < -126.0f ? 0.0f : p;
#endif
}

FI_HOST_DEVICE float fast_exp(float x) { return fast_exp2(x * 1.44269504088896341f); }

// 1 / x; 0 where x is infinite.
FI_HOST_DEVICE float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return ptx::reciprocal_approx(x);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x).
FI_HOST_DEVICE float fast_sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }

}  // namespace fi::variants
