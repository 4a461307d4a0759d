// Barriers among some warps of a block.
#pragma once

namespace fi::ptx {

// Wait for kThreads threads at barrier `id`, 1 to 15; __syncthreads() has 0. Memory is ordered as
// by __syncthreads().
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// The same for a number of whole warps that is known when the kernel runs.
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Count as one of the kThreads without waiting for the others.
template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace fi::ptx
