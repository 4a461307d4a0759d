// griddepcontrol: the device half of programmatic dependent launch (PDL).
#pragma once

namespace fi::ptx {

// Wait until every kernel this one depends on has finished and its writes are visible. Every thread
// that touches global memory must pass it first, and every block must reach it, so that "finished"
// stays transitive along a chain of dependent kernels.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the dependent kernel start its prologue. Its wait still covers all of this kernel.
__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fi::ptx
