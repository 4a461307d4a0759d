// O = O * alpha + P V for one tile of keys and one block of query rows.
#pragma once

#include <fi_backend/attention/cpu/compute.h>

namespace fi::cpu {

// kRows rows by kVectors vectors of columns. p: [num_steps, p_stride], one word per step and row;
// v_rows[step]: one word per column; alpha: [kRows]; o: [kRows, o_stride].
template <class C, int kRows, int kVectors>
inline void value_block(const float* p, int p_stride, const float* const* v_rows, int column,
                        int num_steps, const float* alpha, float* o, int o_stride) {
  VecF acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = load_words<VecF>(o + i * o_stride + j * kLanes) * alpha[i];
    }
  }
  for (int step = 0; step < num_steps; ++step) {
    const float* v = v_rows[step] + column;
    VecF value[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) value[j] = load_words<VecF>(v + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VecF weight = broadcast(p[step * p_stride + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = dot<C>(acc[i][j], weight, value[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store_words(o + i * o_stride + j * kLanes, acc[i][j]);
  }
}

#if defined(__AVX512F__)
constexpr int kValueRows = 8;
#else
constexpr int kValueRows = 4;
#endif

template <class C, int kRows>
inline void value_rows(const float* p, int p_stride, const float* const* v_rows, int num_columns,
                       int num_steps, const float* alpha, float* o) {
  int column = 0;
  for (; column + 2 * kLanes <= num_columns; column += 2 * kLanes) {
    value_block<C, kRows, 2>(p, p_stride, v_rows, column, num_steps, alpha, o + column,
                             num_columns);
  }
  if (column < num_columns) {
    value_block<C, kRows, 1>(p, p_stride, v_rows, column, num_steps, alpha, o + column,
                             num_columns);
  }
}

// All rows of a block; o: [num_rows, num_columns], num_columns a multiple of kLanes.
template <class C>
void value_tile(const float* p, int p_stride, const float* const* v_rows, int num_columns,
                int num_steps, const float* alpha, int num_rows, float* o) {
  int row = 0;
  for (; row + kValueRows <= num_rows; row += kValueRows) {
    value_rows<C, kValueRows>(p + row, p_stride, v_rows, num_columns, num_steps, alpha + row,
                              o + int64_t{row} * num_columns);
  }
  for (; row + 2 <= num_rows; row += 2) {
    value_rows<C, 2>(p + row, p_stride, v_rows, num_columns, num_steps, alpha + row,
                     o + int64_t{row} * num_columns);
  }
  if (row < num_rows) {
    value_rows<C, 1>(p + row, p_stride, v_rows, num_columns, num_steps, alpha + row,
                     o + int64_t{row} * num_columns);
  }
}

}  // namespace fi::cpu
