// RMS norm of rows, with an optional residual added first; see norm_params.h for the formula.
#pragma once

#include <fi_backend/norm/norm_params.h>

#include <fi_backend/common/scale_divider.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/norm/norm_rows.cuh>
#include <fi_backend/ptx/cp_async.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>

namespace fi {

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
    using In = typename Traits::In;
    const QuotRem at = find_row(row, p.num_inner);
    input = row_at(static_cast<const In*>(p.input), p.input_strides, at);
    if constexpr (Traits::kHasResidual) {
      residual = row_at(static_cast<In*>(p.residual), p.residual_strides, at);
    }
    out = row_at(static_cast<typename Traits::Out*>(p.out), p.out_strides, at);
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
                                                           const ScaleDivider& divide) {
  float w[Traits::kVecSize];
  weight.to_floats(w);
#pragma unroll
  for (int i = 0; i < Traits::kVecSize; ++i) {
    x[i] = x[i] * rsqrt_mean * (w[i] + weight_bias);
    if constexpr (kIsQuantized<typename Traits::Out>) x[i] = divide(x[i]);
  }
  return Traits::OutVec::from_floats(x);
}

// Copy a thread's weights, which are blockDim.x accesses apart, to shared memory. Return where they
// are, as far apart, once the thread has waited for them.
template <class InVec>
__device__ __forceinline__ const InVec* stage_weights(const InVec* weights, int num_vecs) {
  static_assert(sizeof(InVec) == sizeof(uint4), "one copy moves one access");
  extern __shared__ uint4 staged_weights[];  // [blockDim.y, kNormVecsPerThread, blockDim.x]
  uint4* staged = staged_weights + threadIdx.y * kNormVecsPerThread * blockDim.x + threadIdx.x;
  const uint32_t address = ptx::shared_address(staged);
#pragma unroll
  for (int v = 0; v < kNormVecsPerThread; ++v) {
    const int step = v * blockDim.x;
    const bool is_mine = step + int(threadIdx.x) < num_vecs;
    if (is_mine) ptx::cp_async_16_in_l1(address + step * int(sizeof(uint4)), weights + step);
  }
  ptx::cp_async_commit();
  return reinterpret_cast<const InVec*>(staged);
}

// Rows that fit in the registers of one block, so that they are read once. Block: x = threads of a
// row (a power of two up to a warp, or whole warps and then y = 1), y = rows; grid: all rows.
// Dynamic shared memory: where p.stages_weight, kNormVecsPerThread accesses a thread.
template <class Traits>
__global__ void __launch_bounds__(kNormMaxThreads)
    rmsnorm_kernel(const __grid_constant__ RmsNormParams p) {
  using In = typename Traits::In;
  using InVec = typename Traits::InVec;
  constexpr int kVecSize = Traits::kVecSize;
  constexpr int kVecs = kNormVecsPerThread;
  ptx::grid_dependency_wait();

  // Threads without a row go on: the reduction needs all of them.
  const int64_t row_idx = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool has_row = row_idx < p.num_outer * p.num_inner;
  const RmsNormRow<Traits> row(p, has_row ? row_idx : 0);
  // Accesses of neighbouring threads are neighbours in memory.
  const auto element = [](int v) { return int(v * blockDim.x + threadIdx.x) * kVecSize; };
  const int num_elements = has_row ? p.hidden_size : 0;
  const auto is_mine = [&](int v) { return element(v) < num_elements; };

  // Start every load before the first use. NOTE: these loads allocate in L1, although nothing is
  // read again: the kernel is 3 % slower on an H200 where they do not.
  InVec input[kVecs], residual[kVecs], weight[kVecs];
  const InVec* late_weights = static_cast<const InVec*>(p.weight) + threadIdx.x;
  if constexpr (!Traits::kHasResidual) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (is_mine(v)) weight[v] = InVec::load(static_cast<const In*>(p.weight) + element(v));
    }
  } else if (p.stages_weight) {
    late_weights = stage_weights(late_weights, num_elements / kVecSize);
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    input[v] = InVec::load(row.input + element(v));
    if constexpr (Traits::kHasResidual) residual[v] = InVec::load(row.residual + element(v));
  }
  float x[kVecs][kVecSize];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    get_x<Traits>(input[v], residual[v], x[v]);
    sum = add_squares(sum, x[v]);
  }
  sum = sum_over_threads<kNormMaxThreads>(sum, blockDim.x, threadIdx.x);

  const float rsqrt_mean = rsqrtf(sum / p.hidden_size + p.eps);
  const ScaleDivider divide(p.quant_scale ? *p.quant_scale : p.quant_scale_value);
  if constexpr (Traits::kHasResidual) ptx::cp_async_wait<0>();
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!is_mine(v)) break;
    if constexpr (Traits::kHasResidual) weight[v] = late_weights[v * blockDim.x];
    // Both results leave together: memory turns round from reads to writes once a row.
    if constexpr (Traits::kHasResidual) InVec::from_floats(x[v]).store(row.residual + element(v));
    scale_x<Traits>(x[v], weight[v], rsqrt_mean, p.weight_bias, divide).store(row.out + element(v));
  }
  ptx::grid_dependency_launch();
}

// Rows of any length and alignment: a block reads its row twice, the second time from cache.
// Block: x = whole warps; grid: all rows.
template <class Traits>
__global__ void __launch_bounds__(kNormMaxThreads)
    rmsnorm_long_kernel(const __grid_constant__ RmsNormParams p) {
  using In = typename Traits::In;
  using InVec = typename Traits::InVec;
  constexpr int kVecSize = Traits::kVecSize;
  ptx::grid_dependency_wait();

  const RmsNormRow<Traits> row(p, blockIdx.x);
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
  sum = sum_over_threads<kNormMaxThreads>(sum, blockDim.x, threadIdx.x);

  const float rsqrt_mean = rsqrtf(sum / p.hidden_size + p.eps);
  const ScaleDivider divide(p.quant_scale ? *p.quant_scale : p.quant_scale_value);
  for (int i = threadIdx.x * kVecSize; i < p.hidden_size; i += blockDim.x * kVecSize) {
    load_x(i, x);
    const InVec weight = InVec::load(static_cast<const In*>(p.weight) + i);
    if constexpr (Traits::kHasResidual) InVec::from_floats(x).store(row.residual + i);
    scale_x<Traits>(x, weight, rsqrt_mean, p.weight_bias, divide).store(row.out + i);
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
