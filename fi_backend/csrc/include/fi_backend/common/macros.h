// Macros that let one header serve g++, nvcc and NVRTC.
#pragma once

#if defined(__CUDACC__)
#define FI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FI_HOST_DEVICE inline
#endif

// In front of a loop whose body is long and runs but a few times: code that is not in the
// instruction cache costs more than a jump.
#if defined(__CUDACC__)
#define FI_NO_UNROLL _Pragma("unroll 1")
#else
#define FI_NO_UNROLL
#endif

#if defined(__CUDACC_RTC__)
// NVRTC has no system headers; these are the ABI types of every 64-bit CUDA platform.
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
#else
#include <cstdint>
#endif
