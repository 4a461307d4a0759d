// The end of a piece: write a whole item's output, or a part's state, and merge an item's parts.
#pragma once

#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_softmax.cuh>

namespace fi {

template <class Traits>
__device__ __forceinline__ typename Traits::Out* output_row(const AttentionParams& p,
                                                            const ManyRowsItem& item,
                                                            const LogitRow& row) {
  return static_cast<typename Traits::Out*>(p.out) +
         (int64_t{item.piece.qo_begin} + row.qo_idx) * p.out_row_stride +
         row.head * p.out_head_stride;
}

__device__ __forceinline__ void write_lse(const AttentionParams& p, const ManyRowsItem& item,
                                          const LogitRow& row, float lse) {
  if (p.lse == nullptr) return;
  p.lse[(int64_t{item.piece.qo_begin} + row.qo_idx) * p.lse_row_stride +
        row.head * p.lse_head_stride] = lse;
}

// Two neighbouring values of a row of the output.
__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = ptx::pack_pair<T>(low, high);
}

// Write this warp's rows from shared memory, in words of sizeof(Word).
template <class Traits, class Word, int kBatch>
__device__ __forceinline__ void copy_output(const AttentionParams& p, const WorkGeometry& g,
                                            const ManyRowsItem& item, int first_row,
                                            const uint8_t* buffer) {
  using Rows = typename Traits::OutRows;
  constexpr int kWords = Rows::kRowBytes / int(sizeof(Word));
  constexpr int kPerChunk = kChunkBytes / int(sizeof(Word));
  const int num_rows = item.piece.num_rows - first_row;
  const int lane = fresh_thread() % 32;
#pragma unroll 1
  for (int first = 0; first < Traits::kWarpRows * kWords; first += kBatch * 32) {
    Word words[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int n = first + b * 32 + lane;
      words[b] = *reinterpret_cast<const Word*>(
          buffer + Rows::offset(n / kWords, n % kWords / kPerChunk) + n % kPerChunk * sizeof(Word));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int n = first + b * 32 + lane;
      const LogitRow row = tile_row(p, g, item, first_row + n / kWords);
      Word* to = reinterpret_cast<Word*>(output_row<Traits>(p, item, row)) + n % kWords;
      if (n / kWords < num_rows) *to = words[b];
    }
  }
}

// Normalise and write this warp's rows. Their way to memory leads through `buffer`, the warp's part
// of shared memory, so that whole sectors are written.
template <class Traits>
__device__ __forceinline__ void write_output(const AttentionParams& p, const WorkGeometry& g,
                                             const ManyRowsItem& item, int first_row,
                                             const RowStates<Traits>& rows, uint8_t* buffer) {
  using T = typename Traits::Out;
  using Rows = typename Traits::OutRows;
  using Variant = typename Traits::Variant;
  // Pairs of floats fill sectors as they are; pairs of 16-bit values do not.
  constexpr bool kIsDirect = sizeof(T) == 4;
  const PieceVariant<Variant> variant(p, item.piece);
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * m + 8 * h + lane / 4;
      if (first_row + i >= item.piece.num_rows) continue;
      const LogitRow row = tile_row(p, g, item, first_row + i);
      const RowResult result =
          finish_row<Variant>(p, item.piece, row, rows.sums.max[m][h], rows.sums.sum[m][h]);
      if (lane % 4 == 0) write_lse(p, item, row, result.lse);
      const variants::Row at = variant.row(row.qo_idx, row.head);
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; ++j) {
        const float* x = rows.o[m][j] + 2 * h;
        T* to = kIsDirect ? output_row<Traits>(p, item, row) + 8 * j
                          : reinterpret_cast<T*>(buffer + Rows::offset(i, j));
        const int dim = 8 * j + lane % 4 * 2;
        store_pair(to + lane % 4 * 2, variant.output(x[0] * result.factor, at, dim),
                   variant.output(x[1] * result.factor, at, dim + 1));
      }
    }
  }
  if constexpr (kIsDirect) return;
  __syncwarp();
  constexpr int kBatch = Traits::kRowBlocks > 1 ? 4 : Traits::kVo % 64 == 0 ? 4 : 2;
  // Rows are aligned to 8 bytes at least.
  const uint64_t places = reinterpret_cast<uint64_t>(p.out) | p.out_row_stride * sizeof(T) |
                          p.out_head_stride * sizeof(T);
  if (places % sizeof(uint4) == 0) {
    copy_output<Traits, uint4, kBatch>(p, g, item, first_row, buffer);
  } else {
    copy_output<Traits, uint2, 1>(p, g, item, first_row, buffer);
  }
}

// The state of a part of an item in the workspace.
template <class Traits>
struct PartialItem {
  float* values;

  // Of part `rank`. A worker begins inside of one item at most, and ends inside of one.
  __device__ __forceinline__ PartialItem(const AttentionParams& p, const ItemHolders& holders,
                                         int rank) {
    constexpr ManyRowsPartials kPartials = {Traits::kTileRows, Traits::kVo};
    values = p.partials + kPartials.offset(holders.first + rank, rank == 0 ? 1 : 0);
  }

  __device__ __forceinline__ float* row(int i) const { return values + i * Traits::kVo; }
  __device__ __forceinline__ float2* max_and_sum(int i) const {
    return reinterpret_cast<float2*>(values + Traits::kTileRows * Traits::kVo) + i;
  }
};

template <class Traits>
__device__ __forceinline__ void write_partial(const PartialItem<Traits>& to, int num_rows,
                                              int first_row, const RowStates<Traits>& rows) {
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_row + 16 * m + 8 * h + lane / 4;
      if (i >= num_rows) continue;
      if (lane % 4 == 0) *to.max_and_sum(i) = make_float2(rows.sums.max[m][h], rows.sums.sum[m][h]);
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; ++j) {
        const float* x = rows.o[m][j] + 2 * h;
        *reinterpret_cast<float2*>(to.row(i) + 8 * j + lane % 4 * 2) = make_float2(x[0], x[1]);
      }
    }
  }
}

// Count this part of an item as written, by the threads of a CTA that wrote it; sync() waits for
// them. True in the CTA that finishes the item: it then sees every part. `is_last` is in shared
// memory.
template <class Sync>
__device__ __forceinline__ bool finish_part(int32_t* finished, int num_parts, bool* is_last,
                                            const Sync& sync) {
  __threadfence();
  sync();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(finished, 1) + 1 == num_parts;
    if (*is_last) *finished = 0;
  }
  sync();
  __threadfence();
  return *is_last;
}

// Add part `other` of a row, of which x are some values, to what there is.
__device__ __forceinline__ void merge_row(float2& state, float4& o, const float2& other,
                                          const float4& x) {
  const float max = fmaxf(state.x, other.x);
  const bool is_empty = max == minus_infinity();
  const float mine = is_empty ? 0.f : ptx::exp2_approx(state.x - max);
  const float theirs = is_empty ? 0.f : ptx::exp2_approx(other.x - max);
  o.x = o.x * mine + x.x * theirs;
  o.y = o.y * mine + x.y * theirs;
  o.z = o.z * mine + x.z * theirs;
  o.w = o.w * mine + x.w * theirs;
  state = make_float2(max, state.y * mine + other.y * theirs);
}

// Merge the parts of an item in the order of their tokens, whoever computed them, and write it.
// Other CTAs wrote the parts: loads go past L1, which may hold what was there before.
template <class Traits>
__device__ __forceinline__ void merge_parts(const AttentionParams& p, const WorkGeometry& g,
                                            const ManyRowsItem& item) {
  using Variant = typename Traits::Variant;
  const PieceVariant<Variant> variant(p, item.piece);
  constexpr int kVecs = Traits::kVo / 4;
  // Loads that cover each other's latency: of neighbouring rows, and of parts of one.
  constexpr int kRows = 4, kParts = 2;
  const ItemHolders& holders = item.holders;
  const int count = item.piece.num_rows * kVecs;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kRows * kManyRowsThreads) {
    float4 o[kRows] = {};
    float2 state[kRows];  // maximum and sum
#pragma unroll
    for (int i = 0; i < kRows; ++i) state[i] = make_float2(minus_infinity(), 0.f);
#pragma unroll 1
    for (int begin = 0; begin < holders.count; begin += kParts) {
      float4 x[kParts][kRows];
      float2 others[kParts][kRows];
#pragma unroll
      for (int k = 0; k < kParts; ++k) {  // the last one again where there are no more
        const PartialItem<Traits> part(p, holders, min(begin + k, holders.count - 1));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int n = min(first + i * kManyRowsThreads, count - 1);
          others[k][i] = __ldcg(part.max_and_sum(n / kVecs));
          x[k][i] = __ldcg(reinterpret_cast<const float4*>(part.row(n / kVecs)) + n % kVecs);
        }
      }
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (begin + k >= holders.count) break;
#pragma unroll
        for (int i = 0; i < kRows; ++i) merge_row(state[i], o[i], others[k][i], x[k][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int n = first + i * kManyRowsThreads;
      if (n >= count) break;
      const LogitRow row = tile_row(p, g, item, n / kVecs);
      const RowResult result = finish_row<Variant>(p, item.piece, row, state[i].x, state[i].y);
      if (n % kVecs == 0) write_lse(p, item, row, result.lse);
      const variants::Row at = variant.row(row.qo_idx, row.head);
      const int dim = n % kVecs * 4;
      const float values[4] = {o[i].x, o[i].y, o[i].z, o[i].w};
      typename Traits::Out* to = output_row<Traits>(p, item, row) + dim;
#pragma unroll
      for (int d = 0; d < 4; d += 2) {
        store_pair(to + d, variant.output(values[d] * result.factor, at, dim + d),
                   variant.output(values[d + 1] * result.factor, at, dim + d + 1));
      }
    }
  }
}

// Count a written part of an item that several workers hold, and merge all if it is the last one.
template <class Traits, class Sync>
__device__ __forceinline__ void end_part(const AttentionParams& p, const WorkGeometry& g,
                                         const ManyRowsItem& item, bool* is_last,
                                         const Sync& sync) {
  const ItemHolders& holders = item.holders;
  int32_t* finished = ManyRowsWalk::plan_of(p, g).finished[kManyRows] + holders.first;
  if (finish_part(finished, holders.count, is_last, sync)) merge_parts<Traits>(p, g, item);
}

}  // namespace fi
