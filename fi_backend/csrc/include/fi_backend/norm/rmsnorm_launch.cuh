// Choose the kernel, the access width and the grid of an RMS norm, and launch it.
#pragma once

#include <fi_backend/norm/rmsnorm_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/norm/rmsnorm.cuh>

namespace fi {

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

// The block that gives a row of `num_vecs` accesses to threads of `vecs_per_thread` each.
inline dim3 make_row_block(int num_vecs, int vecs_per_thread) {
  constexpr unsigned kMinThreads = 128;
  const unsigned threads = (num_vecs + vecs_per_thread - 1) / vecs_per_thread;
  if (threads > kWarpSize) return dim3((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  unsigned lanes = 1;
  while (lanes < threads) lanes *= 2;
  return dim3(lanes, kMinThreads / lanes);
}

template <class Traits>
cudaError_t launch_rmsnorm_kernel(const RmsNormParams& p, cudaStream_t stream) {
  const auto launch_with = [&](void (*kernel)(RmsNormParams), dim3 block) {
    const int64_t num_blocks = (p.num_outer * p.num_inner + block.y - 1) / block.y;
    return launch(kernel, num_blocks, block, stream, p.enable_pdl, p);
  };
  const int num_vecs = p.hidden_size / Traits::kVecSize;
  // A thread takes several accesses where the row still has a warp then.
  if constexpr (Traits::kVecSize > 1) {
    if (num_vecs <= kWarpSize) {
      return launch_with(rmsnorm_kernel<Traits, 1>, make_row_block(num_vecs, 1));
    }
    if (num_vecs <= 2 * kWarpSize) {
      return launch_with(rmsnorm_kernel<Traits, 2>, make_row_block(num_vecs, 2));
    }
    if (num_vecs <= 4 * kRmsNormMaxThreads) {
      return launch_with(rmsnorm_kernel<Traits, 4>, make_row_block(num_vecs, 4));
    }
  }
  const int warps = (num_vecs + kWarpSize - 1) / kWarpSize;
  constexpr int kMaxWarps = kRmsNormMaxThreads / kWarpSize;
  return launch_with(rmsnorm_long_kernel<Traits>,
                     dim3((warps < kMaxWarps ? warps : kMaxWarps) * kWarpSize));
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
