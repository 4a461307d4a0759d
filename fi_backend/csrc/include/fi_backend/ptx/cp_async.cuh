// Asynchronous copies from global to shared memory (sm_80 and up), counted in groups per thread.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi::ptx {

// Copy 16 bytes past L1. Where `wanted` is false nothing is read and the destination becomes zeros:
// `global` may then be any address.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

// Copy 4 bytes.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global)
               : "memory");
}
// The same of rows of kRowBytes whose neighbours nobody may read soon: L2 fetches 64 bytes at once
// where lines of 128 would bring some of theirs.
template <int kRowBytes>
__device__ __forceinline__ void cp_async_16_of(uint32_t shared, const void* global) {
  if constexpr (kRowBytes % 128 == 0) {
    cp_async_16(shared, global);
  } else {
    asm volatile("cp.async.cg.shared.global.L2::64B [%0], [%1], 16;" ::"r"(shared), "l"(global)
                 : "memory");
  }
}

// Copy 16 bytes that other blocks of this SM read too.
__device__ __forceinline__ void cp_async_16_in_l1(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// What is read once: lines that make room in the L2 cache before all others do.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copy 16 bytes of a row as cp_async_16_of() does, into L2 by a policy.
template <int kRowBytes>
__device__ __forceinline__ void cp_async_16_by(uint64_t policy, uint32_t shared,
                                               const void* global) {
  if constexpr (kRowBytes % 128 == 0) {
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
        "l"(global), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint.L2::64B [%0], [%1], 16, %2;" ::"r"(shared),
        "l"(global), "l"(policy)
        : "memory");
  }
}

// Close the group of copies this thread has started since the last call. It may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::); }

// Wait until at most kPending of this thread's latest groups are unfinished. Other threads' copies
// become visible with a barrier after their wait.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fi::ptx
