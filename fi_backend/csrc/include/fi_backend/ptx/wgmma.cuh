// Matrix multiply-accumulate by a warpgroup, four warps whose first index is a multiple of 4
// (sm_90a): D[64][N] += A[64][16] * B[16][N] on 16-bit inputs.
//
// Warp w of the group has rows 16 * w on. With g = lane / 4 and c = 2 * (lane % 4), d[4 * j + e] is
// row g + 8 * (e / 2), column 8 * j + c + e % 2; a[0] = A[g][c, c+1], a[1] = A[g+8][c, c+1],
// a[2] = A[g][c+8, c+9], a[3] = A[g+8][c+8, c+9].
//
// Products run in the background. From wgmma_fence() on until wgmma_wait() says that they are done,
// nothing may touch their registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fi_backend/common/macros.h>

// What is compiled for another architecture has none of this.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FI_HAS_WGMMA 1
#else
#define FI_HAS_WGMMA 0
#endif

namespace fi::ptx {

// A matrix in shared memory, in blocks of eight rows of 128 bytes whose 16-byte chunks are
// permuted: chunk c of row r is at c ^ (r % 8). Blocks begin at multiples of 1024.
struct WgmmaMatrix {
  uint32_t low;
  uint32_t high;

  // The next eight rows lie `next_rows` bytes after a block, and rows continue `next_columns` bytes
  // after it.
  __device__ __forceinline__ WgmmaMatrix(uint32_t address, uint32_t next_rows,
                                         uint32_t next_columns)
      : low((next_columns >> 4) << 16 | (address & 0x3ffff) >> 4),
        high((next_rows >> 4) | 1u << 30) {}

  // The descriptor of what begins `bytes` further on.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    return uint64_t{high} << 32 | (low + (bytes >> 4));
  }
};

// Order accesses to registers before the products that use them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Close the group of products issued since the last call.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most kPending of the latest groups are unfinished. What they wrote must then be
// passed to wgmma_finished() before it is read.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keep the compiler from reading results before the wait that it does not know they depend on.
template <int kCount>
__device__ __forceinline__ void wgmma_finished(float* d) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Both inputs in shared memory, with 16 inputs along a row: D = A * B^T, or += if `accumulate`. T
// is __half or __nv_bfloat16.
template <class T, int kN>
__device__ __forceinline__ void wgmma_shared(float* d, uint64_t a, uint64_t b, bool accumulate);

// A in registers, B in shared memory with 16 rows of N: D += A * B.
template <class T, int kN>
__device__ __forceinline__ void wgmma_registers(float* d, const uint32_t (&a)[4], uint64_t b);

// Names of registers 0 to 127 in assembly, and the operands they stand for.
#define FI_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
#define FI_R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FI_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FI_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FI_R96                                                                                     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FI_REGISTERS_64 FI_R0 FI_R16
#define FI_REGISTERS_96 FI_REGISTERS_64 FI_R32
#define FI_REGISTERS_128 FI_REGISTERS_96 FI_R48
#define FI_REGISTERS_192 FI_REGISTERS_128 FI_R64 FI_R80
#define FI_REGISTERS_256 FI_REGISTERS_192 FI_R96
#define FI_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FI_D16(i) FI_D4(i), FI_D4(i + 4), FI_D4(i + 8), FI_D4(i + 12)
#define FI_OPERANDS_64 FI_D16(0), FI_D16(16)
#define FI_OPERANDS_96 FI_OPERANDS_64, FI_D16(32)
#define FI_OPERANDS_128 FI_OPERANDS_96, FI_D16(48)
#define FI_OPERANDS_192 FI_OPERANDS_128, FI_D16(64), FI_D16(80)
#define FI_OPERANDS_256 FI_OPERANDS_192, FI_D16(96), FI_D16(112)

// a0 to a4: the operands after D's.
#define FI_WGMMA(T, type, n, a0, a1, a2, a3, a4)                                            \
  template <>                                                                               \
  __device__ __forceinline__ void wgmma_shared<T, n>(float* d, uint64_t a, uint64_t b,      \
                                                     bool accumulate) {                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2                                   \
                 ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type            \
                 " {" FI_REGISTERS_##n "}, %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n}\n"         \
                 : FI_OPERANDS_##n                                                          \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                   \
  }                                                                                         \
  template <>                                                                               \
  __device__ __forceinline__ void wgmma_registers<T, n>(float* d, const uint32_t(&a)[4],    \
                                                        uint64_t b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type            \
                 " {" FI_REGISTERS_##n "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4 \
                                       ", 1, 1, 1, 1;\n"                                    \
                 : FI_OPERANDS_##n                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
  }
#define FI_WGMMA_TYPES(n, ...)            \
  FI_WGMMA(__half, "f16", n, __VA_ARGS__) \
  FI_WGMMA(__nv_bfloat16, "bf16", n, __VA_ARGS__)

FI_WGMMA_TYPES(64, 32, 33, 34, 35, 36)
FI_WGMMA_TYPES(96, 48, 49, 50, 51, 52)
FI_WGMMA_TYPES(128, 64, 65, 66, 67, 68)
FI_WGMMA_TYPES(192, 96, 97, 98, 99, 100)
FI_WGMMA_TYPES(256, 128, 129, 130, 131, 132)

#undef FI_WGMMA_TYPES
#undef FI_WGMMA
#undef FI_OPERANDS_256
#undef FI_OPERANDS_192
#undef FI_OPERANDS_128
#undef FI_OPERANDS_96
#undef FI_OPERANDS_64
#undef FI_D16
#undef FI_D4
#undef FI_REGISTERS_256
#undef FI_REGISTERS_192
#undef FI_REGISTERS_128
#undef FI_REGISTERS_96
#undef FI_REGISTERS_64
#undef FI_R96
#undef FI_R80
#undef FI_R64
#undef FI_R48
#undef FI_R32
#undef FI_R16
#undef FI_R0

}  // namespace fi::ptx
