// Items that several workers, or several units of one, compute: their partial states in the
// workspace, and the merge by whichever worker finishes last. Nobody waits for another worker.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/attention/item_partials.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/address.cuh>
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
};

// The merge of two rows of an item by a warp, in key order. Each half of the warp looks after the
// states of one row, a lane of a partial, and all lanes load the values of one row after the other,
// from column 4 * lane on and 128 columns apart. A merge is a tail in which nothing else happens,
// and takes as long as its instructions do, most of which no cache holds.
template <class Traits>
class PairMerge {
 public:
  static constexpr int kParts = (Traits::kVo + 127) / 128;
  static constexpr int kHalf = kWarpSize / 2;

  // The second row may not exist.
  __device__ __forceinline__ PairMerge(float* partials, const ItemPartials& item, int first_row,
                                       int second_row, bool has_second)
      : partials_(partials), item_(item), has_second_(has_second) {
    // Read again, so that what follows from it is not kept in registers while units are computed.
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane_));
    first_row_ = first_row;
    second_row_ = has_second ? second_row : first_row;
  }

  __device__ __forceinline__ int lane() const { return lane_; }
  // Of the lane's half.
  __device__ __forceinline__ int row() const { return lane_ < kHalf ? first_row_ : second_row_; }

  // prepare() is called when all loads are on their way, finish(max, sum) gives what the values of
  // the row of the lane's half are to be multiplied with, write(half, column, values) writes four
  // of them; it is called by all lanes, those past the row included.
  template <class Prepare, class Finish, class Write>
  __device__ __forceinline__ void run(const Prepare& prepare, const Finish& finish,
                                      const Write& write) {
    float2 state = load_state(0);
    float2 merged = {};
    float factor = 0.f;
#pragma unroll 1
    for (int half = 0; half <= int(has_second_); ++half) {
      Values sum = {};
#pragma unroll 1
      for (int32_t begin = 0; begin < item_.count; begin += kInFlight) {
        Values values[kInFlight];
        load_values(half == 0 ? first_row_ : second_row_, begin, values);
        if (half == 0 && begin == 0) {
          prepare();
          merged = merge_states(state);
        } else if (item_.count > kInFlight) {
          state = load_state(begin);
        }
        const float weight = ptx::exp2_approx(state.x - base(merged.x));
        add_values(sum, values, weight, half * kHalf, item_.count - begin);
      }
      if (half == 0) factor = finish(merged.x, merged.y);
      const float f = __shfl_sync(kFullWarp, factor, half * kHalf);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const float4& x = sum.parts[p];
        write(half, column(p), float4{x.x * f, x.y * f, x.z * f, x.w * f});
      }
    }
  }

 private:
  // Partials whose loads cover each other's latency.
  static constexpr int kInFlight = 16 / kParts;
  static constexpr int kGroup = 4;  // of those that do not exist are jumped over
  static_assert(kInFlight <= kHalf);
  struct Values {
    float4 parts[kParts];
  };

  __device__ __forceinline__ int column(int part) const {
    return (part * kWarpSize + lane_) * kValuesPerAccess;
  }
  // What weights are relative to: a row that has seen no key has no maximum, and no weights.
  __device__ __forceinline__ static float base(float max) {
    return max == minus_infinity() ? 0.f : max;
  }

  // Of one of kInFlight partials and the row of the lane's half.
  __device__ __forceinline__ float2 load_state(int32_t begin) const {
    const int32_t mine = begin + lane_ % kInFlight;
    if (mine >= item_.count) return make_float2(minus_infinity(), 0.f);
    return __ldcg(PartialSlot<Traits>(partials_ + item_.slot(mine)).state(row()));
  }

  // {max, sum} of all partials; `state` is one of the first.
  __device__ __forceinline__ float2 merge_states(float2 state) const {
    float2 merged = make_float2(minus_infinity(), 0.f);
#pragma unroll 1
    for (int32_t begin = kInFlight;; begin += kInFlight) {
      float max = fmaxf(merged.x, state.x);
#pragma unroll
      for (int offset = kInFlight / 2; offset > 0; offset /= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, offset));
      }
      float added = ptx::exp2_approx(state.x - base(max)) * state.y;
#pragma unroll
      for (int offset = kInFlight / 2; offset > 0; offset /= 2) {
        added += __shfl_xor_sync(kFullWarp, added, offset);
      }
      merged = {max, merged.y * ptx::exp2_approx(merged.x - base(max)) + added};
      if (begin >= item_.count) return merged;
      state = load_state(begin);
    }
  }

  // Of partials that do not exist, zeroes: infinity times 0 is not 0.
  __device__ __forceinline__ void load_values(int row, int32_t begin,
                                              Values (&values)[kInFlight]) const {
    const int32_t count = item_.count - begin;
    const int at = row * Traits::kVo + min(column(0), Traits::kVo - kValuesPerAccess);
    const int32_t step = item_.step * int(sizeof(float));
    const void* slot = ptx::byte_offset(partials_ + item_.later_slots + at, begin, step);
    if (begin == 0) slot = partials_ + item_.first_slot + at;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        values[i].parts[p] = {};
        if (i >= count) continue;
        const int further = p == 0 ? 0 : min(column(p), Traits::kVo - kValuesPerAccess) - column(0);
        values[i].parts[p] = __ldcg(static_cast<const float4*>(slot) + further / kValuesPerAccess);
      }
      if (i == 0 && begin == 0) slot = partials_ + item_.later_slots + at;
      slot = static_cast<const uint8_t*>(slot) + step;
      // Left to itself, the compiler finds each address from the beginning.
      asm volatile("" : "+l"(slot));
    }
  }

  // `first_lane` has the weight of the first values.
  __device__ __forceinline__ void add_values(Values& sum, const Values (&values)[kInFlight],
                                             float weight, int first_lane, int count) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i % kGroup == 0 && i >= count) break;
      const float w = __shfl_sync(kFullWarp, weight, first_lane + i);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const float4& x = values[i].parts[p];
        float4& s = sum.parts[p];
        s = {s.x + w * x.x, s.y + w * x.y, s.z + w * x.z, s.w + w * x.w};
      }
    }
  }

  float* partials_;
  const ItemPartials& item_;
  bool has_second_;
  int lane_;
  int first_row_;
  int second_row_;
};

}  // namespace fi
