// The arithmetic of Q K^T, in 32-bit words: a word is one float, or a pair of bf16 where the
// machine multiplies such pairs. Everything above this file is the same for both.
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

// What q and K are multiplied as; sums are always float.
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

}  // namespace fi::cpu
