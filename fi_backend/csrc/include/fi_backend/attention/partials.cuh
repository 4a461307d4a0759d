// Items that several workers, or several units of one, compute: their partial states in the
// workspace, and the merge by whichever worker finishes last. Nobody waits for another worker.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
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

// Merge values [column, column + 4) of a row over an item's partials, in key order.
template <class Traits>
__device__ __forceinline__ RowPart merge_partials(float* partials, const PartialArea& area,
                                                  const ItemPartials& item, int row, int column) {
  constexpr int kInFlight = 16;  // loads that cover each other's latency
  const int32_t step = item.slot_step(area);
  float* later = partials + item.later_slots(area);
  RowPart merged = empty_part();
  for (int32_t first = 0; first < item.count; first += kInFlight) {
    RowPart parts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      parts[i] = empty_part();
      const int32_t index = first + i;
      float* slot = later + int64_t{index} * step;
      if (i == 0 && first == 0) slot = partials + item.first_slot(area);
      if (index < item.count) parts[i] = PartialSlot<Traits>(slot).load(row, column);
    }
    merge_parts(merged, parts);
  }
  return merged;
}

}  // namespace fi
