// The end of a piece: write a whole item's output, or a part's state, and merge an item's parts.
#pragma once

#include <fi_backend/attention/kept_parts.cuh>
#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_softmax.cuh>

namespace fi {

template <class Traits>
__device__ __forceinline__ typename Traits::Out* output_row(const AttentionParams& p,
                                                            const ManyRowsItem& item,
                                                            const LogitRow& row) {
  return static_cast<typename Traits::Out*>(p.out) +
         output_index<typename Traits::Variant>(p, item, row) * p.out_row_stride +
         row.head * p.out_head_stride;
}

template <class Traits>
__device__ __forceinline__ void write_lse(const AttentionParams& p, const ManyRowsItem& item,
                                          const LogitRow& row, float lse) {
  if (p.lse == nullptr) return;
  float* to = p.lse + output_index<typename Traits::Variant>(p, item, row) * p.lse_row_stride +
              row.head * p.lse_head_stride;
  *to = lse;
  clear_missing_parts<typename Traits::Variant>(p, item, to);
}

// Two neighbouring values of a row of the output.
__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = ptx::pack_pair<T>(low, high);
}

// Store two blocks of 8 values of a row, whose four lanes hold two values of each: `low` and
// `high`. All lanes of a warp call this, and `exists` is the same in a row's lanes.
__device__ __forceinline__ void store_blocks(float* to, const float* low, const float* high,
                                             bool exists) {
  const int lane_in_row = fresh_thread() % 4;
  if (!exists) return;
  store_pair(to + 2 * lane_in_row, low[0], low[1]);
  store_pair(to + 8 + 2 * lane_in_row, high[0], high[1]);
}
// Pairs of 16-bit values do not fill sectors: neighbouring lanes exchange one, and each has four
// neighbouring values of one block then.
template <class T>
__device__ __forceinline__ void store_blocks(T* to, const float* low, const float* high,
                                             bool exists) {
  const int lane_in_row = fresh_thread() % 4;
  const bool has_high = lane_in_row % 2;
  const uint32_t low_pair = ptx::pack_pair<T>(low[0], low[1]);
  const uint32_t high_pair = ptx::pack_pair<T>(high[0], high[1]);
  const uint32_t other = __shfl_xor_sync(kFullWarp, has_high ? low_pair : high_pair, 1);
  const uint2 four = has_high ? make_uint2(other, high_pair) : make_uint2(low_pair, other);
  T* place = to + 8 * has_high + lane_in_row / 2 * 4;  // rows are aligned to 8 bytes at least
  if (exists) *reinterpret_cast<uint2*>(place) = four;
}

// Normalise and write this warp's rows.
template <class Traits>
__device__ __forceinline__ void write_output(const AttentionParams& p, const WorkGeometry& g,
                                             const ManyRowsItem& item, int first_row,
                                             const RowStates<Traits>& rows) {
  using Variant = typename Traits::Variant;
  const PieceVariant<Variant> variant(p, item.piece);
  // What takes several dependent loads is found for some rows at once, where registers allow it.
  constexpr int kAtOnce = Traits::kRowBlocks == 1 ? 2 : 1;
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int first = 0; first < 2 * Traits::kRowBlocks; first += kAtOnce) {
    LogitRow row[kAtOnce];
    float factor[kAtOnce];
    typename Traits::Out* to[kAtOnce];
    const auto finish = [&](int i) {
      const int m = (first + i) / 2, h = (first + i) % 2;
      return finish_row<Variant>(p, item.piece, row[i], rows.sums.max[m][h], rows.sums.sum[m][h]);
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int in_tile = first_row + 8 * (first + i) + lane / 4;
      row[i] = tile_row(p, g, item, min(in_tile, item.piece.num_rows - 1));
      factor[i] = finish(i).factor;
      to[i] = output_row<Traits>(p, item, row[i]);
      // Else every store's address is computed anew.
      if constexpr (kAtOnce > 1) asm volatile("" : "+l"(to[i]));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int m = (first + i) / 2, h = (first + i) % 2;
      const bool exists = first_row + 8 * (first + i) + lane / 4 < item.piece.num_rows;
      if (p.lse != nullptr && exists && lane % 4 == 0)
        write_lse<Traits>(p, item, row[i], finish(i).lse);
      const variants::Row at = variant.row(row[i].qo_idx, row[i].head);
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; j += 2) {
        float x[2][2];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int dim = 8 * (j + n / 2) + lane % 4 * 2 + n % 2;
          x[n / 2][n % 2] =
              variant.output(rows.o[m][j + n / 2][2 * h + n % 2] * factor[i], at, dim);
        }
        store_blocks(to[i] + 8 * j, x[0], x[1], exists);
      }
    }
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
__device__ __forceinline__ void merge_item(const AttentionParams& p, const WorkGeometry& g,
                                           const ManyRowsItem& item) {
  using Variant = typename Traits::Variant;
  const PieceVariant<Variant> variant(p, item.piece);
  constexpr int kVecs = Traits::kVo / 4;
  // Loads that cover each other's latency: of neighbouring rows, and of parts of one.
  constexpr int kRows = 4, kParts = 2;
  const ItemHolders& holders = item.holders;
  const int count = item.piece.num_rows * kVecs;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kRows * Traits::kComputeThreads) {
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
          const int n = min(first + i * Traits::kComputeThreads, count - 1);
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
      const int n = first + i * Traits::kComputeThreads;
      if (n >= count) break;
      const LogitRow row = tile_row(p, g, item, n / kVecs);
      const RowResult result = finish_row<Variant>(p, item.piece, row, state[i].x, state[i].y);
      if (n % kVecs == 0) write_lse<Traits>(p, item, row, result.lse);
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
  if (finish_part(finished, holders.count, is_last, sync)) merge_item<Traits>(p, g, item);
}

}  // namespace fi
