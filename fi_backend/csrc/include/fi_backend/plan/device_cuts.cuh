// The cuts of a line (item_cuts.h), found by one block.
#pragma once

#include <fi_backend/plan/item_cuts.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

inline constexpr int kCutWords = (kMaxWorkers + 1) / kWarpSize;

// Scratch of a block: a bit for each start of the line, see CutFlags; and the starts, if they fit.
struct CutMemory {
  uint32_t first[kCutWords];
  uint32_t last[kCutWords];
  uint32_t fresh[kCutWords];
  static constexpr int kMaxStarts = 512;
  LinePosition starts[kMaxStarts];
};

// Number of the bits [begin, end] that are set.
__device__ __forceinline__ int32_t count_bits(const uint32_t* words, uint32_t begin, uint32_t end) {
  int32_t count = 0;
  for (uint32_t word = begin / kWarpSize; word <= end / kWarpSize; ++word) {
    uint32_t bits = words[word];
    if (word == begin / kWarpSize) bits &= ~0u << begin % kWarpSize;
    if (word == end / kWarpSize) bits &= ~0u >> (kWarpSize - 1 - end % kWarpSize);
    count += __popc(bits);
  }
  return count;
}

// The last set bit at or before `at`, and the first at or after it. There is one.
__device__ __forceinline__ int32_t last_bit(const uint32_t* words, uint32_t at) {
  uint32_t word = at / kWarpSize;
  uint32_t bits = words[word] & ~0u >> (kWarpSize - 1 - at % kWarpSize);
  while (bits == 0) bits = words[--word];
  return word * kWarpSize + kWarpSize - 1 - __clz(int(bits));
}
__device__ __forceinline__ int32_t first_bit(const uint32_t* words, uint32_t at) {
  uint32_t word = at / kWarpSize;
  uint32_t bits = words[word] & ~0u << at % kWarpSize;
  while (bits == 0) bits = words[++word];
  return word * kWarpSize + __ffs(int(bits)) - 1;
}

// Write what plan_cuts() writes. All threads call this, after a barrier behind `starts`, which are
// in shared or in global memory.
__device__ __forceinline__ void write_cuts(const LinePosition* starts, int32_t num_workers,
                                           CutMemory& memory, ItemCut* cuts) {
  for (int32_t base = 0; base <= num_workers; base += blockDim.x) {
    const int32_t w = base + int32_t(threadIdx.x);
    CutFlags flags = {false, false, false};
    if (w <= num_workers) flags = cut_flags(starts, w);
    const uint32_t first = __ballot_sync(kFullWarp, flags.is_first);
    const uint32_t last = __ballot_sync(kFullWarp, flags.is_last);
    const uint32_t fresh = __ballot_sync(kFullWarp, flags.is_new);
    if (threadIdx.x % kWarpSize == 0 && w <= num_workers) {
      memory.first[w / kWarpSize] = first;
      memory.last[w / kWarpSize] = last;
      memory.fresh[w / kWarpSize] = fresh;
    }
  }
  __syncthreads();
  for (int32_t w = threadIdx.x; w <= num_workers; w += blockDim.x) {
    ItemCut cut = {w, 0, 1, 0};
    if (is_cut(starts[w])) {
      const int32_t first = last_bit(memory.first, w);
      const int32_t rank = count_bits(memory.fresh, first, w);
      const int32_t last = first_bit(memory.last, w);
      cut = {first - 1, rank, 1 + count_bits(memory.fresh, first, last), 0};
    }
    cuts[w] = cut;
  }
}

}  // namespace fi
