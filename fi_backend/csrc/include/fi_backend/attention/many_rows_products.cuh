// The two matrix products of a tile, by mma.sync: S = Q K^T and O += P V.
//
// A warp holds S and O in accumulators. With g = lane / 4 and c = lane % 4, x[m][j][e] is row
// 16 * m + g + 8 * (e / 2), column 8 * j + 2 * c + e % 2.
#pragma once

#include <fi_backend/attention/many_rows_shape.cuh>
#include <fi_backend/ptx/convert.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>
#include <fi_backend/ptx/mma.cuh>

namespace fi {

template <class Traits>
using ScoreTile = float[Traits::kRowBlocks][Traits::kTokens / 8][4];
template <class Traits>
using OutputTile = float[Traits::kRowBlocks][Traits::kVo / 8][4];

// q and k: shared addresses of the warp's rows and of the tile.
template <class Traits>
__device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k, ScoreTile<Traits>& s) {
  using T = typename Traits::Q;
  using QRows = typename Traits::QRows;
  using KRows = typename Traits::KRows;
  const int lane = fresh_thread() % 32;
  // A of ldmatrix: rows 0 to 15 at the first chunk, then at the second. B: tokens 0 to 7 at both
  // chunks, then tokens 8 to 15.
  const uint32_t q_lane = q + QRows::offset(lane % 16, lane / 16);
  const uint32_t k_lane = k + KRows::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][j][e] = 0.f;
    }
  }
#pragma unroll
  for (int d = 0; d < Traits::kQk / 16; ++d) {
    uint32_t rows[Traits::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
      ptx::ldmatrix_x4(rows[m], QRows::skip(q_lane, 2 * d) + m * 16 * QRows::kRowBytes);
    }
#pragma unroll
    for (int t = 0; t < Traits::kTokens / 16; ++t) {
      uint32_t tokens[4];
      ptx::ldmatrix_x4(tokens, KRows::skip(k_lane, 2 * d) + t * 16 * KRows::kRowBytes);
      const uint32_t low[2] = {tokens[0], tokens[1]};
      const uint32_t high[2] = {tokens[2], tokens[3]};
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) {
        ptx::mma_m16n8k16<T>(s[m][2 * t], rows[m], low);
        ptx::mma_m16n8k16<T>(s[m][2 * t + 1], rows[m], high);
      }
    }
  }
}

// p: weights, where multiply_keys() left scores. v: shared address of the tile.
template <class Traits>
__device__ __forceinline__ void add_values(const ScoreTile<Traits>& p, uint32_t v,
                                           OutputTile<Traits>& o) {
  using T = typename Traits::Q;
  using VRows = typename Traits::VRows;
  const int lane = fresh_thread() % 32;
  // B of ldmatrix, transposed: tokens 0 to 15 at the first chunk, then at the second.
  const uint32_t v_lane = v + VRows::offset(lane % 16, lane / 16);
#pragma unroll
  for (int t = 0; t < Traits::kTokens / 16; ++t) {
    uint32_t weights[Traits::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = p[m][2 * t + i / 2] + i % 2 * 2;
        weights[m][i] = ptx::pack_pair<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int d = 0; d < Traits::kVo / 16; ++d) {
      uint32_t values[4];
      ptx::ldmatrix_x4_transposed(values, VRows::skip(v_lane, 2 * d) + t * 16 * VRows::kRowBytes);
      const uint32_t low[2] = {values[0], values[1]};
      const uint32_t high[2] = {values[2], values[3]};
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) {
        ptx::mma_m16n8k16<T>(o[m][2 * d], weights[m], low);
        ptx::mma_m16n8k16<T>(o[m][2 * d + 1], weights[m], high);
      }
    }
  }
}

}  // namespace fi
