// Storage types of host code: 16-bit and 8-bit floats as PODs with exact conversions.
// Device code uses the types of cuda_bf16.h, cuda_fp16.h and cuda_fp8.h instead.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace fi {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
struct e4m3 {  // FP8 with 4 exponent bits, finite only: largest value 448, S.1111.111 is NaN
  uint8_t bits;
};
struct e5m2 {  // FP8 with 5 exponent bits, IEEE style: infinities and NaNs exist
  uint8_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

// Widen a small IEEE-style float. Subnormals are normalised by a multiplication, which is exact.
template <int kExponentBits, int kMantissaBits>
inline float widen_small_float(uint32_t bits) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  const uint32_t sign = (bits >> (kExponentBits + kMantissaBits)) << 31;
  const uint32_t magnitude = bits & ((1u << (kExponentBits + kMantissaBits)) - 1);
  // Put exponent and mantissa where float has them, then rebias by 2^(127 - bias).
  const float scaled = bits_to_float(magnitude << (23 - kMantissaBits));
  const float value = scaled * bits_to_float(uint32_t(127 + 127 - kBias) << 23);
  return bits_to_float(float_to_bits(value) | sign);
}

inline float to_float(half x) {
  if ((x.bits & 0x7c00) == 0x7c00) {  // infinity or NaN
    return bits_to_float(uint32_t(x.bits & 0x8000) << 16 | 0x7f800000u |
                         uint32_t(x.bits & 0x03ff) << 13);
  }
  return widen_small_float<5, 10>(x.bits);
}
inline float to_float(e5m2 x) { return to_float(half{static_cast<uint16_t>(x.bits << 8)}); }
inline float to_float(e4m3 x) {
  if ((x.bits & 0x7f) == 0x7f) return bits_to_float(uint32_t(x.bits & 0x80) << 24 | 0x7fc00000u);
  return widen_small_float<4, 3>(x.bits);
}

template <class T>
T from_float(float f);

template <>
inline float from_float<float>(float f) {
  return f;
}

template <>
inline bf16 from_float<bf16>(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// Round |f| to a small float with ties to even; the result may be the first value past the largest.
template <int kExponentBits, int kMantissaBits>
inline uint32_t narrow_magnitude(float magnitude) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr int kShift = 23 - kMantissaBits;
  const uint32_t bits = float_to_bits(magnitude);
  constexpr uint32_t kSmallestNormal = uint32_t(127 - kBias + 1) << 23;
  if (bits < kSmallestNormal) {
    // Adding a power of two whose last mantissa bit is the subnormal step rounds in hardware.
    const float step = bits_to_float(uint32_t(127 - kBias + 1 + kShift) << 23);
    return float_to_bits(magnitude + step) - float_to_bits(step);
  }
  const uint32_t rounded = bits + ((1u << (kShift - 1)) - 1) + ((bits >> kShift) & 1);
  return (rounded - (uint32_t(127 - kBias) << 23)) >> kShift;
}

template <>
inline half from_float<half>(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // >= 65520
  return {static_cast<uint16_t>(sign | narrow_magnitude<5, 10>(bits_to_float(magnitude)))};
}

// Saturating, as CUDA's __NV_SATFINITE: out-of-range values and infinities become +-max.
template <>
inline e4m3 from_float<e4m3>(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7f)};
  if (magnitude >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7e)};  // >= 448
  return {static_cast<uint8_t>(sign | narrow_magnitude<4, 3>(bits_to_float(magnitude)))};
}
template <>
inline e5m2 from_float<e5m2>(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7f)};
  if (magnitude >= 0x47600000u) return {static_cast<uint8_t>(sign | 0x7b)};  // >= 57344
  return {static_cast<uint8_t>(sign | narrow_magnitude<5, 2>(bits_to_float(magnitude)))};
}

// Saturating too; NaN becomes 0.
template <>
inline int8_t from_float<int8_t>(float f) {
  if (f != f) return 0;
  const float clamped = f < -128.0f ? -128.0f : f > 127.0f ? 127.0f : f;
  return static_cast<int8_t>(std::lrint(clamped));
}

}  // namespace fi
