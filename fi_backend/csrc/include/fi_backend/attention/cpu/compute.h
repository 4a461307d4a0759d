// The arithmetic of both matrix products, in 32-bit words: a word is one float, or a pair of bf16
// where the machine multiplies such pairs. Everything above this file is the same for both.
#pragma once

#include <fi_backend/cpu/simd.h>

#include <type_traits>
#include <utility>

namespace fi::cpu {

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

template <class T>
constexpr bool kIsExactInBf16 =
    std::is_same_v<T, bf16> || std::is_same_v<T, e4m3> || std::is_same_v<T, e5m2>;

// What q, K, P and V are multiplied as; sums are always float.
template <class Q, class Kv>
using ComputeType =
    std::conditional_t<kHasBf16Dot && std::is_same_v<Q, bf16> && kIsExactInBf16<Kv>, bf16, float>;

template <class C>
constexpr int kPerWord = 4 / sizeof(C);

template <int kWidth>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kWidth * 4)));
};
template <int kWidth>
using Vector = typename VectorOf<kWidth>::Type;

template <class V>
inline V load_words(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
namespace detail {
template <class V, int... kLane>
inline V repeat(float x, std::integer_sequence<int, kLane...>) {
  return V{(static_cast<void>(kLane), x)...};
}
}  // namespace detail

// One word in every lane, bit for bit: adding it to zeros would change some pairs of bf16.
template <class V>
inline V broadcast_word(float x) {
  return detail::repeat<V>(x, std::make_integer_sequence<int, sizeof(V) / 4>());
}

template <class V>
inline void store_words(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

constexpr int kCacheLine = 64;

// Ask for the cache line at `offset` from p, into the second-level cache: it is needed a tile
// later.
inline void prefetch_line(const void* p, int offset) {
  __builtin_prefetch(static_cast<const char*>(p) + offset, 0, 2);
}
inline void prefetch(const void* p, int bytes) {
  for (int offset = 0; offset < bytes; offset += kCacheLine) prefetch_line(p, offset);
}

// acc + a * b per word. V is a vector of 16, 8 or 4 words.
template <class C, class V>
inline V dot(V acc, V a, V b) {
  if constexpr (std::is_same_v<C, float>) {
    return a * b + acc;
  } else {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(V) == 64) {
      return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    } else if constexpr (sizeof(V) == 32) {
      return (V)_mm256_dpbf16_ps((__m256)acc, (__m256bh)a, (__m256bh)b);
    } else {
      return (V)_mm_dpbf16_ps((__m128)acc, (__m128bh)a, (__m128bh)b);
    }
#endif
  }
}

// Weights of two vectors of keys as words of bf16 pairs. One bf16 holds 8 bits of a weight, which
// shows in the last bit of a bf16 output, so a weight is the sum of two: what its leading bits say,
// and the rest.
struct WeightWords {
  VecF leading;
  VecF rest;
};

inline WeightWords weight_words(VecF a, VecF b) {
#if defined(__AVX512BF16__)
  constexpr uint32_t kLeading = 0xffff0000u;
  const VecU a_bits = as_bits(a) & kLeading;
  const VecU b_bits = as_bits(b) & kLeading;
  const VecF a_rest = a - as_float(a_bits);  // exact
  const VecF b_rest = b - as_float(b_bits);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b_rest, (__m512)a_rest);
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {as_float(a_bits >> 16 | b_bits),
          (VecF)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both)};
#else
  return {a, b};
#endif
}

// The row of the first key of a word of weights. A word of bf16 pairs keys that are `distance` rows
// apart, a power of two; its rest lies in the row of the second key.
template <class C>
inline int first_key_row(int step, int distance) {
  return std::is_same_v<C, float> ? step : 2 * step - (step & (distance - 1));
}

}  // namespace fi::cpu
