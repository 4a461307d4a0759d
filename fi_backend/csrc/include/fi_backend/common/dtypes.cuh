// Conversions between fp32 and the storage types of device code. dtypes.h is the host counterpart;
// both give the same bits, but for the sign and payload of a NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <fi_backend/common/macros.h>

namespace fi {

template <class A, class B>
inline constexpr bool kIsSame = false;
template <class A>
inline constexpr bool kIsSame<A, A> = true;

template <class T>
inline constexpr bool kIsFp8 = false;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e4m3> = true;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e5m2> = true;

template <class T>
inline constexpr bool kIs16BitFloat = kIsSame<T, __half> || kIsSame<T, __nv_bfloat16>;

// Types that hold values divided by a scale.
template <class T>
inline constexpr bool kIsQuantized = kIsFp8<T> || kIsSame<T, int8_t>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__nv_fp8_e5m2 x) { return static_cast<float>(x); }

// The two 16-bit floats of a word, the one at the lower address first.
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Two values rounded as from_float does, the first one in the lower byte.
template <class Fp8>
__device__ __forceinline__ uint16_t pack_fp8_pair(float2 x) {
  return __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE,
                                  kIsSame<Fp8, __nv_fp8_e4m3> ? __NV_E4M3 : __NV_E5M2);
}

// Round to nearest even. fp8 and int8 saturate: values out of range and infinities become the
// nearest value there is. The NaN of int8 is 0.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  return __nv_fp8_e4m3(x);
}
template <>
__device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) {
  return __nv_fp8_e5m2(x);
}
template <>
__device__ __forceinline__ int8_t from_float<int8_t>(float x) {
  int32_t rounded;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return static_cast<int8_t>(rounded);
}

}  // namespace fi
