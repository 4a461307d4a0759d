// Which heads a thread of the fused step holds, where they come from and where they go.
#pragma once

#include <fi_backend/rope/rope_append_params.h>

#include <fi_backend/page/append.cuh>
#include <fi_backend/rope/rotate.cuh>

namespace fi {

// In stores q, k and v, Cache the cache, Angle cosines and sines; kVecSize elements of a head move
// as one access. A thread holds kSlots slots of up to kHeads heads in registers, from load to
// store.
template <class In_, class Cache_, class Angle_, int kVecSize_, int kSlots_, int kHeads_>
struct RopeAppendTraits : AppendTraits<In_, Cache_, kVecSize_> {
  using Angle = Angle_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kHeads = kHeads_;
};

FI_HOST_DEVICE int num_rope_append_groups(const RopeAppendParams& p, int heads_per_thread) {
  return num_head_groups(p.rope.num_qo_heads, heads_per_thread) +
         2 * num_head_groups(p.rope.num_kv_heads, heads_per_thread);
}

enum class RowKind { kQuery, kKey, kValue };

// The heads of one thread, all of q, of k or of v.
template <class Traits>
struct QkvHeads {
  using In = typename Traits::In;
  RowKind kind;
  int first;
  int count;  // those of this kind from first on
  int head_dim;
  int rotary_dim;  // 0 for v
  const In* from;
  int64_t from_stride;
  const In* weight;  // nullptr = not normalised

  // Groups of q come first, then those of k, then those of v.
  __device__ __forceinline__ QkvHeads(const RopeAppendParams& p, int64_t token, int group) {
    const int q_groups = num_head_groups(p.rope.num_qo_heads, Traits::kHeads);
    const int kv_groups = num_head_groups(p.rope.num_kv_heads, Traits::kHeads);
    const int of_key = group - q_groups, of_value = of_key - kv_groups;
    kind = of_key < 0 ? RowKind::kQuery : of_value < 0 ? RowKind::kKey : RowKind::kValue;
    const bool is_q = kind == RowKind::kQuery, is_v = kind == RowKind::kValue;
    first = (is_q ? group : is_v ? of_value : of_key) * Traits::kHeads;
    count = (is_q ? p.rope.num_qo_heads : p.rope.num_kv_heads) - first;
    head_dim = is_v ? p.append.head_dim_vo : p.rope.head_dim;
    rotary_dim = is_v ? 0 : p.rope.rotary_dim;
    const void* rows = is_q ? p.rope.q : is_v ? p.append.value : p.rope.k;
    const RopeStrides& k_or_q = is_q ? p.rope.q_strides : p.rope.k_strides;
    from_stride = is_v ? p.append.value_strides.head : k_or_q.head;
    from = static_cast<const In*>(rows) + first * from_stride +
           token * (is_v ? p.append.value_strides.token : k_or_q.token);
    weight = static_cast<const In*>(is_q ? p.q_weight : is_v ? nullptr : p.k_weight);
  }
};

// Where a thread's heads of k or v go, and by what an fp8 cache divides them.
template <class Cache>
struct CacheHeads {
  Cache* to;
  int64_t stride;
  const float* scales;
  int32_t scale_stride;
  float scale_value;

  __device__ __forceinline__ CacheHeads(const AppendParams& p, CacheSlot slot, bool is_key,
                                        int first) {
    const PageStrides& strides = is_key ? p.key_cache_strides : p.value_cache_strides;
    to = static_cast<Cache*>(is_key ? p.key_cache : p.value_cache) + slot.page * strides.page +
         slot.offset * strides.token + first * strides.head;
    stride = strides.head;
    scale_stride = is_key ? p.k_scale_head_stride : p.v_scale_head_stride;
    scales = is_key ? p.k_scale : p.v_scale;
    if (scales != nullptr) scales += first * scale_stride;
    scale_value = is_key ? p.k_scale_value : p.v_scale_value;
  }
  __device__ __forceinline__ float scale(int head) const {
    return scales != nullptr ? scales[head * scale_stride] : scale_value;
  }
};

}  // namespace fi
