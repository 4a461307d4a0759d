// Rotary position embedding of q and k on the CPU, in float arithmetic for every storage type.
#pragma once

#include <cstring>

#include "fi_backend/common/index_array.h"
#include "fi_backend/cpu/rows.h"
#include "fi_backend/rope/cpu/angles.h"

namespace fi::cpu {

// The position of every token, walked in order. Without pos_ids the owner of a token is found once
// and then followed.
class PositionReader {
 public:
  PositionReader(const RopeParams& p, int64_t first_token)
      : pos_ids_{p.pos_ids, p.pos_ids_is_int64},
        indptr_{p.indptr, p.indptr_is_int64},
        offsets_{p.offsets, p.offsets_is_int64},
        num_requests_(p.num_requests) {
    if (p.pos_ids != nullptr) return;
    int64_t end = num_requests_;
    while (request_ < end) {  // the first request that ends behind first_token
      const int64_t middle = (request_ + end) / 2;
      if (indptr_[middle + 1] > first_token) {
        end = middle;
      } else {
        request_ = middle + 1;
      }
    }
  }

  // Whether a request owns `token`; its position if so.
  bool read(int64_t token, int64_t* position) {
    if (pos_ids_.data != nullptr) {
      *position = pos_ids_[token];
      return true;
    }
    while (request_ < num_requests_ && indptr_[request_ + 1] <= token) ++request_;
    if (request_ == num_requests_ || token < indptr_[0]) return false;
    *position = offsets_[request_] + token - indptr_[request_];
    return true;
  }

 private:
  IndexArray pos_ids_, indptr_, offsets_;
  int64_t num_requests_;
  int64_t request_ = 0;
};

// Exchange the two floats of every pair of lanes.
inline VecF swap_pairs(VecF x) {
  typedef uint64_t VecPair __attribute__((vector_size(kLanes * 4)));
  const VecPair pairs = reinterpret_cast<VecPair>(x);
  return reinterpret_cast<VecF>(pairs >> 32 | pairs << 32);
}

// What one token multiplies its heads by. Pairs in halves: [rotary_dim / 2] each. Interleaved:
// [rotary_dim] each, both values of a pair having its cosine and minus and plus its sine.
struct Rotation {
  const float* cosine;
  const float* sine;
};

template <class T>
void rotate_head(const RopeParams& p, Rotation rotation, const T* x, T* out) {
  const float *cosine = rotation.cosine, *sine = rotation.sine;
  if (p.interleave) {
    for_each_vector(p.rotary_dim, [=](int64_t i, auto io) {
      const VecF v = io.read(x + i);
      io.write(out + i, v * io.read(cosine + i) + swap_pairs(v) * io.read(sine + i));
    });
  } else {
    const int64_t half = p.rotary_dim / 2;
    for_each_vector(half, [=](int64_t i, auto io) {
      const VecF low = io.read(x + i), high = io.read(x + half + i);
      const VecF c = io.read(cosine + i), s = io.read(sine + i);
      io.write(out + i, low * c - high * s);
      io.write(out + half + i, high * c + low * s);
    });
  }
  if (x != out) {
    std::memcpy(out + p.rotary_dim, x + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  }
}

template <class T>
void rope(const RopeParams& p, int num_threads) {
  RotaryFrequencies frequencies;
  if (p.cos_sin == nullptr) frequencies.set(p);
  const int num_pairs = p.rotary_dim / 2;
  const int64_t bytes_per_token =
      int64_t{2 * sizeof(T)} * p.head_dim * (p.num_qo_heads + p.num_kv_heads);

  const auto rotate_tokens = [&](int64_t begin, int64_t end) {
    alignas(64) float cosine[kMaxRotaryDim], sine[kMaxRotaryDim];
    alignas(64) float pair_cosine[kMaxRotaryDim], pair_sine[kMaxRotaryDim];
    PositionReader positions(p, begin);
    for (int64_t token = begin; token < end; ++token) {
      int64_t position;
      if (!positions.read(token, &position)) continue;
      Rotation rotation = {cosine, sine};
      if (p.cos_sin != nullptr) {
        rotation.cosine = static_cast<const float*>(p.cos_sin) + position * p.cos_sin_stride;
        rotation.sine = rotation.cosine + num_pairs;
      } else {
        rotary_angles(frequencies, position, num_pairs, cosine, sine);
      }
      if (p.interleave) {
        for (int i = 0; i < num_pairs; ++i) {
          pair_cosine[2 * i] = pair_cosine[2 * i + 1] = rotation.cosine[i];
          pair_sine[2 * i] = -rotation.sine[i];
          pair_sine[2 * i + 1] = rotation.sine[i];
        }
        rotation = {pair_cosine, pair_sine};
      }
      const T* q = static_cast<const T*>(p.q) + token * p.q_strides.token;
      T* q_out = static_cast<T*>(p.q_out) + token * p.q_out_strides.token;
      for (int64_t h = 0; h < p.num_qo_heads; ++h) {
        rotate_head(p, rotation, q + h * p.q_strides.head, q_out + h * p.q_out_strides.head);
      }
      const T* k = static_cast<const T*>(p.k) + token * p.k_strides.token;
      T* k_out = static_cast<T*>(p.k_out) + token * p.k_out_strides.token;
      for (int64_t h = 0; h < p.num_kv_heads; ++h) {
        rotate_head(p, rotation, k + h * p.k_strides.head, k_out + h * p.k_out_strides.head);
      }
    }
  };
  parallel_for(p.num_tokens, min_rows_per_worker(bytes_per_token), num_threads, rotate_tokens);
}

}  // namespace fi::cpu
