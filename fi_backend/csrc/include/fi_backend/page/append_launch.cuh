// Choose the access width and the grid of an append, and launch it.
#pragma once

#include <fi_backend/page/append_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/page/append.cuh>

namespace fi {

template <class Traits>
cudaError_t launch_append_kernel(const AppendParams& p, cudaStream_t stream) {
  const int widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
  const HeadTile tile = make_head_tile(p.num_tokens, p.num_kv_heads, widest / Traits::kVecSize);
  return launch(append_kernel<Traits>, tile, stream, p.enable_pdl, p);
}

template <class In, class Cache>
cudaError_t append(const AppendParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_kv_heads == 0 || (p.head_dim_qk == 0 && p.head_dim_vo == 0)) {
    return cudaSuccess;
  }
  constexpr int kVec = kVecSizeFor<In, Cache>;
  const PageStrides& kc = p.key_cache_strides;
  const PageStrides& vc = p.value_cache_strides;
  const int widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
  const bool is_vectorizable =
      widest <= kVec * kHeadTileThreads && p.head_dim_qk % kVec == 0 && p.head_dim_vo % kVec == 0 &&
      is_aligned<In, kVec>(p.key, p.key_strides.token, p.key_strides.head) &&
      is_aligned<In, kVec>(p.value, p.value_strides.token, p.value_strides.head) &&
      is_aligned<Cache, kVec>(p.key_cache, kc.page, kc.token, kc.head) &&
      is_aligned<Cache, kVec>(p.value_cache, vc.page, vc.token, vc.head);
  return is_vectorizable ? launch_append_kernel<AppendTraits<In, Cache, kVec>>(p, stream)
                         : launch_append_kernel<AppendTraits<In, Cache, 1>>(p, stream);
}

}  // namespace fi
