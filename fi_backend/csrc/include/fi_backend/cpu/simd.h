// A float vector as wide as the instruction set the module is compiled for.
//
// Arithmetic comes from the compiler's vector extension, so the same source serves AVX-512, AVX2
// and any other machine; only conversions and reductions name instructions.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fi_backend/common/dtypes.h"

namespace fi::cpu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

inline VecF broadcast(float x) { return VecF{} + x; }
inline VecF as_float(VecU bits) { return reinterpret_cast<VecF>(bits); }
inline VecU as_bits(VecF x) { return reinterpret_cast<VecU>(x); }
inline VecF select(VecI condition, VecF yes, VecF no) { return condition ? yes : no; }
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }      // b where either is NaN
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }      // b where either is NaN
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }  // contracted by -ffp-contract=fast
inline VecF abs(VecF x) { return as_float(as_bits(x) & 0x7fffffffu); }

// 0, 1, 2, ... in the lanes.
inline VecF lane_indices() {
  VecF v{};
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

template <class V, class T>
inline V load_bytes(const T* p) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline VecF widen_half(VecU16 bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  VecF v{};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(half{bits[i]});
  return v;
#endif
}

// Read kLanes consecutive values and widen them to float, exactly.
inline VecF load(const float* p) { return load_bytes<VecF>(p); }
inline VecF load(const bf16* p) {
  return as_float(__builtin_convertvector(load_bytes<VecU16>(p), VecU) << 16);
}
inline VecF load(const half* p) { return widen_half(load_bytes<VecU16>(p)); }
inline VecF load(const e5m2* p) {
  return widen_half(__builtin_convertvector(load_bytes<VecU8>(p), VecU16) << 8);
}
inline VecF load(const e4m3* p) {
  // e4m3 shifted into half's fields is 2^-8 of its value; subnormals stay exact.
  const VecU16 bits = __builtin_convertvector(load_bytes<VecU8>(p), VecU16);
  const VecF scaled = widen_half((bits & 0x80) << 8 | (bits & 0x7f) << 7);
  const VecU wide = __builtin_convertvector(bits, VecU);
  return select((wide & 0x7fu) == 0x7fu, broadcast(NAN), scaled * 256.0f);
}

// Write kLanes consecutive values, rounded to nearest even.
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, VecF v) {
#if defined(__AVX512BF16__)
  // One instruction for the ten below; it differs only in flushing subnormals (< 2^-126) to zero.
  const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  const VecU bits = as_bits(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU nan = (bits >> 16) | 0x40u;
  const VecU result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  const VecU16 narrow = __builtin_convertvector(result, VecU16);
  std::memcpy(p, &narrow, sizeof(narrow));
#endif
}
inline void store(half* p, VecF v) {
#if defined(__AVX512F__)
  const __m256i narrow =
      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &narrow, sizeof(narrow));
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<half>(v[i]);
#endif
}
// Narrow to a small float of the given layout, saturating at the magnitude kLargestBits (that of a
// float), as from_float does. NaN becomes the code whose magnitude bits are all ones.
template <int kExponentBits, int kMantissaBits, uint32_t kLargestBits>
inline void store_fp8(void* p, VecF v) {
  constexpr uint32_t kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr int kShift = 23 - kMantissaBits;
  constexpr uint32_t kSmallestNormal = (127 - kBias + 1) << 23;
  // Adding a power of two whose last mantissa bit is the subnormal step rounds in hardware.
  constexpr uint32_t kStep = (127 - kBias + 1 + kShift) << 23;
  const VecU magnitude = as_bits(abs(v));
  const VecU bits = magnitude < kLargestBits ? magnitude : VecU{} + kLargestBits;
  const VecU subnormal = as_bits(as_float(bits) + as_float(VecU{} + kStep)) - kStep;
  const VecU rounded = bits + ((1u << (kShift - 1)) - 1) + ((bits >> kShift) & 1u);
  const VecU normal = (rounded - ((127 - kBias) << 23)) >> kShift;
  const VecU finite = bits < kSmallestNormal ? subnormal : normal;
  const VecU code = magnitude > 0x7f800000u ? VecU{} + 0x7fu : finite;
  const VecU8 narrow = __builtin_convertvector(code | ((as_bits(v) >> 24) & 0x80u), VecU8);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store(e4m3* p, VecF v) { store_fp8<4, 3, 0x43e00000u>(p, v); }  // 448
inline void store(e5m2* p, VecF v) { store_fp8<5, 2, 0x47600000u>(p, v); }  // 57344
inline void store(int8_t* p, VecF v) {
  const VecF number = select(v == v, v, VecF{});
  const VecF clamped = min(max(number, broadcast(-128.0f)), broadcast(127.0f));
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
  const VecF rounded = (clamped + kRoundToInteger) - kRoundToInteger;
  typedef int8_t VecI8 __attribute__((vector_size(kLanes)));
  const VecI8 narrow = __builtin_convertvector(__builtin_convertvector(rounded, VecI), VecI8);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// The first n < kLanes values; lanes past n read as zero and are not written.
template <class T>
inline VecF load_partial(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, VecF v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline float reduce_add(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

// 2^x to 2 ulp. exp2(-inf) = 0, results below the smallest normal flush to 0, NaN stays NaN.
inline VecF exp2(VecF x) {
  x = x < -127.0f ? broadcast(-127.0f) : x;
  x = x > 128.0f ? broadcast(128.0f) : x;
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
  const VecF shifted = x + kRoundToInteger;
  const VecF integer = shifted - kRoundToInteger;
  const VecF f = x - integer;  // in [-0.5, 0.5]
  // Taylor coefficients ln(2)^k / k!; the first term left out is below 2^-25 on this interval.
  VecF p = broadcast(1.5252733804e-5f);
  p = fma(p, f, broadcast(1.5403530393e-4f));
  p = fma(p, f, broadcast(1.3333558146e-3f));
  p = fma(p, f, broadcast(9.6181291076e-3f));
  p = fma(p, f, broadcast(5.5504108665e-2f));
  p = fma(p, f, broadcast(2.4022650696e-1f));
  p = fma(p, f, broadcast(6.9314718056e-1f));
  p = fma(p, f, broadcast(1.0f));
  // The integer sits in the low mantissa bits of shifted; move it to the exponent field.
  const VecU exponent = (as_bits(shifted) - (0x4b400000u - 127u)) << 23;
  return p * as_float(exponent);
}

inline VecF exp(VecF x) { return exp2(x * 1.44269504088896341f); }

// tanh to a few ulp: a series near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline VecF tanh(VecF x) {
  const VecF x2 = x * x;
  VecF p = broadcast(62.0f / 2835.0f);
  p = fma(p, x2, broadcast(-17.0f / 315.0f));
  p = fma(p, x2, broadcast(2.0f / 15.0f));
  p = fma(p, x2, broadcast(-1.0f / 3.0f));
  const VecF series = fma(p * x2, x, x);
  const VecF far = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return select(abs(x) < 0.3f, series, far);
}

}  // namespace fi::cpu
