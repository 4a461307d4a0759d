// From qkv to the cache in one pass; see rope_append_params.h for what it computes.
#pragma once

#include <fi_backend/common/head_tile.h>
#include <fi_backend/rope/rope_append_params.h>

#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/rope/angles.cuh>
#include <fi_backend/rope/rope_append_heads.cuh>
#include <fi_backend/rope/rotate.cuh>

namespace fi {

// x *= factor * (weight + bias)
template <class Vec, int kVecSize>
__device__ __forceinline__ void scale_by_weight(float (&x)[kVecSize], const Vec& weight,
                                                float factor, float bias) {
  float w[kVecSize];
  weight.to_floats(w);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) x[i] *= factor * (w[i] + bias);
}

template <class Vec, int kVecSize>
__device__ __forceinline__ float add_squares_of(float sum, const Vec& vec, float (&x)[kVecSize]) {
  vec.to_floats(x);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) sum += x[i] * x[i];
  return sum;
}

// Block and grid: HeadTile over [num_tokens, head groups, lanes of a head], lanes being a power of
// two whose kSlots slots hold the longer of a head of k and one of v.
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendParams p) {
  using In = typename Traits::In;
  using InVec = typename Traits::InVec;
  using Cache = typename Traits::Cache;
  using Angle = typename Traits::Angle;
  constexpr int kVecSize = Traits::kVecSize, kSlots = Traits::kSlots, kHeads = Traits::kHeads;
  ptx::grid_dependency_wait();

  const int num_groups = num_rope_append_groups(p, kHeads);
  const auto [token, group] = head_tile_position();
  if (token >= p.rope.num_tokens || group >= num_groups) return;  // all lanes of a head together
  EarlyIndex position({p.rope.pos_ids, p.rope.pos_ids_is_int64}, token);
  const bool has_slot = token < p.append.num_tokens;
  SlotLookup lookup;
  if (has_slot) lookup = {p.append, token};
  const QkvHeads<Traits> heads(p, token, group);
  const auto slot_index = [](int s) { return int(s * blockDim.x + threadIdx.x); };
  const auto find_slot_of = [&](int s) {
    return find_pair_slot<kVecSize>(slot_index(s), heads.rotary_dim, p.rope.interleave);
  };

  // Start all loads of rows before the indices are needed: they come in one trip.
  InVec a[kHeads][kSlots] = {}, b[kHeads][kSlots] = {};
  InVec weight_a[kSlots], weight_b[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const PairSlot slot = find_slot_of(s);
    const bool has_first = slot.first < heads.head_dim, has_second = slot.second < heads.head_dim;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads.count) break;
      const In* row = heads.from + h * heads.from_stride;
      if (has_first) a[h][s] = InVec::load(row + slot.first);
      if (has_second) b[h][s] = InVec::load(row + slot.second);
    }
    if (heads.weight != nullptr) {
      if (has_first) weight_a[s] = InVec::load(heads.weight + slot.first);
      if (has_second) weight_b[s] = InVec::load(heads.weight + slot.second);
    }
  }
  const Angle* angles = find_cached_angles<Angle>(p.rope, position.get());
  if (angles == nullptr) return;
  Rotation<Angle, kVecSize> rotation[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (!find_slot_of(s).rotates) continue;
    rotation[s].load(angles, slot_index(s), heads.rotary_dim, p.rope.interleave);
  }

  // NOTE: after the angles, whose loads are under way while the look-up waits.
  CacheSlot place = {-1, 0};
  if (heads.kind != RowKind::kQuery && has_slot) place = lookup.find(p.append);

  // Every lane takes part in the sums, whatever its heads are.
  const float inverse_dim = 1.f / heads.head_dim;
  float rsqrt_mean[kHeads];
  if (p.q_weight != nullptr || p.k_weight != nullptr) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float sum = 0.f, x[kVecSize];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        sum = add_squares_of(sum, a[h][s], x);
        sum = add_squares_of(sum, b[h][s], x);
      }
      sum = sum_over_lanes(sum, blockDim.x);
      rsqrt_mean[h] = rsqrtf(sum * inverse_dim + p.eps);
    }
  }
  if (heads.kind != RowKind::kQuery && place.page < 0) return;
  const CacheHeads<Cache> cache(p.append, place, heads.kind == RowKind::kKey, heads.first);
  In* q_out = static_cast<In*>(p.rope.q_out) + token * p.rope.q_out_strides.token +
              heads.first * p.rope.q_out_strides.head;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads.count) break;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const PairSlot slot = find_slot_of(s);
      float x[kVecSize], y[kVecSize];
      a[h][s].to_floats(x);
      b[h][s].to_floats(y);
      if (heads.weight != nullptr) {
        scale_by_weight(x, weight_a[s], rsqrt_mean[h], p.weight_bias);
        scale_by_weight(y, weight_b[s], rsqrt_mean[h], p.weight_bias);
      }
      if (slot.rotates) rotation[s].apply(x, y, p.rope.interleave);
      const bool has_first = slot.first < heads.head_dim, has_second = slot.second < heads.head_dim;
      if (heads.kind == RowKind::kQuery) {
        In* to = q_out + h * p.rope.q_out_strides.head;
        if (has_first) InVec::from_floats(x).store(to + slot.first);
        if (has_second) InVec::from_floats(y).store(to + slot.second);
      } else {
        Cache* to = cache.to + h * cache.stride;
        const float scale = cache.scale(h);
        if (has_first) round_to_cache<Traits>(x, scale).store(to + slot.first);
        if (has_second) round_to_cache<Traits>(y, scale).store(to + slot.second);
      }
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
