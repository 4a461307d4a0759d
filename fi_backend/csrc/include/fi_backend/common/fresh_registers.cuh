// Indices read anew from their special registers: what follows from them is computed where it is
// used. Left to itself the compiler keeps dozens of addresses in registers through a loop that has
// none to spare.
#pragma once

#include <fi_backend/common/macros.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0);  // else a division by a power of two takes four instructions
  return thread;
}

__device__ __forceinline__ int fresh_block() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

__device__ __forceinline__ uint32_t fresh_num_blocks() {
  uint32_t num_blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(num_blocks));
  return num_blocks;
}

// The opposite: `x` stays in a register, where the assembler would compute it anew for each use.
// All lanes of a warp call this; it costs a shuffle.
__device__ __forceinline__ uint32_t keep_in_register(uint32_t x) {
  return __shfl_sync(kFullWarp, x, threadIdx.x % kWarpSize);
}

}  // namespace fi
