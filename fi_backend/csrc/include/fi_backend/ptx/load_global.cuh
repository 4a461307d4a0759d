// Global loads with a cache policy.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi::ptx {

// Load data this SM reads once: it takes no place in L1, which is left to what is read again.
// NOTE: not ld.global.nc, which assumes that nobody writes the data while this kernel runs. Under
// dependent launch the kernel that writes it may still be running when this one starts.
__device__ __forceinline__ uint4 load_global_once(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// Load into `value` where `wanted`; else it stays. Left to the compiler, what else would write the
// register may wait for the load.
__device__ __forceinline__ void load_global_if(bool wanted, const int32_t* address,
                                               int32_t& value) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %2, 0;\n"
      "@p ld.global.s32 %0, [%1];\n"
      "}\n"
      : "+r"(value)
      : "l"(address), "r"(int(wanted))
      : "memory");
}

// Bring the line of an address into L2.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Narrower words come from unaligned rows, where neighbours share a sector: L1 helps those.
template <class Word>
__device__ __forceinline__ Word load_global_once(const Word* address) {
  return *address;
}

}  // namespace fi::ptx
