// Atomics that order memory between CTAs.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi::ptx {

// Count a counter up to `last`, then to 0 again; return the count before. What this thread has
// written or, by a barrier, seen written comes before, for threads that count after it, and what it
// reads then comes after what threads before it have written.
__device__ __forceinline__ uint32_t atomic_count_acq_rel(int32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}

}  // namespace fi::ptx
