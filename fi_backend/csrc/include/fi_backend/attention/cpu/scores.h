// S = K Q^T for one tile of keys and one block of query rows: s[key, row].
#pragma once

#include <fi_backend/attention/cpu/transpose.h>

#include <algorithm>

namespace fi::cpu {

// The lanes of a vector are query rows, so that K is read in place, one broadcast word at a time,
// and nothing is summed across lanes. kTokens keys against kVectors vectors of rows.
// q: [num_words, q_stride], s: [kTokens, s_stride].
template <class C, class V, int kTokens, int kVectors>
inline void score_block(const float* const* k_rows, const float* q, int q_stride, int num_words,
                        float* s, int s_stride) {
  constexpr int kWidth = sizeof(V) / 4;
  V acc[kTokens][kVectors] = {};
  const float* k[kTokens];
  for (int i = 0; i < kTokens; ++i) k[i] = k_rows[i];
  for (int w = 0; w < num_words; ++w) {
    V row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row[j] = load_words<V>(q + w * q_stride + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      const V key = broadcast_word<V>(k[i][w]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = dot<C>(acc[i][j], key, row[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store_words(s + i * s_stride + j * kWidth, acc[i][j]);
  }
}

#if defined(__AVX512F__)
constexpr int kScoreVectors = 4;
#else
constexpr int kScoreVectors = 2;
#endif
constexpr int kScoreTokens = 6;  // 6 x kScoreVectors sums fill the register file

// A block of many rows. k_rows must be readable for num_keys rounded up to kScoreTokens, and s
// writable. row_width is a multiple of kLanes.
template <class C>
void score_many(const float* const* k_rows, int num_keys, const float* q, int row_width,
                int num_words, float* s) {
  for (int t = 0; t < num_keys; t += kScoreTokens) {
    float* out = s + t * row_width;
    int row = 0;
    for (; row + kScoreVectors * kLanes <= row_width; row += kScoreVectors * kLanes) {
      score_block<C, VecF, kScoreTokens, kScoreVectors>(k_rows + t, q + row, row_width, num_words,
                                                        out + row, row_width);
    }
    for (; row < row_width; row += kLanes) {
      score_block<C, VecF, kScoreTokens, 1>(k_rows + t, q + row, row_width, num_words, out + row,
                                            row_width);
    }
  }
}

// K of a tile for few rows: addresses, readable for whole vectors of keys past num_keys, and what
// is prefetched meanwhile: the same keys one tile ahead, and their values if value_tile() does not.
struct KeyRows {
  const float* const* rows;
  const void* const* next_k;
  const void* const* next_v;  // nullptr = none
  int k_bytes;
  int v_bytes;

  // Cache line `line` of each of some keys, and the same of their values. Few lines at a time: a
  // burst of prefetches fills the queue of misses and holds up what follows.
  void prefetch_next(int key, int count, int line) const {
    const int offset = line * kCacheLine;
    if (offset < k_bytes) {
      for (int i = key; i < key + count; ++i) prefetch_line(next_k[i], offset);
    }
    if (next_v != nullptr && offset < v_bytes) {
      for (int i = key; i < key + count; ++i) prefetch_line(next_v[i], offset);
    }
  }
};

// kWidth rows, 8 or 16, that fill one vector.
template <class C, int kWidth>
void score_one_vector(const KeyRows& k, int num_keys, const float* q, int num_words, float* s) {
  constexpr int kTokens = 8;
  for (int t = 0; t < num_keys; t += kTokens) {
    for (int line = 0; line * kCacheLine < std::max(k.k_bytes, k.v_bytes); ++line) {
      k.prefetch_next(t, kTokens, line);
    }
    score_block<C, Vector<kWidth>, kTokens, 1>(k.rows + t, q, kWidth, num_words, s + t * kWidth,
                                               kWidth);
  }
}

// Very few rows: the lanes are words of K, read whole; sums over lanes are taken for kLanes
// (key, row) pairs at once. q: [kRows, num_words], num_words a multiple of kLanes.
template <class C, int kRows>
void score_few(const KeyRows& k, int num_keys, const float* q, int num_words, float* s) {
  constexpr int kTokens = kLanes / kRows;
  for (int t = 0; t < num_keys; t += kTokens) {
    VecF acc[kLanes] = {};
    for (int w = 0; w < num_words; w += kLanes) {
      k.prefetch_next(t, kTokens, w / kLanes);
      VecF row[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) row[r] = load_words<VecF>(q + r * num_words + w);
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        const VecF key = load_words<VecF>(k.rows[t + i] + w);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[i * kRows + r] = dot<C>(acc[i * kRows + r], key, row[r]);
        }
      }
    }
    store_words(s + t * kRows, sum_each(acc));
  }
}

}  // namespace fi::cpu
