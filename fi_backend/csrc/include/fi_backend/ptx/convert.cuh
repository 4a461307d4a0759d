// Conversions of packed small floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fi_backend/common/macros.h>

#include <fi_backend/common/dtypes.cuh>

namespace fi::ptx {

// Bytes of (a, b), b being bytes 4 to 7, picked by the four nibbles of `selector`.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Widen the four fp8 values of a word, exactly: bytes 0 and 1 to a pair of fp16, bytes 2 and 3 to
// another.
template <class Fp8>
__device__ __forceinline__ void widen_fp8x4(uint32_t word, uint32_t& low, uint32_t& high);

// e5m2 is the upper byte of an fp16.
template <>
__device__ __forceinline__ void widen_fp8x4<__nv_fp8_e5m2>(uint32_t word, uint32_t& low,
                                                           uint32_t& high) {
  low = permute_bytes(word, 0, 0x1404);
  high = permute_bytes(word, 0, 0x3424);
}

template <>
__device__ __forceinline__ void widen_fp8x4<__nv_fp8_e4m3>(uint32_t word, uint32_t& low,
                                                           uint32_t& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 a, b;\n"
      "mov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\n"
      "cvt.rn.f16x2.e4m3x2 %1, b;\n"
      "}\n"
      : "=r"(low), "=r"(high)
      : "r"(word));
#else
  // Put sign, exponent and mantissa where fp16 has them; a product, which is exact for subnormals
  // too, mends the exponent's bias. The NaN of e4m3 comes out as 480.
  const auto widen = [](uint32_t x) {
    const uint32_t bits = (x & 0x80008000u) | (x & 0x7f007f00u) >> 1;
    const __half2 value = __hmul2(*reinterpret_cast<const __half2*>(&bits),
                                  __half2half2(__ushort_as_half(0x5c00)));  // 2^8
    return *reinterpret_cast<const uint32_t*>(&value);
  };
  low = widen(permute_bytes(word, 0, 0x1404));
  high = widen(permute_bytes(word, 0, 0x3424));
#endif
}

// The four e4m3 values of a word as bf16, exactly but for NaN, which comes out as 480.
__device__ __forceinline__ void widen_e4m3x4_to_bf16(uint32_t word, uint32_t& low, uint32_t& high) {
  // A byte and its sign, eight times, in a half: shifted, with what is left of the sign, it has the
  // layout of bf16, and a product mends the exponent's bias. bf16 subnormals are exact.
  const auto widen = [](uint32_t x) {
    const uint32_t bits = x << 4 & 0x87f087f0u;
    const __nv_bfloat162 value =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits),
                __bfloat162bfloat162(__ushort_as_bfloat16(0x7b80)));  // 2^120
    return reinterpret_cast<const uint32_t&>(value);
  };
  asm("prmt.b32 %0, %1, 0, 0x9180;" : "=r"(low) : "r"(word));
  asm("prmt.b32 %0, %1, 0, 0xb3a2;" : "=r"(high) : "r"(word));
  low = widen(low);
  high = widen(high);
}

// Two floats, rounded to nearest, as a pair: `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace fi::ptx
