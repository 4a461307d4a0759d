// S = K Q^T for one tile of keys and one block of query rows. The lanes of a vector are query rows,
// so that K is read in place, one broadcast word at a time, and a softmax over keys needs no
// horizontal step.
#pragma once

#include <fi_backend/attention/cpu/compute.h>

namespace fi::cpu {

// kTokens keys against kVectors vectors of rows. q: [num_words, q_stride], s: [kTokens, s_stride].
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
      const V key = V{} + k[i][w];
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

// All rows of a block. k_rows must be readable for num_tokens rounded up to kScoreTokens, and s
// writable. row_width is a multiple of kLanes.
template <class C>
void score_tile(const float* const* k_rows, int num_tokens, const float* q, int row_width,
                int num_words, float* s) {
  for (int t = 0; t < num_tokens; t += kScoreTokens) {
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

}  // namespace fi::cpu
