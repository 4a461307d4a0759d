// Rotation of the pairs of a head, for threads that hold some of them.
#pragma once

#include <fi_backend/common/macros.h>

#include <fi_backend/common/vec.cuh>

namespace fi {

// A head is cut into slots of 2 * kVecSize values, one for a thread: two accesses that begin at
// `first` and `second`. The rotary slots come first and hold kVecSize pairs each, the angles of
// slot i being those of pairs i * kVecSize and on; the others hold what is behind rotary_dim.
struct PairSlot {
  int first;
  int second;  // of the last slot, may be past the head where that is no multiple of 2 * kVecSize
  bool rotates;
};

// Threads that share the heads of a token, each holding one slot of up to heads_per_thread heads.
FI_HOST_DEVICE int num_head_groups(int num_heads, int heads_per_thread) {
  return (num_heads + heads_per_thread - 1) / heads_per_thread;
}

template <int kVecSize>
__device__ __forceinline__ PairSlot find_pair_slot(int index, int rotary_dim, bool interleave) {
  const bool rotates = 2 * kVecSize * index < rotary_dim;
  const bool in_halves = rotates && !interleave;
  const int first = kVecSize * (in_halves ? index : 2 * index);
  return {first, first + (in_halves ? rotary_dim / 2 : kVecSize), rotates};
}

// The angles of one slot.
template <int kVecSize>
struct Rotation {
  float cosine[kVecSize];
  float sine[kVecSize];

  // `angles` holds the cosines of a position, then its sines, rotary_dim values in all.
  __device__ __forceinline__ void load(const float* angles, int slot, int rotary_dim) {
    load_floats(angles + slot * kVecSize, cosine);
    load_floats(angles + rotary_dim / 2 + slot * kVecSize, sine);
  }

  // Rotate the slot's two accesses. Interleaved pairs lie within an access, others across.
  __device__ __forceinline__ void apply(float (&a)[kVecSize], float (&b)[kVecSize],
                                        bool interleave) const {
    if (kVecSize == 1 || !interleave) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) rotate_pair(a[i], b[i], i);
    } else {
      constexpr int kPairs = kVecSize / 2;  // of an access
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        rotate_pair(a[2 * i], a[2 * i + 1], i);
        rotate_pair(b[2 * i], b[2 * i + 1], kPairs + i);
      }
    }
  }

 private:
  // NOTE: fused by name. Left to the compiler, instances differ in which product they round.
  __device__ __forceinline__ void rotate_pair(float& x, float& y, int pair) const {
    const float rotated = fmaf(x, cosine[pair], -(y * sine[pair]));
    y = fmaf(y, cosine[pair], x * sine[pair]);
    x = rotated;
  }
};

}  // namespace fi
