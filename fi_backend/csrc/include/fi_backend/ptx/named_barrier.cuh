// Barriers among some warps of a block.
#pragma once

namespace fi::ptx {

// Wait for kThreads threads at barrier `id`, 1 to 15; __syncthreads() has 0. Memory is ordered as
// by __syncthreads().
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Count as one of the kThreads without waiting for the others.
template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace fi::ptx
