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

// Normalise and write this warp's rows. Their way to memory leads through `buffer`, the warp's part
// of shared memory, so that whole sectors are written.
template <class Traits>
__device__ __forceinline__ void write_output(const AttentionParams& p, const WorkGeometry& g,
                                             const ManyRowsItem& item, int first_row,
                                             const RowStates<Traits>& rows, uint8_t* buffer) {
  using T = typename Traits::Out;
  using Rows = typename Traits::OutRows;
  // Pairs of floats fill sectors as they are; pairs of 16-bit values do not.
  constexpr bool kIsDirect = sizeof(T) == 4;
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * m + 8 * h + lane / 4;
      if (first_row + i >= item.piece.num_rows) continue;
      const LogitRow row = tile_row(p, g, item, first_row + i);
      const RowResult result = finish_row(p, item.piece, row, rows.max[m][h], rows.sum[m][h]);
      if (lane % 4 == 0) write_lse(p, item, row, result.lse);
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; ++j) {
        const float* x = rows.o[m][j] + 2 * h;
        T* to = kIsDirect ? output_row<Traits>(p, item, row) + 8 * j
                          : reinterpret_cast<T*>(buffer + Rows::offset(i, j));
        store_pair(to + lane % 4 * 2, x[0] * result.factor, x[1] * result.factor);
      }
    }
  }
  if constexpr (kIsDirect) return;
  __syncwarp();
  const int reader = fresh_thread() % 32;
  constexpr int kWords = Rows::kRowBytes / int(sizeof(uint2));  // rows are aligned to them
#pragma unroll 4
  for (int n = reader; n < Traits::kWarpRows * kWords; n += 32) {
    const int i = n / kWords, word = n % kWords;
    if (first_row + i >= item.piece.num_rows) break;
    const LogitRow row = tile_row(p, g, item, first_row + i);
    reinterpret_cast<uint2*>(output_row<Traits>(p, item, row))[word] =
        *reinterpret_cast<const uint2*>(buffer + Rows::offset(i, word / 2) + word % 2 * 8);
  }
}

// The state of a part of an item in the workspace.
template <class Traits>
struct PartialItem {
  float* values;

  __device__ __forceinline__ PartialItem(const AttentionParams& p, int worker, bool is_at_tail) {
    constexpr ManyRowsPartials kPartials = {Traits::kTileRows, Traits::kVo};
    values = p.partials + kPartials.offset(worker, is_at_tail ? 1 : 0);
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
      if (lane % 4 == 0) *to.max_and_sum(i) = make_float2(rows.max[m][h], rows.sum[m][h]);
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; ++j) {
        const float* x = rows.o[m][j] + 2 * h;
        *reinterpret_cast<float2*>(to.row(i) + 8 * j + lane % 4 * 2) = make_float2(x[0], x[1]);
      }
    }
  }
}

// Count this part of an item as written, by all threads of the CTA. True in the CTA that finishes
// the item: it then sees every part. `is_last` is in shared memory.
__device__ __forceinline__ bool finish_part(int32_t* finished, int num_parts, bool* is_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(finished, 1) + 1 == num_parts;
    if (*is_last) *finished = 0;
  }
  __syncthreads();
  __threadfence();
  return *is_last;
}

// Merge the parts of an item in the order of their tokens, whoever computed them, and write it.
// Other CTAs wrote the parts: loads go past L1, which may hold what was there before.
template <class Traits>
__device__ __forceinline__ void merge_parts(const AttentionParams& p, const WorkGeometry& g,
                                            const ManyRowsItem& item, const LinePosition* starts,
                                            const KvRange& workers) {
  constexpr int kVecs = Traits::kVo / 4;
  constexpr int kInFlight = 4;  // loads that cover each other's latency
  const int count = item.piece.num_rows * kVecs;
  for (int first = threadIdx.x; first < count; first += kInFlight * kManyRowsThreads) {
    float4 o[kInFlight] = {};
    float2 state[kInFlight];  // maximum and sum
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) state[i] = make_float2(minus_infinity(), 0.f);
    for (int w = workers.begin; w < workers.end; ++w) {
      const KvRange part = worker_tokens(item.piece, starts, w);
      if (part.begin >= part.end) continue;
      const PartialItem<Traits> partial(p, w, part.begin == item.piece.item.begin);
      float4 x[kInFlight];
      float2 other[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int n = min(first + i * kManyRowsThreads, count - 1);
        other[i] = __ldcg(partial.max_and_sum(n / kVecs));
        x[i] = __ldcg(reinterpret_cast<const float4*>(partial.row(n / kVecs)) + n % kVecs);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const float max = fmaxf(state[i].x, other[i].x);
        const bool is_empty = max == minus_infinity();
        const float mine = is_empty ? 0.f : ptx::exp2_approx(state[i].x - max);
        const float theirs = is_empty ? 0.f : ptx::exp2_approx(other[i].x - max);
        o[i].x = o[i].x * mine + x[i].x * theirs;
        o[i].y = o[i].y * mine + x[i].y * theirs;
        o[i].z = o[i].z * mine + x[i].z * theirs;
        o[i].w = o[i].w * mine + x[i].w * theirs;
        state[i] = make_float2(max, state[i].y * mine + other[i].y * theirs);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int n = first + i * kManyRowsThreads;
      if (n >= count) break;
      const LogitRow row = tile_row(p, g, item, n / kVecs);
      const RowResult result = finish_row(p, item.piece, row, state[i].x, state[i].y);
      if (n % kVecs == 0) write_lse(p, item, row, result.lse);
      typename Traits::Out* to = output_row<Traits>(p, item, row) + n % kVecs * 4;
      store_pair(to, o[i].x * result.factor, o[i].y * result.factor);
      store_pair(to + 2, o[i].z * result.factor, o[i].w * result.factor);
    }
  }
}

}  // namespace fi
