// Rows of the cache as bf16, for machines that multiply pairs of bf16. Every value of the cache's
// types is exact in bf16.
#pragma once

#include <fi_backend/common/dtypes.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace fi::cpu {

constexpr int kBf16Lanes = 32;

// n <= kBf16Lanes values; lanes past n are zero.
inline __m512i load_bf16(const bf16* p, int n) {
  return _mm512_maskz_loadu_epi16(_cvtu32_mask32(0xffffffffu >> (kBf16Lanes - n)), p);
}

// An fp8 magnitude becomes bf16 by a shift and another exponent bias; but subnormals become normal,
// so they are looked up, and the largest codes are infinity or NaN: bits that are set besides.
inline __m512i widen_fp8(const void* p, int n, int shift, int bias, int num_subnormals,
                         __m512i subnormals, int first_special, int special) {
  const __mmask32 lanes = _cvtu32_mask32(0xffffffffu >> (kBf16Lanes - n));
  const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(lanes, p));
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
  __m512i bits = _mm512_add_epi16(_mm512_sll_epi16(magnitude, _mm_cvtsi32_si128(shift)),
                                  _mm512_set1_epi16(static_cast<short>(bias << 7)));
  const __mmask32 is_subnormal =
      _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(num_subnormals)));
  bits = _mm512_mask_permutexvar_epi16(bits, is_subnormal, magnitude, subnormals);
  const __mmask32 is_special =
      _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(first_special)));
  bits = _mm512_mask_blend_epi16(
      is_special, bits, _mm512_or_si512(bits, _mm512_set1_epi16(static_cast<short>(special))));
  const __m512i sign =
      _mm512_and_si512(_mm512_slli_epi16(x, 8), _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_or_si512(bits, sign);
}

inline __m512i load_bf16(const e4m3* p, int n) {
  // k * 2^-9 for k = 0..7.
  alignas(64) static constexpr uint16_t kSubnormals[32] = {0,      0x3b00, 0x3b80, 0x3bc0,
                                                           0x3c00, 0x3c20, 0x3c40, 0x3c60};
  return widen_fp8(p, n, 4, 127 - 7, 8, _mm512_load_si512(kSubnormals), 0x7f, 0x7fc0);
}
inline __m512i load_bf16(const e5m2* p, int n) {
  // k * 2^-16 for k = 0..3.
  alignas(64) static constexpr uint16_t kSubnormals[32] = {0, 0x3780, 0x3800, 0x3840};
  return widen_fp8(p, n, 5, 127 - 15, 4, _mm512_load_si512(kSubnormals), 0x7c, 0x7f80);
}

template <class Kv>
inline void convert_to_bf16(const Kv* row, int head_dim, bf16* out) {
  int d = 0;
  for (; d + kBf16Lanes <= head_dim; d += kBf16Lanes) {
    _mm512_storeu_si512(out + d, load_bf16(row + d, kBf16Lanes));
  }
  if (d < head_dim) {
    const __mmask32 lanes = _cvtu32_mask32(0xffffffffu >> (kBf16Lanes - (head_dim - d)));
    _mm512_mask_storeu_epi16(out + d, lanes, load_bf16(row + d, head_dim - d));
  }
}

// As convert_to_bf16, to float; out is written up to the next multiple of 16.
template <class Kv>
inline void widen_through_bf16(const Kv* row, int head_dim, float* out) {
  for (int d = 0; d < head_dim; d += kBf16Lanes) {
    const int n = head_dim - d < kBf16Lanes ? head_dim - d : kBf16Lanes;
    const __m512i values = load_bf16(row + d, n);
    const auto widen = [](__m256i half) {
      return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    };
    _mm512_storeu_si512(out + d, widen(_mm512_castsi512_si256(values)));
    if (n > kBf16Lanes / 2) {
      _mm512_storeu_si512(out + d + kBf16Lanes / 2, widen(_mm512_extracti64x4_epi64(values, 1)));
    }
  }
}

}  // namespace fi::cpu
#endif
