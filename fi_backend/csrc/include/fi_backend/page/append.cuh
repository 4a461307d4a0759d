// Write new K and V rows into a paged cache; see append_params.h for where a token goes.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/common/head_tile.h>
#include <fi_backend/page/append_params.h>

#include <fi_backend/common/early_index.cuh>
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

// Where a token goes: asked for by the constructor, before the rows; see EarlyIndex.
class SlotLookup {
 public:
  SlotLookup() = default;
  __device__ __forceinline__ SlotLookup(const AppendParams& p, int64_t token)
      : by_slot_(p.slot_mapping != nullptr) {
    if (by_slot_) {
      slot_ = {{p.slot_mapping, p.slot_mapping_is_int64}, token};
    } else {
      request_ = p.batch_indices[token];
      position_ = p.positions[token];
    }
  }

  __device__ __forceinline__ CacheSlot find(const AppendParams& p) {
    constexpr CacheSlot kSkip = {-1, 0};
    if (by_slot_) {
      const int64_t slot = slot_.get();
      if (slot < 0) return kSkip;
      const QuotRem at = slot >> 31 == 0 ? find_in_pages(p, static_cast<int32_t>(slot))
                                         : divide_index(slot, p.page_size);
      return at.quot < p.num_pages ? CacheSlot{at.quot, at.rem} : kSkip;
    }
    use_from_here(request_, position_);
    if (request_ < 0 || request_ >= p.num_requests || position_ < 0) return kSkip;
    const int64_t begin = p.kv_indptr[request_], end = p.kv_indptr[request_ + 1];
    const QuotRem at = find_in_pages(p, position_);
    const int64_t entry = begin + at.quot;
    if (entry < 0 || entry >= end || entry >= p.num_kv_indices) return kSkip;
    const int32_t page = p.kv_indices[entry];
    return page >= 0 && page < p.num_pages ? CacheSlot{page, at.rem} : kSkip;
  }

 private:
  // NOTE: no division, 40 dependent instructions between an index's arrival and the first store.
  __device__ __forceinline__ static QuotRem find_in_pages(const AppendParams& p, int32_t index) {
    const int32_t page = p.by_page_size(uint32_t(index));
    return {page, index - page * p.page_size};
  }

  bool by_slot_;
  EarlyIndex slot_;
  int32_t request_, position_;
};

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

// Copy kVecSize values of one head of k and v, from element i on.
template <class Traits>
__device__ __forceinline__ void append_values(const AppendParams& p, int64_t token, int head, int i,
                                              SlotLookup& lookup) {
  using In = typename Traits::In;
  using Cache = typename Traits::Cache;
  using InVec = typename Traits::InVec;
  const In* key =
      static_cast<const In*>(p.key) + token * p.key_strides.token + head * p.key_strides.head;
  const In* value =
      static_cast<const In*>(p.value) + token * p.value_strides.token + head * p.value_strides.head;
  // Start all loads before the slot is needed: it and they come in one trip.
  InVec k, v;
  if (i < p.head_dim_qk) k = InVec::load(key + i);
  if (i < p.head_dim_vo) v = InVec::load(value + i);
  const float k_scale = p.k_scale ? p.k_scale[head * p.k_scale_head_stride] : p.k_scale_value;
  const float v_scale = p.v_scale ? p.v_scale[head * p.v_scale_head_stride] : p.v_scale_value;
  const CacheSlot slot = lookup.find(p);
  if (slot.page < 0) return;

  const PageStrides& kc = p.key_cache_strides;
  const PageStrides& vc = p.value_cache_strides;
  Cache* key_cache = static_cast<Cache*>(p.key_cache) + slot.page * kc.page +
                     slot.offset * kc.token + head * kc.head;
  Cache* value_cache = static_cast<Cache*>(p.value_cache) + slot.page * vc.page +
                       slot.offset * vc.token + head * vc.head;
  if (i < p.head_dim_qk) to_cache<Traits>(k, k_scale).store(key_cache + i);
  if (i < p.head_dim_vo) to_cache<Traits>(v, v_scale).store(value_cache + i);
}

// Block and grid: HeadTile over [num_tokens, num_kv_heads, max(head_dim_qk, head_dim_vo)]; where
// values move in vectors, all accesses of a head are in one block.
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads)
    append_kernel(const __grid_constant__ AppendParams p) {
  constexpr int kVecSize = Traits::kVecSize;
  ptx::grid_dependency_wait();

  const auto [token, head] = head_tile_position();
  if (token >= p.num_tokens || head >= p.num_kv_heads) return;
  SlotLookup lookup(p, token);
  if constexpr (kVecSize > 1) {
    append_values<Traits>(p, token, head, threadIdx.x * kVecSize, lookup);
  } else {
    const int widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
    for (int i = threadIdx.x; i < widest; i += blockDim.x) {
      append_values<Traits>(p, token, head, i, lookup);
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
