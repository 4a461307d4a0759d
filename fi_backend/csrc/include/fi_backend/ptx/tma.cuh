// Copies of boxes of a tensor by the tensor memory accelerator (sm_90).
#pragma once

#include <fi_backend/common/tensor_map.h>

namespace fi::ptx {

// Copy the box that begins at (x, y, z, w), x being the innermost coordinate, and count its bytes
// on `barrier`. What lies outside of the tensor becomes zeros, and counts too. The map is part of a
// kernel's __grid_constant__ parameters.
__device__ __forceinline__ void tma_load_4d(uint32_t shared, const TensorMap& map, uint32_t barrier,
                                            int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Order this thread's shared memory accesses, those of finished cp.async included, before accesses
// by wgmma and the copy engine that follow on a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fi::ptx
