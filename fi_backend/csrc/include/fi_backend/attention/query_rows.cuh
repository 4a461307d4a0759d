// The packed query rows of an item in shared memory, as the products of few_rows_products.cuh and
// the logits need them.
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

// Dims of 16 are stored in the order in which fp8 keys come out of ldmatrix: of dims 4c to 4c + 3,
// the first two are elements 2c of the first chunk, the others of the second.
template <class Rows>
__device__ __forceinline__ void store_for_fp8(uint8_t* q, int row, int chunk, const uint4& pairs) {
  const int within = chunk % 2 * int(sizeof(uint2));
  *reinterpret_cast<uint2*>(q + Rows::offset(row, chunk / 2 * 2) + within) = {pairs.x, pairs.z};
  *reinterpret_cast<uint2*>(q + Rows::offset(row, chunk / 2 * 2 + 1) + within) = {pairs.y, pairs.w};
}

// A warp's share of the rows of a unit, on their way from global to shared memory: rows warp,
// warp + kFewRowsWarps, .. The first is loaded ahead, which is all there is in plain decode.
template <class Traits>
class QueryRows {
  using Q = typename Traits::Q;
  using Rows = typename Traits::QRows;
  using Chunk = Vec<Q, kQueriesPerChunk>;
  static_assert(Rows::kChunks <= kWarpSize, "a warp reads a row at once");

 public:
  __device__ __forceinline__ QueryRows(const AttentionParams& p, const WorkGeometry& g)
      : p_(p), g_(g) {}

  __device__ __forceinline__ void load_first(const WorkUnits& units) {
    first_ = load(units, this_warp());
  }

  // Store all rows, and rows that see nothing up to the end of the last block that is computed.
  // Whoever reads them needs a barrier after this.
  __device__ __forceinline__ void store(const WorkUnits& units, uint8_t* q, LogitRow* rows) const {
    const int num_rows = Traits::num_blocks(units.num_rows()) * kRowBlock;
    const int first = this_warp();
#pragma unroll 1
    for (int row = first; row < num_rows; row += kFewRowsWarps) {
      const Chunk chunk = row == first ? first_ : load(units, row);
      LogitRow logit_row = {};  // of a row that does not exist: it sees no key
      if (row < units.num_rows()) {
        logit_row = make_logit_row(p_, g_, kFewRows, units.piece, units.first_row + row);
      }
      logit_row.scale *= store_chunk(q, row, chunk);
      if (lane() == 0) rows[row] = logit_row;
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  // The lane's chunk of a row; zeros where there is none.
  __device__ __forceinline__ Chunk load(const WorkUnits& units, int row) const {
    const WorkPiece& piece = units.piece;
    if (!units.exists || row >= units.num_rows() || lane() >= Rows::kChunks) return {};
    const int packed = units.first_row + row;
    const int token = packed / g_.group_size;
    const int head = piece.kv_head * g_.group_size + packed - token * g_.group_size;
    const Q* q = static_cast<const Q*>(p_.q) + (int64_t{piece.qo_begin} + token) * p_.q_row_stride +
                 head * p_.q_head_stride;
    return Chunk::load(q + lane() * kQueriesPerChunk);
  }

  // Store a row's chunk as what the tensor cores multiply; return what the products are short of.
  __device__ __forceinline__ static float store_chunk(uint8_t* q, int row, const Chunk& chunk) {
    const bool has_chunk = lane() < Rows::kChunks;
    if constexpr (!Traits::kIsFp8Cache) {
      if (has_chunk) *reinterpret_cast<uint4*>(q + Rows::offset(row, lane())) = chunk.word;
      return 1.f;
    } else if constexpr (kIsSame<Q, __half>) {
      if (has_chunk) store_for_fp8<Rows>(q, row, lane(), chunk.word);
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
      const uint4 pairs = {
          ptx::pack_pair<__half>(x[0] * f, x[1] * f), ptx::pack_pair<__half>(x[2] * f, x[3] * f),
          ptx::pack_pair<__half>(x[4] * f, x[5] * f), ptx::pack_pair<__half>(x[6] * f, x[7] * f)};
      if (has_chunk) store_for_fp8<Rows>(q, row, lane(), pairs);
      return scale.from_half;
    }
  }

  const AttentionParams& p_;
  const WorkGeometry& g_;
  Chunk first_;
};

}  // namespace fi
