// Rotation of the pairs of a head, for threads that hold some of them.
#pragma once

#include <fi_backend/common/macros.h>

#include <fi_backend/common/vec.cuh>

namespace fi {

// A head is cut into slots of 2 * kVecSize values, one for a thread: two accesses that begin at
// `first` and `second`. The rotary slots come first and hold kVecSize pairs each; the others hold
// what is behind rotary_dim.
struct PairSlot {
  int first;
  int second;  // of the last slot, may be past the head where that is no multiple of 2 * kVecSize
  bool rotates;
};

// Threads that share the heads of a token, each holding one slot of up to heads_per_thread heads.
FI_HOST_DEVICE int num_head_groups(int num_heads, int heads_per_thread) {
  return (num_heads + heads_per_thread - 1) / heads_per_thread;
}

// The two accesses of a rotary slot are rotary_dim / 2 apart, also where pairs are interleaved
// unless that would part them: neighbouring threads have neighbouring accesses.
template <int kVecSize>
__device__ __forceinline__ PairSlot find_pair_slot(int index, int rotary_dim, bool interleave) {
  const bool rotates = 2 * kVecSize * index < rotary_dim;
  const bool in_halves = rotates && !(kVecSize == 1 && interleave);
  const int first = kVecSize * (in_halves ? index : 2 * index);
  return {first, first + (in_halves ? rotary_dim / 2 : kVecSize), rotates};
}

// The angles of one slot, as the cache has them until they are used.
template <class Angle, int kVecSize>
class Rotation {
 public:
  // `angles` holds the cosines of a position, then its sines, rotary_dim values in all.
  __device__ __forceinline__ void load(const Angle* angles, int slot, int rotary_dim,
                                       bool interleave) {
    const bool is_split = kHalves == 2 && interleave;  // half of the pairs in each access
    const Angle* first = angles + slot * (is_split ? kPerHalf : kVecSize);
    const int to_second = is_split ? rotary_dim / 4 : kPerHalf;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      cosine_[half] = Half::load(first + half * to_second);
      sine_[half] = Half::load(first + half * to_second + rotary_dim / 2);
    }
  }

  // Rotate the slot's two accesses. Interleaved pairs lie within an access, others across.
  __device__ __forceinline__ void apply(float (&a)[kVecSize], float (&b)[kVecSize],
                                        bool interleave) const {
    float cosine[kHalves][kPerHalf], sine[kHalves][kPerHalf];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      cosine_[half].to_floats(cosine[half]);
      sine_[half].to_floats(sine[half]);
    }
    if (kVecSize == 1 || !interleave) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) {
        const int half = i / kPerHalf, pair = i % kPerHalf;
        rotate_pair(a[i], b[i], cosine[half][pair], sine[half][pair]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerHalf; ++i) {
        rotate_pair(a[2 * i], a[2 * i + 1], cosine[0][i], sine[0][i]);
        rotate_pair(b[2 * i], b[2 * i + 1], cosine[kHalves - 1][i], sine[kHalves - 1][i]);
      }
    }
  }

 private:
  static constexpr int kHalves = kVecSize == 1 ? 1 : 2;
  static constexpr int kPerHalf = kVecSize / kHalves;
  using Half = Vec<Angle, kPerHalf>;

  // NOTE: fused by name. Left to the compiler, instances differ in which product they round.
  __device__ __forceinline__ static void rotate_pair(float& x, float& y, float cosine, float sine) {
    const float rotated = fmaf(x, cosine, -(y * sine));
    y = fmaf(y, cosine, x * sine);
    x = rotated;
  }

  Half cosine_[kHalves];
  Half sine_[kHalves];
};

}  // namespace fi
