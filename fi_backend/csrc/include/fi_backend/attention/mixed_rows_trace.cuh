// When each thread block of the mixed kernel is at which line, and on which SM: for the benchmark
// that shows both lines at work together. Modules that serve have NoTrace instead (mixed_rows.cuh).
#pragma once

#include <fi_backend/attention/mixed_rows_trace.h>

namespace fi {

static __device__ BlockTrace block_traces[kMaxTracedBlocks];

struct BlockTracer {
  // The block is at the line from here on.
  __device__ __forceinline__ static void begin(int line) {
    if (!is_recorded()) return;
    uint32_t sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    block_traces[blockIdx.x].sm = sm;
    block_traces[blockIdx.x].lines[line].begin = nanoseconds();
  }
  // Or no more.
  __device__ __forceinline__ static void end(int line) {
    if (is_recorded()) block_traces[blockIdx.x].lines[line].end = nanoseconds();
  }

 private:
  __device__ __forceinline__ static bool is_recorded() {
    return threadIdx.x == 0 && blockIdx.x < kMaxTracedBlocks;
  }
  __device__ __forceinline__ static int64_t nanoseconds() {
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
};

}  // namespace fi
