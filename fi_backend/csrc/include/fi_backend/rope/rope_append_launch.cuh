// Choose the access width and the grid of the fused rope and append, and launch it.
#pragma once

#include <fi_backend/rope/rope_append_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/rope/rope_append.cuh>

namespace fi {

// Lanes of a head, a power of two.
inline int num_rope_append_lanes(const RopeAppendParams& p, int values_per_lane) {
  const int head_dim =
      p.rope.head_dim > p.append.head_dim_vo ? p.rope.head_dim : p.append.head_dim_vo;
  int lanes = 1;
  while (lanes * values_per_lane < head_dim) lanes *= 2;
  return lanes;
}

template <class Traits>
cudaError_t launch_rope_append_kernel(const RopeAppendParams& p, cudaStream_t stream) {
  const int lanes = num_rope_append_lanes(p, 2 * Traits::kVecSize * Traits::kSlots);
  if (lanes > kWarpSize) return cudaErrorInvalidConfiguration;
  const int num_groups = num_rope_append_groups(p, Traits::kHeads);
  const HeadTile tile = make_head_tile(p.rope.num_tokens, num_groups, lanes);
  return launch(rope_append_kernel<Traits>, tile, stream, p.rope.enable_pdl, p);
}

// See launch_rope_aligned; a thread that normalises heads too has enough to do with 4.
template <class In, class Cache, class Angle, int kVecSize>
cudaError_t launch_rope_append_aligned(const RopeAppendParams& p, cudaStream_t stream) {
  constexpr int kHeads = 4;
  const int64_t num_threads = p.rope.num_tokens * num_rope_append_groups(p, kHeads) *
                              num_rope_append_lanes(p, 2 * kVecSize);
  if (num_threads >= kManyThreads) {
    using Traits = RopeAppendTraits<In, Cache, Angle, kVecSize, 1, kHeads>;
    return launch_rope_append_kernel<Traits>(p, stream);
  }
  using Traits = RopeAppendTraits<In, Cache, Angle, kVecSize, 1, 1>;
  return launch_rope_append_kernel<Traits>(p, stream);
}

template <class In, class Cache, class Angle>
cudaError_t rope_append_by(const RopeAppendParams& p, cudaStream_t stream) {
  const RopeParams& r = p.rope;
  const AppendParams& a = p.append;
  constexpr int kVec = kVecSizeFor<In, Cache>;
  const auto is_aligned_in = [](const void* base, int64_t token_stride, int64_t head_stride) {
    return is_aligned<In, kVec>(base, token_stride, head_stride);
  };
  const auto is_aligned_cache = [](const void* base, const PageStrides& s) {
    return is_aligned<Cache, kVec>(base, s.page, s.token, s.head);
  };
  const bool fits_lanes =
      r.head_dim <= 2 * kVec * kWarpSize && a.head_dim_vo <= 2 * kVec * kWarpSize;
  const bool is_vectorizable =
      fits_lanes && r.head_dim % kVec == 0 && a.head_dim_vo % kVec == 0 &&
      r.rotary_dim % (2 * kVec) == 0 && is_aligned<Angle, kVec / 2>(r.cos_sin, r.cos_sin_stride) &&
      is_aligned<In, kVec>(p.q_weight) && is_aligned<In, kVec>(p.k_weight) &&
      is_aligned_in(r.q, r.q_strides.token, r.q_strides.head) &&
      is_aligned_in(r.k, r.k_strides.token, r.k_strides.head) &&
      is_aligned_in(a.value, a.value_strides.token, a.value_strides.head) &&
      is_aligned_in(r.q_out, r.q_out_strides.token, r.q_out_strides.head) &&
      is_aligned_cache(a.key_cache, a.key_cache_strides) &&
      is_aligned_cache(a.value_cache, a.value_cache_strides);
  if (is_vectorizable) {
    return launch_rope_append_aligned<In, Cache, Angle, kVec>(p, stream);
  }
  constexpr int kSlots = kMaxRopeAppendHeadDim / 2 / kWarpSize;
  return launch_rope_append_kernel<RopeAppendTraits<In, Cache, Angle, 1, kSlots, 1>>(p, stream);
}

template <class In, class Cache>
cudaError_t rope_append(const RopeAppendParams& p, cudaStream_t stream) {
  if (p.rope.num_tokens == 0 || p.rope.num_qo_heads + p.rope.num_kv_heads == 0) return cudaSuccess;
  return p.rope.cos_sin_is_float ? rope_append_by<In, Cache, float>(p, stream)
                                 : rope_append_by<In, Cache, In>(p, stream);
}

}  // namespace fi
