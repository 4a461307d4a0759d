// Copies of boxes of a tensor by the tensor memory accelerator (sm_90).
#pragma once

#include <fi_backend/common/tensor_map.h>

namespace fi::ptx {

// Where a box begins in a tensor, the innermost coordinate first.
struct BoxPlace {
  int x, y, z, w, v;
};

// Copy a box and count its bytes on `barrier`. What lies outside of the tensor becomes zeros, and
// counts too. The map is part of a kernel's __grid_constant__ parameters.
__device__ __forceinline__ void tma_load_5d(uint32_t shared, const TensorMap& map, uint32_t barrier,
                                            const BoxPlace& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(at.v)
      : "memory");
}

// Start loading a map that will be used soon.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Order this thread's shared memory accesses, those of finished cp.async included, before accesses
// by wgmma and the copy engine that follow on a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fi::ptx
