// Rotary position embedding of q and k; see rope_params.h for the formula.
#pragma once

#include <fi_backend/common/head_tile.h>
#include <fi_backend/rope/rope_params.h>

#include <fi_backend/common/early_index.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/rope/angles.cuh>
#include <fi_backend/rope/rotate.cuh>

namespace fi {

// T stores q and k; kVecSize elements of a head move as one access. A thread rotates one slot of up
// to kHeads heads by the same angles. They are computed, into shared memory, or come from a cos_sin
// cache.
template <class T_, int kVecSize_, int kHeads_, bool kComputesAngles_>
struct RopeTraits {
  using T = T_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr int kHeads = kHeads_;
  static constexpr bool kComputesAngles = kComputesAngles_;
};

FI_HOST_DEVICE int num_rope_groups(const RopeParams& p, int heads_per_thread) {
  return num_head_groups(p.num_qo_heads, heads_per_thread) +
         num_head_groups(p.num_kv_heads, heads_per_thread);
}

// Heads of q, or of k, that one thread rotates.
template <class T, int kHeads>
struct RopeHeads {
  const T* from;
  T* to;
  int64_t from_stride;
  int64_t to_stride;
  int count;

  // Groups of q come first, then those of k.
  __device__ __forceinline__ RopeHeads(const RopeParams& p, int64_t token, int group) {
    const int q_groups = num_head_groups(p.num_qo_heads, kHeads);
    const bool is_q = group < q_groups;
    const int first = (is_q ? group : group - q_groups) * kHeads;
    const RopeStrides& in = is_q ? p.q_strides : p.k_strides;
    const RopeStrides& out = is_q ? p.q_out_strides : p.k_out_strides;
    from = static_cast<const T*>(is_q ? p.q : p.k) + token * in.token + first * in.head;
    to = static_cast<T*>(is_q ? p.q_out : p.k_out) + token * out.token + first * out.head;
    from_stride = in.head;
    to_stride = out.head;
    count = (is_q ? p.num_qo_heads : p.num_kv_heads) - first;
  }
};

// Rotate slot i of a thread's heads: by `angles` where they are computed, else by those that the
// cache has for the position.
template <class Traits>
__device__ __forceinline__ void rotate_slot(
    const RopeParams& p, const RopeHeads<typename Traits::T, Traits::kHeads>& heads, int i,
    const float* angles, EarlyIndex& position) {
  constexpr int kVecSize = Traits::kVecSize, kHeads = Traits::kHeads;
  using VecT = Vec<typename Traits::T, kVecSize>;
  const PairSlot slot = find_pair_slot<kVecSize>(i, p.rotary_dim, p.interleave);
  const bool has_second = slot.second < p.head_dim;
  // Start all loads before the position is needed: it and they come in one trip.
  VecT a[kHeads], b[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads.count) break;
    a[h] = VecT::load(heads.from + h * heads.from_stride + slot.first);
    if (has_second) b[h] = VecT::load(heads.from + h * heads.from_stride + slot.second);
  }
  if constexpr (!Traits::kComputesAngles) angles = find_cached_angles<float>(p, position.get());
  if (angles == nullptr) return;
  Rotation<float, kVecSize> rotation;
  if (slot.rotates) rotation.load(angles, i, p.rotary_dim, p.interleave);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads.count) break;
    if (slot.rotates) {
      float x[kVecSize], y[kVecSize];
      a[h].to_floats(x);
      b[h].to_floats(y);
      rotation.apply(x, y, p.interleave);
      a[h] = VecT::from_floats(x);
      b[h] = VecT::from_floats(y);
    }
    a[h].store(heads.to + h * heads.to_stride + slot.first);
    if (has_second) b[h].store(heads.to + h * heads.to_stride + slot.second);
  }
}

// Block and grid: HeadTile over [num_tokens, head groups, slots of what is written of a head];
// where values move in vectors, all slots of a head are in one block.
// Dynamic shared memory, where angles are computed: floats [blockDim.z, rotary_dim].
template <class Traits>
__global__ void __launch_bounds__(kHeadTileThreads)
    rope_kernel(const __grid_constant__ RopeParams p) {
  constexpr int kVecSize = Traits::kVecSize, kHeads = Traits::kHeads;
  ptx::grid_dependency_wait();

  const auto [token, group] = head_tile_position();
  const float* angles = nullptr;
  if constexpr (Traits::kComputesAngles) {
    extern __shared__ float shared_angles[];
    TokenPosition position = {false, 0};
    if (token < p.num_tokens) position = find_position(p, token);
    float* row = shared_angles + threadIdx.z * p.rotary_dim;
    if (position.exists) {
      angles = row;
      compute_angles(p, position.value, row, threadIdx.y * blockDim.x + threadIdx.x,
                     blockDim.x * blockDim.y);
    }
    __syncthreads();
  }
  if (token >= p.num_tokens || group >= num_rope_groups(p, kHeads)) return;
  EarlyIndex position;
  if constexpr (!Traits::kComputesAngles) position = {{p.pos_ids, p.pos_ids_is_int64}, token};

  const RopeHeads<typename Traits::T, kHeads> heads(p, token, group);
  if constexpr (kVecSize > 1) {
    rotate_slot<Traits>(p, heads, threadIdx.x, angles, position);
  } else {
    const int num_values = heads.from == heads.to ? p.rotary_dim : p.head_dim;
    for (int i = threadIdx.x; 2 * i < num_values; i += blockDim.x) {
      rotate_slot<Traits>(p, heads, i, angles, position);
    }
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
