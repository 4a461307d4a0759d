// Move registers between the warpgroups of a block (sm_90a). All warps of a warpgroup execute it.
#pragma once

namespace fi::ptx {

// Give registers up: this warpgroup keeps kCount a thread.
template <int kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Wait for registers that others give up, and have kCount a thread.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace fi::ptx
