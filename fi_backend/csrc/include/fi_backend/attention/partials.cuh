// Items that several workers, or several units of one, compute: their partial states in the
// workspace, and the merge by whichever worker finishes last. Nobody waits for another worker.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/attention/item_partials.cuh>
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

// Add `parts` to `merged`, in order. States without keys change nothing, whatever their values are.
template <int kCount>
__device__ __forceinline__ void merge_parts(RowPart& merged, const RowPart (&parts)[kCount]) {
  float max = merged.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, parts[i].max);
  if (max == minus_infinity()) return;
  const float scale = ptx::exp2_approx(merged.max - max);
  merged.max = max;
  merged.sum *= scale;
  merged.values.x *= scale;
  merged.values.y *= scale;
  merged.values.z *= scale;
  merged.values.w *= scale;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (parts[i].max == minus_infinity()) continue;
    const float weight = ptx::exp2_approx(parts[i].max - max);
    merged.sum += parts[i].sum * weight;
    merged.values.x += parts[i].values.x * weight;
    merged.values.y += parts[i].values.y * weight;
    merged.values.z += parts[i].values.z * weight;
    merged.values.w += parts[i].values.w * weight;
  }
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

// A row of an item, merged by a warp: a lane has kParts times 4 values, from column 4 * lane on and
// 128 columns apart. Lanes past the row repeat its last values.
template <class Traits>
struct MergedRow {
  static constexpr int kParts = (Traits::kVo + 127) / 128;
  float max;
  float sum;
  float4 values[kParts];

  __device__ __forceinline__ static int column(int part) {
    return (part * kWarpSize + int(threadIdx.x % kWarpSize)) * kValuesPerAccess;
  }
  __device__ __forceinline__ void scale(float factor) {
    sum *= factor;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      values[p].x *= factor;
      values[p].y *= factor;
      values[p].z *= factor;
      values[p].w *= factor;
    }
  }
};

// Merge a row over an item's partials, in key order. States are loaded by a lane each, and values
// by all lanes: few instructions, since hardly any SM has them at hand.
template <class Traits>
__device__ __forceinline__ MergedRow<Traits> merge_partials(float* partials,
                                                            const ItemPartials& item, int row) {
  using Row = MergedRow<Traits>;
  constexpr int kInFlight = 16 / Row::kParts;  // loads that cover each other's latency
  Row merged = {minus_infinity(), 0.f, {}};
#pragma unroll 1
  for (int32_t begin = 0; begin < item.count; begin += kInFlight) {
    float4 values[kInFlight][Row::kParts];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {  // the last one again where there are no more
      const PartialSlot<Traits> slot(partials + item.slot(min(begin + i, item.count - 1)));
#pragma unroll
      for (int p = 0; p < Row::kParts; ++p) {
        const int column = min(Row::column(p), Traits::kVo - kValuesPerAccess);
        values[i][p] = __ldcg(slot.values(row, column));
      }
    }
    const int32_t mine = begin + threadIdx.x % kInFlight;
    float2 state =
        __ldcg(PartialSlot<Traits>(partials + item.slot(min(mine, item.count - 1))).state(row));
    if (mine >= item.count) state.x = minus_infinity();
    float max = state.x;
#pragma unroll
    for (int offset = kInFlight / 2; offset > 0; offset /= 2) {
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, offset));
    }
    max = fmaxf(max, merged.max);
    if (max == minus_infinity()) continue;
    merged.scale(ptx::exp2_approx(merged.max - max));
    merged.max = max;
    const float weight = ptx::exp2_approx(state.x - max);
    float sum = weight == 0.f ? 0.f : weight * state.y;
#pragma unroll
    for (int offset = kInFlight / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
    }
    merged.sum += sum;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float w = __shfl_sync(kFullWarp, weight, i);
#pragma unroll
      for (int p = 0; p < Row::kParts; ++p) {
        // Without a weight, values change nothing, whatever they are.
        const float4 x = w == 0.f ? float4{0.f, 0.f, 0.f, 0.f} : values[i][p];
        merged.values[p].x += w * x.x;
        merged.values[p].y += w * x.y;
        merged.values[p].z += w * x.z;
        merged.values[p].w += w * x.w;
      }
    }
  }
  return merged;
}

}  // namespace fi
