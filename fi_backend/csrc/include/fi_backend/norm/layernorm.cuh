// Layer norm of rows; see norm_params.h for the formula.
#pragma once

#include <fi_backend/norm/norm_params.h>

#include <fi_backend/common/scale_divider.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/norm/norm_rows.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

// In stores the input, Out the result; kVecSize elements move as one access.
template <class In_, class Out_, int kVecSize_>
struct LayerNormTraits {
  using In = In_;
  using Out = Out_;
  static constexpr int kVecSize = kVecSize_;
  using InVec = Vec<In, kVecSize>;
  using OutVec = Vec<Out, kVecSize>;
};

template <int kVecSize>
__device__ __forceinline__ float add_elements(float sum, const float (&x)[kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) sum += x[i];
  return sum;
}

// Add squares of what differs from the mean: E[x^2] - E[x]^2 would cancel.
template <int kVecSize>
__device__ __forceinline__ float add_centred_squares(float sum, const float (&x)[kVecSize],
                                                     float mean) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

// Write x, scaled and shifted, to out + i. Gamma and beta are the same for all rows, so they are in
// L1, and read only here, where x needs its registers no longer.
template <class Traits>
__device__ __forceinline__ void store_scaled(const LayerNormParams& p, float (&x)[Traits::kVecSize],
                                             float mean, float rsqrt_variance,
                                             const ScaleDivider& divide, typename Traits::Out* out,
                                             int i) {
  float gamma[Traits::kVecSize], beta[Traits::kVecSize];
  load_floats(p.gamma + i, gamma);
  load_floats(p.beta + i, beta);
#pragma unroll
  for (int e = 0; e < Traits::kVecSize; ++e) {
    x[e] = (x[e] - mean) * rsqrt_variance * gamma[e] + beta[e];
    if constexpr (kIsQuantized<typename Traits::Out>) x[e] = divide(x[e]);
  }
  Traits::OutVec::from_floats(x).store(out + i);
}

// Rows that fit in the registers of one block. Block: x = threads of a row (a power of two up to a
// warp, or whole warps and then y = 1), y = rows; grid: all rows.
// NOTE: the 1 lets the compiler take more than 64 registers, where it spills on sm_120.
template <class Traits>
__global__ void __launch_bounds__(kNormMaxThreads, 1)
    layernorm_kernel(const __grid_constant__ LayerNormParams p) {
  constexpr int kVecSize = Traits::kVecSize;
  constexpr int kVecs = kNormVecsPerThread;
  ptx::grid_dependency_wait();

  // Threads without a row go on: the reductions need all of them.
  const int64_t row_idx = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool has_row = row_idx < p.num_outer * p.num_inner;
  const QuotRem at = find_row(has_row ? row_idx : 0, p.num_inner);
  const auto* input = row_at(static_cast<const typename Traits::In*>(p.input), p.input_strides, at);
  auto* out = row_at(static_cast<typename Traits::Out*>(p.out), p.out_strides, at);
  const auto element = [](int v) { return int(v * blockDim.x + threadIdx.x) * kVecSize; };
  const int num_elements = has_row ? p.hidden_size : 0;
  const auto is_mine = [&](int v) { return element(v) < num_elements; };

  typename Traits::InVec vec[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (is_mine(v)) vec[v] = Traits::InVec::load(input + element(v));
  }
  float x[kVecs][kVecSize];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    vec[v].to_floats(x[v]);
    sum = add_elements(sum, x[v]);
  }
  const float mean =
      sum_over_threads<kNormMaxThreads, 0>(sum, blockDim.x, threadIdx.x) / p.hidden_size;
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    squares = add_centred_squares(squares, x[v], mean);
  }
  squares = sum_over_threads<kNormMaxThreads, 1>(squares, blockDim.x, threadIdx.x);

  const float rsqrt_variance = rsqrtf(squares / p.hidden_size + p.eps);
  const ScaleDivider divide(p.quant_scale ? *p.quant_scale : p.quant_scale_value);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    store_scaled<Traits>(p, x[v], mean, rsqrt_variance, divide, out, element(v));
  }
  ptx::grid_dependency_launch();
}

// Rows of any length and alignment: a block reads its row three times, twice from cache.
// Block: x = whole warps; grid: all rows.
template <class Traits>
__global__ void __launch_bounds__(kNormMaxThreads)
    layernorm_long_kernel(const __grid_constant__ LayerNormParams p) {
  constexpr int kVecSize = Traits::kVecSize;
  ptx::grid_dependency_wait();

  const QuotRem at = find_row(blockIdx.x, p.num_inner);
  const auto* input = row_at(static_cast<const typename Traits::In*>(p.input), p.input_strides, at);
  auto* out = row_at(static_cast<typename Traits::Out*>(p.out), p.out_strides, at);
  const int first = threadIdx.x * kVecSize, step = blockDim.x * kVecSize;
  float x[kVecSize];
  float sum = 0.f;
  for (int i = first; i < p.hidden_size; i += step) {
    Traits::InVec::load(input + i).to_floats(x);
    sum = add_elements(sum, x);
  }
  const float mean =
      sum_over_threads<kNormMaxThreads, 0>(sum, blockDim.x, threadIdx.x) / p.hidden_size;
  float squares = 0.f;
  for (int i = first; i < p.hidden_size; i += step) {
    Traits::InVec::load(input + i).to_floats(x);
    squares = add_centred_squares(squares, x, mean);
  }
  squares = sum_over_threads<kNormMaxThreads, 1>(squares, blockDim.x, threadIdx.x);

  const float rsqrt_variance = rsqrtf(squares / p.hidden_size + p.eps);
  const ScaleDivider divide(p.quant_scale ? *p.quant_scale : p.quant_scale_value);
  for (int i = first; i < p.hidden_size; i += step) {
    Traits::InVec::load(input + i).to_floats(x);
    store_scaled<Traits>(p, x, mean, rsqrt_variance, divide, out, i);
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
