// Warp-wide matrix multiply-accumulate on 16-bit inputs (sm_80 and up), and its register layouts.
//
// D[16][8] += A[16][16] * B[16][8]. With g = lane / 4 and c = 2 * (lane % 4), a lane keeps
//
//   a[0] = A[g][c, c+1]      a[1] = A[g+8][c, c+1]
//
//   a[2] = A[g][c+8, c+9]    a[3] = A[g+8][c+8, c+9]
//
//   b[0] = B[c, c+1][g]    b[1] = B[c+8, c+9][g]
//
//   d[0, 1] = D[g][c, c+1]    d[2, 3] = D[g+8][c, c+1]
//
// (PTX ISA, mma.m16n8k16 with .f16 and .bf16). The lower half of a register is the lower index.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fi_backend/common/macros.h>

namespace fi::ptx {

// d += a * b. T is __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fi::ptx
