// The packed query rows of a unit, as the products of few_rows_products.cuh and the logits need
// them.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/convert.cuh>

namespace fi {

inline constexpr int kQueriesPerChunk = kChunkBytes / 2;

// bf16 as fp16 with an exact power of two moved into the row's scale, so that the row's largest
// value is near 2^14. What is 2^-31 times smaller than that loses bits: it weighs nothing.
struct RowScale {
  float to_half;
  float from_half;
};
__device__ __forceinline__ RowScale make_row_scale(float largest) {
  const int exponent = __float_as_int(largest) >> 23;  // biased
  if (exponent == 0 || exponent == 255) return {1.f, 1.f};
  const int shift = min(126, 127 + 14 - exponent);
  return {__int_as_float((127 + shift) << 23), __int_as_float((127 - shift) << 23)};
}

// Eight queries as fp16 pairs, and what the products are short of. All lanes have chunks of a row.
template <class Q>
__device__ __forceinline__ float as_half(const Vec<Q, kQueriesPerChunk>& chunk, uint4& pairs) {
  if constexpr (kIsSame<Q, __half>) {
    pairs = chunk.word;
    return 1.f;
  } else {
    float x[kQueriesPerChunk];
    chunk.to_floats(x);
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kQueriesPerChunk; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    const RowScale scale = make_row_scale(largest);
    const float f = scale.to_half;
    pairs = {ptx::pack_pair<__half>(x[0] * f, x[1] * f), ptx::pack_pair<__half>(x[2] * f, x[3] * f),
             ptx::pack_pair<__half>(x[4] * f, x[5] * f),
             ptx::pack_pair<__half>(x[6] * f, x[7] * f)};
    return scale.from_half;
  }
}

// Make a row of queries what is multiplied with fp8 keys, in place; return what the products are
// short of. Dims of 16 are stored in the order in which fp8 keys come out of ldmatrix: of dims 4c
// to 4c + 3, the first two are elements 2c of the first chunk, the others of the second.
template <class Traits>
__device__ __forceinline__ float convert_for_fp8(uint8_t* q, int row) {
  using Rows = typename Traits::QRows;
  static_assert(Rows::kChunks <= kWarpSize, "a warp reads a row at once");
  using Chunk = Vec<typename Traits::Q, kQueriesPerChunk>;
  const int lane = threadIdx.x % kWarpSize;
  Chunk chunk = {};
  if (lane < Rows::kChunks) {
    chunk.word = *reinterpret_cast<const uint4*>(q + Rows::offset(row, lane));
  }
  uint4 pairs;
  const float missing = as_half(chunk, pairs);
  __syncwarp();
  if (lane < Rows::kChunks) {
    const int within = lane % 2 * int(sizeof(uint2));
    const int even = lane / 2 * 2;
    *reinterpret_cast<uint2*>(q + Rows::offset(row, even) + within) = {pairs.x, pairs.z};
    *reinterpret_cast<uint2*>(q + Rows::offset(row, even + 1) + within) = {pairs.y, pairs.w};
  }
  return missing;
}

// The packed row `row` of a few-row item. Like tile_row() of the other line, whose division it does
// not need: shared code would change the order of instructions, in the epilogues of both.
__device__ __forceinline__ LogitRow item_row(const AttentionParams& p, const WorkGeometry& g,
                                             const WorkPiece& piece, int row) {
  const auto qo_idx = static_cast<int32_t>(uint32_t(row) / uint32_t(g.group_size));
  const KvRange seen = visible_tokens(g, piece.qo_len, piece.kv_len, qo_idx);
  const float k_scale = p.k_scale != nullptr ? p.k_scale[piece.kv_head] : p.k_scale_value;
  LogitRow r;
  r.qo_idx = qo_idx;
  r.head = piece.kv_head * g.group_size + (row - qo_idx * g.group_size);
  r.scale = p.sm_scale * k_scale * (p.soft_cap != 0.f ? 1.f / p.soft_cap : kLog2e);
  r.slope = p.alibi_slopes != nullptr ? p.alibi_slopes[r.head] * kLog2e : 0.f;
  r.begin = seen.begin;
  r.end = seen.end;
  r.position = piece.kv_len - piece.qo_len + qo_idx;
  return r;
}

// Prepare a warp's share of a unit's rows: `warp`, warp + kComputeWarps, .. up to the end of the
// last block; rows that do not exist see no key. Whoever reads any of them needs a barrier after
// this.
template <class Traits>
__device__ __forceinline__ void prepare_queries(const AttentionParams& p, const WorkGeometry& g,
                                                const FewRowsUnit& unit, int warp, uint8_t* q,
                                                LogitRow* rows) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kWarps = Traits::kComputeWarps;
  const int num_rows = (unit.num_rows + kRowBlock - 1) / kRowBlock * kRowBlock;
  float missing = 1.f;  // of the lane's row
  if constexpr (Traits::kIsFp8Cache) {
#pragma unroll 1
    for (int i = 0; warp + i * kWarps < num_rows; ++i) {
      const float factor = convert_for_fp8<Traits>(q, warp + i * kWarps);
      if (lane == i) missing = factor;
    }
  }
  const int row = warp + lane * kWarps;
  if (row >= num_rows) return;
  LogitRow logit_row = {};
  if (row < unit.num_rows) {
    logit_row = item_row(p, g, unit.piece, unit.first_row + row);
    logit_row.scale *= missing;
  }
  rows[row] = logit_row;
}

}  // namespace fi
