// Items that several workers, or several units of one, compute: their partial states in the
// workspace, and the merge by whichever worker finishes last. Nobody waits for another worker.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/attention/work_units.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/math.cuh>

namespace fi {

inline constexpr int kValuesPerAccess = 4;  // floats

// Softmax state of a row and some of its unnormalised values.
struct RowPart {
  float max;
  float sum;
  float4 values;
};

__device__ __forceinline__ RowPart empty_part() {
  return {minus_infinity(), 0.f, {0.f, 0.f, 0.f, 0.f}};
}

// Add `other` to `part`. States without keys change nothing, whatever their values are.
__device__ __forceinline__ void merge_part(RowPart& part, const RowPart& other) {
  if (other.max == minus_infinity()) return;
  const float max = fmaxf(part.max, other.max);
  const float mine = ptx::exp2_approx(part.max - max);
  const float theirs = ptx::exp2_approx(other.max - max);
  part.max = max;
  part.sum = part.sum * mine + other.sum * theirs;
  part.values.x = part.values.x * mine + other.values.x * theirs;
  part.values.y = part.values.y * mine + other.values.y * theirs;
  part.values.z = part.values.z * mine + other.values.z * theirs;
  part.values.w = part.values.w * mine + other.values.w * theirs;
}

// A slot of the workspace. What other SMs have written is in L2, not in L1.
template <class Traits>
struct PartialSlot {
  float* base;

  __device__ __forceinline__ explicit PartialSlot(float* slot) : base(slot) {}

  __device__ __forceinline__ float4* values(int row, int column) const {
    return reinterpret_cast<float4*>(base + row * Traits::kVo + column);
  }
  __device__ __forceinline__ float2* state(int row) const {
    return reinterpret_cast<float2*>(base + Traits::kItemRows * Traits::kVo) + row;
  }
  __device__ __forceinline__ void store(int row, int column, const RowPart& part) const {
    __stcg(values(row, column), part.values);
    if (column == 0) __stcg(state(row), make_float2(part.max, part.sum));
  }
  __device__ __forceinline__ RowPart load(int row, int column) const {
    const float2 s = __ldcg(state(row));
    return {s.x, s.y, __ldcg(values(row, column))};
  }
};

// A worker's part of an item lies at the tail of its piece of the line if the item begins there.
__device__ __forceinline__ int partial_end(const WorkPiece& piece, const KvRange& part) {
  return part.begin == piece.item.begin ? 1 : 0;
}

// The workers [begin, end) among which all holders of the piece's item are, found by a whole warp.
__device__ __forceinline__ KvRange find_item_workers(const WorkPiece& piece,
                                                     const LinePosition* starts,
                                                     int32_t num_workers, int32_t worker) {
  const int lane = threadIdx.x % kWarpSize;
  KvRange workers;
  unsigned found = 0;
  for (int32_t from = worker; found == 0; from -= kWarpSize) {
    const int32_t w = from - lane;
    found = __ballot_sync(kFullWarp,
                          w <= 0 || worker_tokens(piece, starts, w).begin <= piece.item.begin);
    workers.begin = from - (__ffs(found) - 1);
  }
  found = 0;
  for (int32_t from = worker; found == 0; from += kWarpSize) {
    const int32_t w = from + lane;
    found = __ballot_sync(
        kFullWarp, w >= num_workers - 1 || worker_tokens(piece, starts, w).end >= piece.item.end);
    workers.end = from + __ffs(found);
  }
  return workers;
}

// Find the partials of the piece's item and list the worker of each, in key order, by a whole warp.
// chunk: tokens per chunk of the item, 0 = a piece is one chunk.
__device__ __forceinline__ ItemPartials find_partials(const WorkPiece& piece, int32_t chunk,
                                                      const LinePosition* starts,
                                                      int32_t num_workers, int32_t worker,
                                                      uint16_t* list) {
  const unsigned lane = threadIdx.x % kWarpSize;
  const KvRange workers = find_item_workers(piece, starts, num_workers, worker);
  ItemPartials item = {workers.begin, 0, 0};
  for (int32_t from = workers.begin; from < workers.end; from += kWarpSize) {
    const int32_t w = from + lane;
    const KvRange part = w < workers.end ? worker_tokens(piece, starts, w) : KvRange{0, 0};
    const unsigned holders = __ballot_sync(kFullWarp, part.begin < part.end);
    if (part.begin < part.end) {
      int first = item.num_holders + __popc(holders & ((1u << lane) - 1));
      int count = 1;
      if (chunk != 0) {
        first = (part.begin - piece.item.begin) / chunk;
        count = (part.end - part.begin + chunk - 1) / chunk;
      }
      for (int i = 0; i < count; ++i) list[first + i] = static_cast<uint16_t>(w);
    }
    item.num_holders += __popc(holders);
  }
  const int32_t num_tokens = piece.item.end - piece.item.begin;
  item.num_partials = chunk == 0 ? item.num_holders : (num_tokens + chunk - 1) / chunk;
  return item;
}

// Merge values [column, column + 4) of a row over an item's partials, in key order.
template <class Traits>
__device__ __forceinline__ RowPart merge_partials(float* partials, const PartialArea& area,
                                                  const uint16_t* list, int count, bool is_chunked,
                                                  int row, int column) {
  constexpr int kInFlight = 8;  // loads that cover each other's latency
  RowPart merged = empty_part();
  for (int first = 0; first < count; first += kInFlight) {
    RowPart parts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = min(first + i, count - 1);
      const int end = list[index] == list[0] ? 1 : 0;  // the first holder has the item at its tail
      float* slot = partials + area.slot(list[index], end, is_chunked ? index : 0);
      parts[i] = PartialSlot<Traits>(slot).load(row, column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) merge_part(merged, parts[i]);
    }
  }
  return merged;
}

}  // namespace fi
