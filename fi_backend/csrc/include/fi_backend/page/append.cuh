// Write new K and V rows into a paged cache; see append_params.h for where a token goes.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/common/head_tile.h>
#include <fi_backend/common/index_array.h>
#include <fi_backend/page/append_params.h>

#include <fi_backend/common/scale_divider.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

// In stores the new rows, Cache the cache; kVecSize elements of a head move as one access.
template <class In_, class Cache_, int kVecSize_>
struct AppendTraits {
  using In = In_;
  using Cache = Cache_;
  static constexpr int kVecSize = kVecSize_;
  using InVec = Vec<In, kVecSize>;
  using CacheVec = Vec<Cache, kVecSize>;
};

struct CacheSlot {
  int64_t page;  // -1 = write nothing
  int64_t offset;
};

__device__ __forceinline__ CacheSlot find_slot(const AppendParams& p, int64_t token) {
  constexpr CacheSlot kSkip = {-1, 0};
  if (p.slot_mapping != nullptr) {
    const int64_t slot = IndexArray{p.slot_mapping, p.slot_mapping_is_int64}[token];
    if (slot < 0) return kSkip;
    const QuotRem at = divide_index(slot, p.page_size);
    return at.quot < p.num_pages ? CacheSlot{at.quot, at.rem} : kSkip;
  }
  const int32_t request = p.batch_indices[token];
  const int32_t position = p.positions[token];
  if (request < 0 || request >= p.num_requests || position < 0) return kSkip;
  const int64_t entry = int64_t(p.kv_indptr[request]) + position / p.page_size;
  if (entry < 0 || entry >= p.kv_indptr[request + 1] || entry >= p.num_kv_indices) return kSkip;
  const int32_t page = p.kv_indices[entry];
  return page >= 0 && page < p.num_pages ? CacheSlot{page, position % p.page_size} : kSkip;
}

// Round to the cache's type.
template <class Traits>
__device__ __forceinline__ typename Traits::CacheVec round_to_cache(float (&x)[Traits::kVecSize],
                                                                    float scale) {
  if constexpr (kIsFp8<typename Traits::Cache>) {
    const ScaleDivider divide(scale);
#pragma unroll
    for (float& element : x) element = divide(element);
  }
  return Traits::CacheVec::from_floats(x);
}

// Convert to the cache's type. Equal types are copied, so that every bit, NaNs too, stays.
template <class Traits>
__device__ __forceinline__ typename Traits::CacheVec to_cache(const typename Traits::InVec& vec,
                                                              float scale) {
  if constexpr (kIsSame<typename Traits::In, typename Traits::Cache>) {
    return {vec.word};
  } else {
    float x[Traits::kVecSize];
    vec.to_floats(x);
    return round_to_cache<Traits>(x, scale);
  }
}

// Block and grid: HeadTile over [num_tokens, num_kv_heads, max(head_dim_qk, head_dim_vo)].
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads)
    append_kernel(const __grid_constant__ AppendParams p) {
  using In = typename Traits::In;
  using Cache = typename Traits::Cache;
  using InVec = typename Traits::InVec;
  const PageStrides& kc = p.key_cache_strides;
  const PageStrides& vc = p.value_cache_strides;
  ptx::grid_dependency_wait();

  const auto [token, head] = head_tile_position();
  if (token >= p.num_tokens || head >= p.num_kv_heads) return;
  const In* key =
      static_cast<const In*>(p.key) + token * p.key_strides.token + head * p.key_strides.head;
  const In* value =
      static_cast<const In*>(p.value) + token * p.value_strides.token + head * p.value_strides.head;
  const CacheSlot slot = find_slot(p, token);
  Cache* key_cache = static_cast<Cache*>(p.key_cache) + slot.page * kc.page +
                     slot.offset * kc.token + head * kc.head;
  Cache* value_cache = static_cast<Cache*>(p.value_cache) + slot.page * vc.page +
                       slot.offset * vc.token + head * vc.head;
  const float k_scale = p.k_scale ? p.k_scale[head * p.k_scale_head_stride] : p.k_scale_value;
  const float v_scale = p.v_scale ? p.v_scale[head * p.v_scale_head_stride] : p.v_scale_value;

  const int widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
  for (int i = threadIdx.x * Traits::kVecSize; i < widest; i += blockDim.x * Traits::kVecSize) {
    // Read both rows before the slot is needed: its look-up and these loads overlap.
    InVec k, v;
    if (i < p.head_dim_qk) k = InVec::load_once(key + i);
    if (i < p.head_dim_vo) v = InVec::load_once(value + i);
    if (slot.page < 0) continue;
    if (i < p.head_dim_qk) to_cache<Traits>(k, k_scale).store(key_cache + i);
    if (i < p.head_dim_vo) to_cache<Traits>(v, v_scale).store(value_cache + i);
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
