// Choose the kernel, the access width and the grid of an RMS norm, and launch it.
#pragma once

#include <fi_backend/norm/rmsnorm_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/norm/rmsnorm.cuh>

namespace fi {

// Resident threads per SM that the grid aims at. The grid strides over rows, so another number is
// only slower.
inline constexpr int kRmsNormThreadsPerSm = 1024;

// Address rows of several inner positions as one dimension where the strides allow it, which spares
// a division per row.
inline void collapse_rows(RmsNormParams& p) {
  const auto is_flat = [&](const RowStrides& s) { return s.outer == s.inner * p.num_inner; };
  const bool residual_is_flat = p.residual == nullptr || is_flat(p.residual_strides);
  if (p.num_inner == 1 || !is_flat(p.input_strides) || !is_flat(p.out_strides) ||
      !residual_is_flat) {
    return;
  }
  p.input_strides.outer = p.input_strides.inner;
  p.out_strides.outer = p.out_strides.inner;
  p.residual_strides.outer = p.residual_strides.inner;
  p.num_outer *= p.num_inner;
  p.num_inner = 1;
}

// Blocks for all rows, at most what the device holds at once, each with equally many turns.
inline cudaError_t get_num_blocks(int64_t num_rows, dim3 block, int64_t* num_blocks) {
  int num_sms = 0;
  const cudaError_t error = get_num_sms(&num_sms);
  if (error != cudaSuccess) return error;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks_wanted = ceil_div(num_rows, block.y);
  const int64_t max_blocks = num_sms * ceil_div(kRmsNormThreadsPerSm, block.x * block.y);
  *num_blocks = ceil_div(blocks_wanted, ceil_div(blocks_wanted, max_blocks));
  return cudaSuccess;
}

template <class Traits>
cudaError_t launch_rmsnorm_kernel(const RmsNormParams& p, cudaStream_t stream) {
  const int num_vecs = p.hidden_size / Traits::kVecSize;
  const auto fit_block = [&](int vecs_per_thread) {
    const int threads = (num_vecs + vecs_per_thread - 1) / vecs_per_thread;
    unsigned x = 1;
    while (x < kWarpSize && int(x) < threads) x *= 2;
    if (threads > kWarpSize) x = (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
    return x <= kWarpSize ? dim3(x, 4 * kWarpSize / x) : dim3(x);
  };
  const auto launch_with = [&](void (*kernel)(RmsNormParams), dim3 block) {
    int64_t num_blocks = 0;
    const cudaError_t error = get_num_blocks(p.num_outer * p.num_inner, block, &num_blocks);
    if (error != cudaSuccess) return error;
    return launch(kernel, num_blocks, block, stream, p.enable_pdl, p);
  };
  // Few accesses a row: fewer a thread, so that a row still has a warp.
  if constexpr (Traits::kVecSize > 1) {
    if (num_vecs <= kWarpSize) return launch_with(rmsnorm_kernel<Traits, 1>, fit_block(1));
    if (num_vecs <= 2 * kWarpSize) return launch_with(rmsnorm_kernel<Traits, 2>, fit_block(2));
    if (num_vecs <= 4 * kRmsNormMaxThreads) {
      return launch_with(rmsnorm_kernel<Traits, 4>, fit_block(4));
    }
  }
  return launch_with(rmsnorm_long_kernel<Traits>, dim3(kRmsNormMaxThreads));
}

template <class In, class Out, bool kHasResidual>
cudaError_t launch_rmsnorm_aligned(const RmsNormParams& p, cudaStream_t stream) {
  constexpr int kVec = kVecSizeFor<In, Out>;
  const bool residual_is_aligned =
      !kHasResidual ||
      is_aligned<In, kVec>(p.residual, p.residual_strides.outer, p.residual_strides.inner);
  const bool is_vectorizable =
      p.hidden_size % kVec == 0 && residual_is_aligned && is_aligned<In, kVec>(p.weight) &&
      is_aligned<In, kVec>(p.input, p.input_strides.outer, p.input_strides.inner) &&
      is_aligned<Out, kVec>(p.out, p.out_strides.outer, p.out_strides.inner);
  return is_vectorizable
             ? launch_rmsnorm_kernel<RmsNormTraits<In, Out, kVec, kHasResidual>>(p, stream)
             : launch_rmsnorm_kernel<RmsNormTraits<In, Out, 1, kHasResidual>>(p, stream);
}

template <class In, class Out>
cudaError_t rmsnorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_outer == 0 || params.num_inner == 0 || params.hidden_size == 0) {
    return cudaSuccess;
  }
  RmsNormParams p = params;
  collapse_rows(p);
  return p.residual != nullptr ? launch_rmsnorm_aligned<In, Out, true>(p, stream)
                               : launch_rmsnorm_aligned<In, Out, false>(p, stream);
}

}  // namespace fi
