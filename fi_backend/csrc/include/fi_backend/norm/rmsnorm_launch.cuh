// Choose the kernel, the access width and the grid of an RMS norm, and launch it.
#pragma once

#include <fi_backend/norm/rmsnorm_launch.h>

#include <fi_backend/norm/norm_rows_launch.cuh>
#include <fi_backend/norm/rmsnorm.cuh>

namespace fi {

// Address rows of several inner positions as one dimension where the strides allow it, which spares
// a division per row.
inline void collapse_rows(RmsNormParams& p) {
  const bool residual_is_flat = p.residual == nullptr || is_flat(p.residual_strides, p.num_inner);
  if (!is_flat(p.input_strides, p.num_inner) || !is_flat(p.out_strides, p.num_inner) ||
      !residual_is_flat) {
    return;
  }
  p.input_strides.outer = p.input_strides.inner;
  p.out_strides.outer = p.out_strides.inner;
  p.residual_strides.outer = p.residual_strides.inner;
  p.num_outer *= p.num_inner;
  p.num_inner = 1;
}

// With a residual, weights kept in registers from the first load to the last store would leave room
// for an eighth fewer blocks: they are read behind the sum. From so many accesses of x on, other
// blocks fill that wait. Where there are fewer, shared memory has them, asked for before the rows.
inline constexpr int64_t kManyNormAccesses = 1 << 23;

template <class Traits>
cudaError_t launch_rmsnorm_kernel(const RmsNormParams& params, cudaStream_t stream) {
  void (*in_registers)(RmsNormParams) = nullptr;
  if constexpr (Traits::kVecSize > 1) in_registers = rmsnorm_kernel<Traits>;
  const int num_vecs = params.hidden_size / Traits::kVecSize;
  RmsNormParams p = params;
  p.stages_weight =
      Traits::kHasResidual && p.num_outer * p.num_inner * num_vecs < kManyNormAccesses;
  const int shared_bytes = p.stages_weight ? kNormVecsPerThread * kMaxAccessBytes : 0;
  return launch_norm_rows(in_registers, rmsnorm_long_kernel<Traits>, num_vecs, p, stream,
                          shared_bytes);
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
