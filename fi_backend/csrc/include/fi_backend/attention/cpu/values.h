// O = O * alpha + P V for one tile of keys and a block of query rows. The lanes of a vector are
// columns of V; weights are broadcast.
#pragma once

#include <fi_backend/attention/cpu/bf16_rows.h>
#include <fi_backend/attention/cpu/compute.h>

namespace fi::cpu {

// Rows of V as words: one per column and step.
struct WordRows {
  const float* const* rows;  // [num_steps]
  const void* const* next;   // rows one tile ahead, to prefetch; nullptr = none

  template <int kVectors>
  void load(int step, int column, VecF* value) const {
    if (next != nullptr) {
      prefetch(static_cast<const float*>(next[step]) + column, kVectors * sizeof(VecF));
    }
    const float* row = rows[step] + column;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) value[j] = load_words<VecF>(row + j * kLanes);
  }
};

// Rows of V as they lie in a bf16 cache: a step's two keys are interleaved in registers, which is
// cheaper than to store their words where only a few query rows use them.
struct RowPairs {
  const bf16* const* rows;  // [num_keys]
  const void* const* next;  // rows one tile ahead, to prefetch
  int distance;             // keys between the two of a step

  template <int kVectors>
  void load(int step, int column, VecF* value) const {
    static_assert(kVectors % 2 == 0, "a vector of bf16 holds two vectors' columns");
#if defined(__AVX512BF16__)
    const int first = first_key_row<bf16>(step, distance);
    const bf16* a = rows[first] + column;
    const bf16* b = rows[first + distance] + column;
    constexpr int kBytes = kVectors * kLanes * sizeof(bf16);
    prefetch(static_cast<const bf16*>(next[first]) + column, kBytes);
    prefetch(static_cast<const bf16*>(next[first + distance]) + column, kBytes);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j += 2) {
      const Bf16Pairs pairs(_mm512_loadu_si512(a + j * kLanes), _mm512_loadu_si512(b + j * kLanes));
      value[j] = (VecF)pairs.low;
      value[j + 1] = (VecF)pairs.high;
    }
#endif
  }
};

// The weights of a tile as softmax_tile() leaves them, from some query row on.
struct Weights {
  const float* words;  // [keys, stride]
  int stride;          // query rows side by side
  int distance;        // keys between the two of a bf16 word

  Weights from_row(int row) const { return {words + row, stride, distance}; }
};

// kRows rows by kVectors vectors of columns. alpha: [kRows], or nullptr where o holds nothing yet;
// o: [kRows, o_stride].
template <class C, int kRows, int kVectors, class Source>
inline void value_block(const Weights& p, const Source& v, int column, int num_steps,
                        const float* alpha, float* o, int o_stride) {
  VecF acc[kRows][kVectors] = {};
  if (alpha != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        acc[i][j] = load_words<VecF>(o + i * o_stride + column + j * kLanes) * alpha[i];
      }
    }
  }
  for (int step = 0; step < num_steps; ++step) {
    VecF value[kVectors];
    v.template load<kVectors>(step, column, value);
    const float* words = p.words + first_key_row<C>(step, p.distance) * p.stride;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VecF weight = broadcast_word<VecF>(words[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = dot<C>(acc[i][j], weight, value[j]);
    }
    if constexpr (!std::is_same_v<C, float>) {
      const float* rest = words + p.distance * p.stride;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const VecF weight = broadcast_word<VecF>(rest[i]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) acc[i][j] = dot<C>(acc[i][j], weight, value[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      store_words(o + i * o_stride + column + j * kLanes, acc[i][j]);
    }
  }
}

// Vectors of sums that fit in the register file beside values and weights.
#if defined(__AVX512F__)
constexpr int kValueSums = 16;
#else
constexpr int kValueSums = 8;
#endif

// kRows rows, all columns. o: [kRows, kColumns], kColumns a multiple of kLanes.
template <class C, int kRows, int kColumns, class Source>
inline void value_rows(const Weights& p, const Source& v, int num_steps, const float* alpha,
                       float* o) {
  constexpr int kTotal = kColumns / kLanes;
  constexpr int kWanted = kValueSums / kRows < 8 ? kValueSums / kRows : 8;
  constexpr int kVectors = kWanted < kTotal ? kWanted : kTotal;
  constexpr int kRest = kTotal % kVectors;
  int column = 0;
  for (; column + kVectors * kLanes <= kColumns; column += kVectors * kLanes) {
    value_block<C, kRows, kVectors>(p, v, column, num_steps, alpha, o, kColumns);
  }
  if constexpr (kRest > 0) {
    value_block<C, kRows, kRest>(p, v, column, num_steps, alpha, o, kColumns);
  }
}

// All rows of a block; o: [num_rows, kColumns]. num_rows is rounded up to what a kernel computes,
// at most to a power of two: p, alpha and o have room for that.
template <class C, int kColumns, class Source>
void value_tile(const Weights& p, const Source& v, int num_steps, const float* alpha, int num_rows,
                float* o) {
  constexpr int kRows = kValueSums / 2;
  int row = 0;
  const auto rows_left = [&](auto rows) {
    value_rows<C, decltype(rows)::value, kColumns>(p.from_row(row), v, num_steps,
                                                   alpha == nullptr ? nullptr : alpha + row,
                                                   o + int64_t{row} * kColumns);
    row += decltype(rows)::value;
  };
  while (num_rows - row > kRows / 2) rows_left(std::integral_constant<int, kRows>());
  if constexpr (kRows > 4) {
    if (num_rows - row > 2) rows_left(std::integral_constant<int, 4>());
  }
  if (num_rows - row == 2) rows_left(std::integral_constant<int, 2>());
  if (num_rows - row == 1) rows_left(std::integral_constant<int, 1>());
}

}  // namespace fi::cpu
