// The position of a token, and the cosines and sines of its angles.
#pragma once

#include <fi_backend/common/index_array.h>
#include <fi_backend/rope/rope_params.h>

namespace fi {

struct TokenPosition {
  bool exists;
  int64_t value;
};

// Without pos_ids a token that no request owns has no position.
__device__ __forceinline__ TokenPosition find_position(const RopeParams& p, int64_t token) {
  if (p.pos_ids != nullptr) return {true, IndexArray{p.pos_ids, p.pos_ids_is_int64}[token]};
  const IndexArray indptr = {p.indptr, p.indptr_is_int64};
  int begin = 0, end = p.num_requests;
  while (begin < end) {  // the first request that ends behind the token
    const int middle = (begin + end) / 2;
    if (indptr[middle + 1] > token) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  if (begin == p.num_requests || indptr[begin] > token) return {false, 0};
  const IndexArray offsets = {p.offsets, p.offsets_is_int64};
  return {true, offsets[begin] + token - indptr[begin]};
}

// The row of a position in a cos_sin cache of Angle, nullptr if the cache has none.
template <class Angle>
__device__ __forceinline__ const Angle* find_cached_angles(const RopeParams& p, int64_t position) {
  if (position < 0 || position >= p.max_position) return nullptr;
  return static_cast<const Angle*>(p.cos_sin) + position * p.cos_sin_stride;
}

// Half turns per position. In double, as the angle, so that its error is that of a float cosine at
// every position.
__device__ __forceinline__ double half_turns_per_position(const RopeParams& p, int pair) {
  constexpr double kHalfTurnsPerRadian = 0.31830988618379067154;  // 1 / pi
  const double base = exp2(-2.0 * pair / p.rotary_dim * p.log2_theta);
  const double smooth = fmin(fmax(base * p.smooth_slope + p.smooth_offset, 0.0), 1.0);
  return kHalfTurnsPerRadian * base * (smooth + (1.0 - smooth) / p.rope_scale);
}

// Write the cosines and then the sines of a position, as a cos_sin cache has them, to
// angles [rotary_dim]; `thread` is one of `num_threads` that share the work.
__device__ __forceinline__ void compute_angles(const RopeParams& p, int64_t position, float* angles,
                                               int thread, int num_threads) {
  const int num_pairs = p.rotary_dim / 2;
  for (int pair = thread; pair < num_pairs; pair += num_threads) {
    const double half_turns = half_turns_per_position(p, pair) * double(position);
    const float rest = float(half_turns - 2.0 * rint(0.5 * half_turns));  // in [-1, 1]
    sincospif(rest, &angles[num_pairs + pair], &angles[pair]);
  }
}

}  // namespace fi
