// Merge attention states; see merge_params.h for what a state is.
#pragma once

#include <fi_backend/attention/merge_params.h>
#include <fi_backend/common/head_tile.h>

#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/math.cuh>

namespace fi {

// In and Out store the values; kVecSize elements of a head move as one access.
template <class In_, class Out_, int kVecSize_>
struct MergeTraits {
  using In = In_;
  using Out = Out_;
  static constexpr int kVecSize = kVecSize_;
  using InVec = Vec<In, kVecSize>;
  using OutVec = Vec<Out, kVecSize>;
};

// The lse of an empty state: -inf.
__device__ __forceinline__ float empty_lse() { return __int_as_float(0xff800000); }

// The weighted sum of values seen so far. An empty state's weight is 0 and its values, which may
// be anything, are not looked at: 0 * NaN would not vanish.
template <int kVecSize>
struct WeightedSum {
  float sum[kVecSize] = {};

  template <class InVec>
  __device__ __forceinline__ void add(float weight, const InVec& v) {
    if (weight == 0.f) return;
    float x[kVecSize];
    v.to_floats(x);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) sum[i] += weight * x[i];
  }
  template <class OutVec>
  __device__ __forceinline__ OutVec divided_by(float weight_sum) const {
    // No state has weight: the sum is 0 and must stay so.
    const float rcp = weight_sum == 0.f ? 0.f : 1.f / weight_sum;
    float x[kVecSize];
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) x[i] = sum[i] * rcp;
    return OutVec::from_floats(x);
  }
};

// 2^(lse - lse_max), where an lse_max of -inf means that all states are empty.
__device__ __forceinline__ float state_weight(float lse, float lse_max) {
  return lse == empty_lse() ? 0.f : ptx::exp2_approx(lse - lse_max);
}

// Max that keeps NaN, so that a broken state shows in the result.
__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ float merged_lse(float lse_max, float weight_sum) {
  return weight_sum == 0.f ? empty_lse() : lse_max + log2f(weight_sum);
}

// Accesses of each state that a thread has in flight. One is too few to cover the latency of
// memory.
inline constexpr int kPairVecs = 2;

// Block and grid: HeadTile over [num_rows, num_heads, head_dim / kPairVecs].
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads)
    merge_pair_kernel(const __grid_constant__ MergePairParams p) {
  using In = typename Traits::In;
  using Out = typename Traits::Out;
  constexpr int kVecSize = Traits::kVecSize;
  const StateStrides& a = p.a_strides;
  const StateStrides& b = p.b_strides;
  const StateStrides& out = p.out_strides;
  ptx::grid_dependency_wait();

  const auto [row, head] = head_tile_position();
  const bool is_wanted =
      row < p.num_rows && head < p.num_heads && (p.mask == nullptr || p.mask[row] != 0);
  float lse_max = 0.f, weight_sum = 0.f;
  if (is_wanted) {
    const float lse_a = p.lse_a[row * a.lse_row + head * a.lse_head];
    const float lse_b = p.lse_b[row * b.lse_row + head * b.lse_head];
    lse_max = max_or_nan(lse_a, lse_b);
    const float weight_a = state_weight(lse_a, lse_max);
    const float weight_b = state_weight(lse_b, lse_max);
    weight_sum = weight_a + weight_b;

    const In* v_a = static_cast<const In*>(p.v_a) + row * a.v_row + head * a.v_head;
    const In* v_b = static_cast<const In*>(p.v_b) + row * b.v_row + head * b.v_head;
    Out* v_out = static_cast<Out*>(p.v_out) + row * out.v_row + head * out.v_head;
    const int step = blockDim.x * kVecSize;
    for (int first = threadIdx.x * kVecSize; first < p.head_dim; first += kPairVecs * step) {
      typename Traits::InVec vec_a[kPairVecs], vec_b[kPairVecs];
#pragma unroll
      for (int v = 0; v < kPairVecs; ++v) {
        const int i = first + v * step;
        if (i >= p.head_dim) break;
        vec_a[v] = Traits::InVec::load_once(v_a + i);
        vec_b[v] = Traits::InVec::load_once(v_b + i);
      }
#pragma unroll
      for (int v = 0; v < kPairVecs; ++v) {
        const int i = first + v * step;
        if (i >= p.head_dim) break;
        WeightedSum<kVecSize> acc;
        acc.add(weight_a, vec_a[v]);
        acc.add(weight_b, vec_b[v]);
        acc.template divided_by<typename Traits::OutVec>(weight_sum).store(v_out + i);
      }
    }
  }
  // In place, lse_out is lse_a: the threads of a head must have read it before one overwrites it.
  __syncthreads();
  if (is_wanted && threadIdx.x == 0 && p.lse_out != nullptr) {
    p.lse_out[row * out.lse_row + head * out.lse_head] = merged_lse(lse_max, weight_sum);
  }
  ptx::grid_dependency_launch();
}

// Block and grid: HeadTile over [num_rows, num_heads, head_dim].
// NOTE: the 1 lets the compiler take more than 40 registers, where it spills on sm_80.
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads, 1)
    merge_states_kernel(const __grid_constant__ MergeStatesParams p) {
  using In = typename Traits::In;
  using Out = typename Traits::Out;
  constexpr int kVecSize = Traits::kVecSize;
  const StateStrides& in = p.in_strides;
  const StateStrides& out = p.out_strides;
  ptx::grid_dependency_wait();

  const auto [row, head] = head_tile_position();
  if (row >= p.num_rows || head >= p.num_heads) return;
  const float* lse = p.lse + row * in.lse_row + head * in.lse_head;
  float lse_max = empty_lse();
  for (int state = 0; state < p.num_states; ++state) {
    lse_max = max_or_nan(lse_max, lse[state * p.lse_state_stride]);
  }

  const In* v = static_cast<const In*>(p.v) + row * in.v_row + head * in.v_head;
  Out* v_out = static_cast<Out*>(p.v_out) + row * out.v_row + head * out.v_head;
  float weight_sum = 0.f;
  for (int i = threadIdx.x * kVecSize; i < p.head_dim; i += blockDim.x * kVecSize) {
    WeightedSum<kVecSize> acc;
    weight_sum = 0.f;
    const In* state_v = v + i;
    const float* state_lse = lse;
#pragma unroll 4
    for (int state = 0; state < p.num_states; ++state) {
      const auto vec = Traits::InVec::load_once(state_v);
      const float weight = state_weight(*state_lse, lse_max);
      state_v += p.v_state_stride;
      state_lse += p.lse_state_stride;
      acc.add(weight, vec);
      weight_sum += weight;
    }
    acc.template divided_by<typename Traits::OutVec>(weight_sum).store(v_out + i);
  }
  if (threadIdx.x == 0 && p.lse_out != nullptr) {
    p.lse_out[row * out.lse_row + head * out.lse_head] = merged_lse(lse_max, weight_sum);
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
