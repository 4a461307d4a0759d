// Addresses that compilers would take several instructions for.
#pragma once

#include <cstdint>

namespace fi::ptx {

// base + index * step bytes, from factors of 32 bits.
__device__ __forceinline__ const void* byte_offset(const void* base, int32_t index, int32_t step) {
  const void* sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(index), "r"(step), "l"(base));
  return sum;
}

}  // namespace fi::ptx
