// RMS norm of rows, with an optional residual added first; see norm_params.h for the formula.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/norm/norm_params.h>

#include <fi_backend/common/reduce.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kRmsNormMaxThreads = 512;

// In stores input, residual and weight, Out the result; kVecSize elements move as one access.
template <class In_, class Out_, int kVecSize_, bool kHasResidual_>
struct RmsNormTraits {
  using In = In_;
  using Out = Out_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr bool kHasResidual = kHasResidual_;
  using InVec = Vec<In, kVecSize>;
  using OutVec = Vec<Out, kVecSize>;
};

// The pointers of one row.
template <class Traits>
struct RmsNormRow {
  const typename Traits::In* input;
  typename Traits::In* residual;
  typename Traits::Out* out;

  __device__ __forceinline__ RmsNormRow(const RmsNormParams& p, int64_t row) {
    QuotRem at = {row, 0};
    if (p.num_inner != 1) at = divide_index(row, p.num_inner);
    const auto offset = [&](const RowStrides& strides) {
      return at.quot * strides.outer + at.rem * strides.inner;
    };
    input = static_cast<const typename Traits::In*>(p.input) + offset(p.input_strides);
    if constexpr (Traits::kHasResidual) {
      residual = static_cast<typename Traits::In*>(p.residual) + offset(p.residual_strides);
    }
    out = static_cast<typename Traits::Out*>(p.out) + offset(p.out_strides);
  }
};

// What a thread holds of a row, as loaded.
template <class Traits, int kVecsPerThread>
struct RmsNormSlice {
  typename Traits::InVec input[kVecsPerThread];
  typename Traits::InVec residual[Traits::kHasResidual ? kVecsPerThread : 1];

  // Accesses of neighbouring threads are neighbours in memory.
  __device__ __forceinline__ void load(const RmsNormRow<Traits>& row, int hidden_size) {
#pragma unroll
    for (int v = 0; v < kVecsPerThread; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * Traits::kVecSize;
      if (i >= hidden_size) break;
      input[v] = Traits::InVec::load_once(row.input + i);
      if constexpr (Traits::kHasResidual) {
        residual[v] = Traits::InVec::load_once(row.residual + i);
      }
    }
  }
};

// x = input, or input + residual.
template <class Traits>
__device__ __forceinline__ void get_x(const typename Traits::InVec& input,
                                      const typename Traits::InVec& residual,
                                      float (&x)[Traits::kVecSize]) {
  input.to_floats(x);
  if constexpr (Traits::kHasResidual) {
    float r[Traits::kVecSize];
    residual.to_floats(r);
#pragma unroll
    for (int i = 0; i < Traits::kVecSize; ++i) x[i] += r[i];
  }
}

template <int kVecSize>
__device__ __forceinline__ float add_squares(float sum, const float (&x)[kVecSize]) {
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) sum += x[i] * x[i];
  return sum;
}

// Scale x in place by rsqrt(mean square), the weight and the output's quantisation.
template <class Traits>
__device__ __forceinline__ typename Traits::OutVec scale_x(float (&x)[Traits::kVecSize],
                                                           const typename Traits::InVec& weight,
                                                           float rsqrt_mean, float weight_bias,
                                                           float quant_scale) {
  float w[Traits::kVecSize];
  weight.to_floats(w);
#pragma unroll
  for (int i = 0; i < Traits::kVecSize; ++i) {
    x[i] = x[i] * rsqrt_mean * (w[i] + weight_bias);
    if constexpr (kIsFp8<typename Traits::Out>) x[i] /= quant_scale;
  }
  return Traits::OutVec::from_floats(x);
}

// Rows that fit in the registers of one block: read once, the next row in flight while this one is
// reduced. Block: x = threads of a row (a power of two up to a warp, or whole warps and then y =
// 1), y = rows. The grid strides over rows; the weight stays in registers.
template <class Traits, int kVecsPerThread>
__global__ void __launch_bounds__(kRmsNormMaxThreads)
    rmsnorm_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kVecSize = Traits::kVecSize;
  __shared__ float scratch[2][kRmsNormMaxThreads / kWarpSize];
  BlockSum<kRmsNormMaxThreads / kWarpSize> block_sum{scratch};
  ptx::grid_dependency_wait();

  const int64_t num_rows = p.num_outer * p.num_inner;
  const int64_t row_step = int64_t(gridDim.x) * blockDim.y;
  const float quant_scale = p.quant_scale ? *p.quant_scale : p.quant_scale_value;
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;

  RmsNormSlice<Traits, kVecsPerThread> next;
  if (row < num_rows) next.load(RmsNormRow<Traits>(p, row), p.hidden_size);
  typename Traits::InVec weight[kVecsPerThread];
#pragma unroll
  for (int v = 0; v < kVecsPerThread; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * kVecSize;
    if (i < p.hidden_size) {
      weight[v] = Traits::InVec::load(static_cast<const typename Traits::In*>(p.weight) + i);
    }
  }

  // All rows of a block take part in every turn: its barriers and shuffles need every thread.
  for (int64_t first_row = row - threadIdx.y; first_row < num_rows;
       first_row += row_step, row += row_step) {
    const RmsNormSlice<Traits, kVecsPerThread> slice = next;
    if (row + row_step < num_rows) next.load(RmsNormRow<Traits>(p, row + row_step), p.hidden_size);

    const bool is_row = row < num_rows;
    const RmsNormRow<Traits> out(p, is_row ? row : 0);
    float x[kVecsPerThread][kVecSize];
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < kVecsPerThread; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * kVecSize;
      if (!is_row || i >= p.hidden_size) break;
      get_x<Traits>(slice.input[v], slice.residual[Traits::kHasResidual ? v : 0], x[v]);
      if constexpr (Traits::kHasResidual) Traits::InVec::from_floats(x[v]).store(out.residual + i);
      sum = add_squares(sum, x[v]);
    }
    sum = blockDim.x <= kWarpSize ? sum_over_lanes(sum, blockDim.x)
                                  : block_sum(sum, threadIdx.x, blockDim.x / kWarpSize);
    const float rsqrt_mean = rsqrtf(sum / p.hidden_size + p.eps);
#pragma unroll
    for (int v = 0; v < kVecsPerThread; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * kVecSize;
      if (!is_row || i >= p.hidden_size) break;
      scale_x<Traits>(x[v], weight[v], rsqrt_mean, p.weight_bias, quant_scale).store(out.out + i);
    }
  }
  ptx::grid_dependency_launch();
}

// Rows of any length and alignment: a block reads its row twice, the second time from cache.
// Block: x = whole warps.
template <class Traits>
__global__ void __launch_bounds__(kRmsNormMaxThreads)
    rmsnorm_long_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kVecSize = Traits::kVecSize;
  using InVec = typename Traits::InVec;
  __shared__ float scratch[2][kRmsNormMaxThreads / kWarpSize];
  BlockSum<kRmsNormMaxThreads / kWarpSize> block_sum{scratch};
  ptx::grid_dependency_wait();

  const auto* weight = static_cast<const typename Traits::In*>(p.weight);
  const float quant_scale = p.quant_scale ? *p.quant_scale : p.quant_scale_value;
  for (int64_t r = blockIdx.x; r < p.num_outer * p.num_inner; r += gridDim.x) {
    const RmsNormRow<Traits> row(p, r);
    const auto load_x = [&](int i, float(&x)[kVecSize]) {
      InVec residual = {};
      if constexpr (Traits::kHasResidual) residual = InVec::load(row.residual + i);
      get_x<Traits>(InVec::load(row.input + i), residual, x);
    };
    float x[kVecSize];
    float sum = 0.f;
    for (int i = threadIdx.x * kVecSize; i < p.hidden_size; i += blockDim.x * kVecSize) {
      load_x(i, x);
      sum = add_squares(sum, x);
    }
    sum = block_sum(sum, threadIdx.x, blockDim.x / kWarpSize);
    const float rsqrt_mean = rsqrtf(sum / p.hidden_size + p.eps);
    for (int i = threadIdx.x * kVecSize; i < p.hidden_size; i += blockDim.x * kVecSize) {
      load_x(i, x);
      if constexpr (Traits::kHasResidual) InVec::from_floats(x).store(row.residual + i);
      scale_x<Traits>(x, InVec::load(weight + i), rsqrt_mean, p.weight_bias, quant_scale)
          .store(row.out + i);
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
