// Choose the access width and the grid of a merge, and launch it.
#pragma once

#include <fi_backend/attention/merge_launch.h>

#include <fi_backend/attention/merge.cuh>
#include <fi_backend/common/launch.cuh>

namespace fi {

template <class Traits>
cudaError_t launch_pair(const MergePairParams& p, cudaStream_t stream) {
  const int accesses = p.head_dim / Traits::kVecSize;
  const HeadTile tile =
      make_head_tile(p.num_rows, p.num_heads, (accesses + kPairVecs - 1) / kPairVecs);
  return launch(merge_pair_kernel<Traits>, tile, stream, p.enable_pdl, p);
}

template <class Traits>
cudaError_t launch_states(const MergeStatesParams& p, cudaStream_t stream) {
  const HeadTile tile = make_head_tile(p.num_rows, p.num_heads, p.head_dim / Traits::kVecSize);
  return launch(merge_states_kernel<Traits>, tile, stream, p.enable_pdl, p);
}

template <class In, class Out>
cudaError_t merge_pair(const MergePairParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.num_heads == 0 || p.head_dim == 0) return cudaSuccess;
  constexpr int kVec = kVecSizeFor<In, Out>;
  const bool is_vectorizable =
      p.head_dim % kVec == 0 &&
      is_aligned<In, kVec>(p.v_a, p.a_strides.v_row, p.a_strides.v_head) &&
      is_aligned<In, kVec>(p.v_b, p.b_strides.v_row, p.b_strides.v_head) &&
      is_aligned<Out, kVec>(p.v_out, p.out_strides.v_row, p.out_strides.v_head);
  return is_vectorizable ? launch_pair<MergeTraits<In, Out, kVec>>(p, stream)
                         : launch_pair<MergeTraits<In, Out, 1>>(p, stream);
}

template <class In, class Out>
cudaError_t merge_states(const MergeStatesParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.num_heads == 0 || p.head_dim == 0) return cudaSuccess;
  constexpr int kVec = kVecSizeFor<In, Out>;
  const bool is_vectorizable =
      p.head_dim % kVec == 0 &&
      is_aligned<In, kVec>(p.v, p.in_strides.v_row, p.in_strides.v_head, p.v_state_stride) &&
      is_aligned<Out, kVec>(p.v_out, p.out_strides.v_row, p.out_strides.v_head);
  return is_vectorizable ? launch_states<MergeTraits<In, Out, kVec>>(p, stream)
                         : launch_states<MergeTraits<In, Out, 1>>(p, stream);
}

}  // namespace fi
