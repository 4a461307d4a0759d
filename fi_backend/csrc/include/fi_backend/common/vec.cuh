// Vec: kSize neighbouring elements that move through memory as one access and compute as fp32.
#pragma once

#include <fi_backend/common/macros.h>

#include <fi_backend/common/dtypes.cuh>
#include <fi_backend/ptx/load_global.cuh>

namespace fi {

inline constexpr int kMaxAccessBytes = 16;

// Elements per access such that the wider of two types moves 16 bytes.
template <class A, class B>
inline constexpr int kVecSizeFor =
    kMaxAccessBytes / int(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// The integer type whose load or store moves kBytes at once.
template <int kBytes>
struct AccessWord;
template <>
struct AccessWord<16> {
  using type = uint4;
};
template <>
struct AccessWord<8> {
  using type = uint2;
};
template <>
struct AccessWord<4> {
  using type = uint32_t;
};
template <>
struct AccessWord<2> {
  using type = uint16_t;
};
template <>
struct AccessWord<1> {
  using type = uint8_t;
};

template <class T, int kSize>
struct Vec {
  using Word = typename AccessWord<kSize* int(sizeof(T))>::type;
  Word word;

  // `from` must be aligned to the size of the Vec.
  __device__ __forceinline__ static Vec load(const T* from) {
    return {*reinterpret_cast<const Word*>(from)};
  }
  // As load, for data that no thread of this SM reads again.
  __device__ __forceinline__ static Vec load_once(const T* from) {
    return {ptx::load_global_once(reinterpret_cast<const Word*>(from))};
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Word*>(to) = word; }

  // NOTE: 16-bit values are unpacked from whole words. Element by element, the compiler cuts a
  // loaded vector up where it was loaded, and so waits for it before it starts the next load.
  __device__ __forceinline__ void to_floats(float (&x)[kSize]) const {
    if constexpr (kIs16BitFloat<T> && kSize % 2 == 0) {
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(&word);
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const float2 pair = unpack_pair<T>(pairs[i / 2]);
        x[i] = pair.x;
        x[i + 1] = pair.y;
      }
    } else {
      const T* elements = reinterpret_cast<const T*>(&word);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = to_float(elements[i]);
    }
  }
  __device__ __forceinline__ static Vec from_floats(const float (&x)[kSize]) {
    Vec v;
    if constexpr (kIsFp8<T> && kSize % 2 == 0) {
      uint16_t* pairs = reinterpret_cast<uint16_t*>(&v.word);
#pragma unroll
      for (int i = 0; i < kSize; i += 2) pairs[i / 2] = pack_fp8_pair<T>({x[i], x[i + 1]});
    } else {
      T* elements = reinterpret_cast<T*>(&v.word);
#pragma unroll
      for (int i = 0; i < kSize; ++i) elements[i] = from_float<T>(x[i]);
    }
    return v;
  }
};

// Load kSize floats in as few accesses as they take; `from` must be aligned to those.
template <int kSize>
__device__ __forceinline__ void load_floats(const float* from, float (&x)[kSize]) {
  constexpr int kStep = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int i = 0; i < kSize; i += kStep) {
    float part[kStep];
    Vec<float, kStep>::load(from + i).to_floats(part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) x[i + j] = part[j];
  }
}

}  // namespace fi
