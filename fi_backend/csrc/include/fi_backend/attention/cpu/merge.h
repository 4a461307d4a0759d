// Merge attention states that the caller holds in tensors.
#pragma once

#include <fi_backend/attention/cpu/row_vectors.h>
#include <fi_backend/attention/merge_params.h>
#include <fi_backend/cpu/parallel.h>

#include <cmath>

namespace fi::cpu {

constexpr int64_t kMinMergeRows = 64;  // (row, head) pairs below which another thread costs more

// Max that keeps NaN, so that a broken state shows in the result.
inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// 2^(lse - top), where a top of -inf means that all states are empty.
inline float state_weight(float lse, float top) {
  return lse == -INFINITY ? 0.0f : std::exp2(lse - top);
}

inline float merged_lse(float top, float weight_sum) {
  return weight_sum == 0 ? -INFINITY : top + std::log2(weight_sum);
}

// Weights of two states, relative to the merged one; both 0 where both states are empty.
struct MergeWeights {
  float a;
  float b;
  float lse;

  MergeWeights(float lse_a, float lse_b) {
    const float top = max_or_nan(lse_a, lse_b);
    a = state_weight(lse_a, top);
    b = state_weight(lse_b, top);
    const float sum = a + b;
    lse = merged_lse(top, sum);
    if (sum == 0) return;
    a /= sum;
    b /= sum;
  }
};

// A state with weight 0 may hold anything, NaN included.
inline VecF weigh(float weight, VecF v) { return weight == 0.0f ? VecF{} : weight * v; }

template <class In, class Out>
void merge_pair(const MergePairParams& params, int num_threads) {
  const StateStrides& sa = params.a_strides;
  const StateStrides& sb = params.b_strides;
  const StateStrides& so = params.out_strides;
  parallel_for(
      params.num_rows * params.num_heads, kMinMergeRows, num_threads,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / params.num_heads;
          const int64_t head = i % params.num_heads;
          if (params.mask != nullptr && params.mask[row] == 0) continue;
          const MergeWeights w(params.lse_a[row * sa.lse_row + head * sa.lse_head],
                               params.lse_b[row * sb.lse_row + head * sb.lse_head]);
          const In* a = static_cast<const In*>(params.v_a) + row * sa.v_row + head * sa.v_head;
          const In* b = static_cast<const In*>(params.v_b) + row * sb.v_row + head * sb.v_head;
          Out* out = static_cast<Out*>(params.v_out) + row * so.v_row + head * so.v_head;
          for_each_vector(params.head_dim, [&](int d, int n) {
            const VecF merged = weigh(w.a, load_some(a + d, n)) + weigh(w.b, load_some(b + d, n));
            store_some(out + d, merged, n);
          });
          if (params.lse_out != nullptr) {
            params.lse_out[row * so.lse_row + head * so.lse_head] = w.lse;
          }
        }
      });
}

template <class In, class Out>
void merge_states(const MergeStatesParams& params, int num_threads) {
  const StateStrides& si = params.in_strides;
  const StateStrides& so = params.out_strides;
  parallel_for(
      params.num_rows * params.num_heads, kMinMergeRows, num_threads,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / params.num_heads;
          const int64_t head = i % params.num_heads;
          const float* lse = params.lse + row * si.lse_row + head * si.lse_head;
          float top = -INFINITY;
          for (int s = 0; s < params.num_states; ++s) {
            top = max_or_nan(top, lse[s * params.lse_state_stride]);
          }
          float sum = 0;
          for (int s = 0; s < params.num_states; ++s) {
            sum += state_weight(lse[s * params.lse_state_stride], top);
          }
          const In* v = static_cast<const In*>(params.v) + row * si.v_row + head * si.v_head;
          Out* out = static_cast<Out*>(params.v_out) + row * so.v_row + head * so.v_head;
          for_each_vector(params.head_dim, [&](int d, int n) {
            VecF merged{};
            for (int s = 0; s < params.num_states; ++s) {
              if (sum == 0) break;
              const float weight = state_weight(lse[s * params.lse_state_stride], top) / sum;
              merged += weigh(weight, load_some(v + s * params.v_state_stride + d, n));
            }
            store_some(out + d, merged, n);
          });
          if (params.lse_out != nullptr) {
            params.lse_out[row * so.lse_row + head * so.lse_head] = merged_lse(top, sum);
          }
        }
      });
}

}  // namespace fi::cpu
