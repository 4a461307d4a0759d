// O = O * alpha + P V for one tile of keys and a block of query rows. The lanes of a vector are
// columns of V; weights are broadcast. P and V are float whatever V is stored as: a weight rounded
// to bf16 shows in the last bit of a bf16 output.
#pragma once

#include <fi_backend/attention/cpu/compute.h>

namespace fi::cpu {

// Rows of V, widened to float as they are read.
template <class T>
struct ValueRows {
  const T* const* rows;  // [num_keys]
  const T* const* next;  // rows one tile ahead, to prefetch; nullptr = none

  template <int kVectors>
  void load_columns(int key, int column, VecF* value) const {
    if (next != nullptr) prefetch(next[key] + column, kVectors * kLanes * int{sizeof(T)});
    const T* row = rows[key] + column;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) value[j] = load(row + j * kLanes);
  }
};

// The weights of a tile as softmax_tile() leaves them, from some query row on.
struct Weights {
  const float* values;  // [num_keys, stride]
  int stride;           // query rows side by side

  Weights from_row(int row) const { return {values + row, stride}; }
};

// kRows rows by kVectors vectors of columns. alpha: [kRows], or nullptr where o holds nothing yet;
// o: [kRows, o_stride].
template <int kRows, int kVectors, class T>
inline void value_block(const Weights& p, const ValueRows<T>& v, int column, int num_keys,
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
  for (int key = 0; key < num_keys; ++key) {
    VecF value[kVectors];
    v.template load_columns<kVectors>(key, column, value);
    const float* weights = p.values + int64_t{key} * p.stride;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VecF weight = broadcast_word<VecF>(weights[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = fma(weight, value[j], acc[i][j]);
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
template <int kRows, int kColumns, class T>
inline void value_rows(const Weights& p, const ValueRows<T>& v, int num_keys, const float* alpha,
                       float* o) {
  constexpr int kTotal = kColumns / kLanes;
  constexpr int kWanted = kValueSums / kRows < 8 ? kValueSums / kRows : 8;
  constexpr int kVectors = kWanted < kTotal ? kWanted : kTotal;
  constexpr int kRest = kTotal % kVectors;
  int column = 0;
  for (; column + kVectors * kLanes <= kColumns; column += kVectors * kLanes) {
    value_block<kRows, kVectors>(p, v, column, num_keys, alpha, o, kColumns);
  }
  if constexpr (kRest > 0) {
    value_block<kRows, kRest>(p, v, column, num_keys, alpha, o, kColumns);
  }
}

// All rows of a block; o: [num_rows, kColumns]. num_rows is rounded up to what a kernel computes,
// at most to a power of two: p, alpha and o have room for that.
template <int kColumns, class T>
void value_tile(const Weights& p, const ValueRows<T>& v, int num_keys, const float* alpha,
                int num_rows, float* o) {
  constexpr int kRows = kValueSums / 2;
  int row = 0;
  const auto rows_left = [&](auto rows) {
    value_rows<decltype(rows)::value, kColumns>(p.from_row(row), v, num_keys,
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
