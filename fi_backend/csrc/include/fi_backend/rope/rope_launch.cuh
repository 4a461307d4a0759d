// Choose the kernel, the access width and the grid of a rotary embedding, and launch it.
#pragma once

#include <fi_backend/rope/rope_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/rope/rope.cuh>

namespace fi {

template <int kVecSize>
int num_rope_slots(const RopeParams& p) {
  const bool in_place = p.q == p.q_out && p.k == p.k_out;
  const int num_values = in_place ? p.rotary_dim : p.head_dim;
  return (num_values + 2 * kVecSize - 1) / (2 * kVecSize);
}

template <class T, int kVecSize, int kHeads>
cudaError_t launch_rope_kernel(const RopeParams& p, cudaStream_t stream) {
  const int num_groups = num_rope_groups(p, kHeads);
  const HeadTile tile = make_head_tile(p.num_tokens, num_groups, num_rope_slots<kVecSize>(p));
  if (p.cos_sin != nullptr) {
    const auto kernel = rope_kernel<RopeTraits<T, kVecSize, kHeads, false>>;
    return launch(kernel, tile, stream, p.enable_pdl, p);
  }
  const int shared_bytes = tile.z * p.rotary_dim * int(sizeof(float));
  const auto kernel = rope_kernel<RopeTraits<T, kVecSize, kHeads, true>>;
  return launch(kernel, tile, shared_bytes, stream, p.enable_pdl, p);
}

// Many tokens: 4 heads a thread, so that angles, which take twice the bytes of 16-bit values, are
// read once for all of them. Few: one, see kManyThreads.
template <class T, int kVecSize>
cudaError_t launch_rope_aligned(const RopeParams& p, cudaStream_t stream) {
  constexpr int kHeads = 4;
  const int64_t num_threads =
      p.num_tokens * num_rope_groups(p, kHeads) * num_rope_slots<kVecSize>(p);
  return num_threads >= kManyThreads ? launch_rope_kernel<T, kVecSize, kHeads>(p, stream)
                                     : launch_rope_kernel<T, kVecSize, 1>(p, stream);
}

template <class T>
cudaError_t rope(const RopeParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_qo_heads + p.num_kv_heads == 0) return cudaSuccess;
  constexpr int kVec = kVecSizeFor<T, T>;
  const auto is_aligned_to_vec = [](const void* base, const RopeStrides& strides) {
    return is_aligned<T, kVec>(base, strides.token, strides.head);
  };
  const bool is_vectorizable =
      num_rope_slots<kVec>(p) <= kHeadTileThreads && p.head_dim % kVec == 0 &&
      p.rotary_dim % (2 * kVec) == 0 && is_aligned<float, kVec / 2>(p.cos_sin, p.cos_sin_stride) &&
      is_aligned_to_vec(p.q, p.q_strides) && is_aligned_to_vec(p.k, p.k_strides) &&
      is_aligned_to_vec(p.q_out, p.q_out_strides) && is_aligned_to_vec(p.k_out, p.k_out_strides);
  return is_vectorizable ? launch_rope_aligned<T, kVec>(p, stream)
                         : launch_rope_kernel<T, 1, 1>(p, stream);
}

}  // namespace fi
