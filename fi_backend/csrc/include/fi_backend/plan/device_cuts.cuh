// The cuts of a line (item_cuts.h), found by a team of threads.
#pragma once

#include <fi_backend/plan/item_cuts.h>

#include <fi_backend/plan/plan_team.cuh>

namespace fi {

inline constexpr int kCutWords = (kMaxWorkers + 1) / kWarpSize;

// Scratch of a team: a bit for each start of the line, see CutFlags; and the starts, if they fit.
struct CutMemory {
  uint32_t first[kCutWords];
  uint32_t last[kCutWords];
  uint32_t fresh[kCutWords];
  static constexpr int kMaxStarts = 512;
  LinePosition starts[kMaxStarts];
};

// The nearest start in other words that a mask marks, and the fresh starts from there up to this
// word. There is a marked one, or nobody looks at what is found.
struct BeyondWord {
  int32_t at;
  int32_t count;
};

// Look before (kStep -1) or behind (1) `word`. All lanes call this with one word.
template <int kStep>
__device__ __forceinline__ BeyondWord find_beyond(const uint32_t* marks, const uint32_t* fresh,
                                                  int32_t word, int32_t num_words) {
  const int32_t lane = threadIdx.x % kWarpSize;
  BeyondWord found = {0, 0};
  FI_NO_UNROLL
  for (int32_t next = word + kStep; next >= 0 && next < num_words; next += kStep * kWarpSize) {
    const int32_t at = next + kStep * lane;
    const bool exists = at >= 0 && at < num_words;
    const uint32_t mark = exists ? marks[at] : 0;
    const uint32_t marked = __ballot_sync(kFullWarp, mark != 0);
    const int32_t nearest = marked != 0 ? __ffs(int(marked)) - 1 : kWarpSize;
    const int32_t bit = kStep < 0 ? kWarpSize - 1 - __clz(int(mark)) : __ffs(int(mark)) - 1;
    uint32_t bits = exists && lane <= nearest ? fresh[at] : 0;
    if (lane == nearest) bits &= kStep < 0 ? ~0u << bit : ~0u >> (kWarpSize - 1 - bit);
    found.count += __reduce_add_sync(kFullWarp, __popc(bits));
    if (marked == 0) continue;
    found.at = __shfl_sync(kFullWarp, at * kWarpSize + bit, nearest);
    break;
  }
  return found;
}

// The cut at a start, which is in an item where `is_cut`; `word` is the one of its bit, all lanes
// have the same.
__device__ __forceinline__ ItemCut find_cut(const CutMemory& memory, bool is_cut, int32_t word,
                                            int32_t num_words) {
  const int32_t lane = threadIdx.x % kWarpSize;
  const uint32_t up_to = ~0u >> (kWarpSize - 1 - lane);
  const uint32_t from = ~0u << lane;
  const uint32_t fresh = memory.fresh[word];
  const uint32_t first = memory.first[word] & up_to;
  const uint32_t last = memory.last[word] & from;
  // Most items are short, and all their cuts are in one word.
  BeyondWord before = {0, 0}, behind = {0, 0};
  if (__any_sync(kFullWarp, is_cut && first == 0)) {
    before = find_beyond<-1>(memory.first, memory.fresh, word, num_words);
  }
  if (__any_sync(kFullWarp, is_cut && last == 0)) {
    behind = find_beyond<1>(memory.last, memory.fresh, word, num_words);
  }
  const int32_t first_bit = kWarpSize - 1 - __clz(int(first));
  const int32_t last_bit = __ffs(int(last)) - 1;
  const int32_t first_cut = first != 0 ? word * kWarpSize + first_bit : before.at;
  const uint32_t from_first = first != 0 ? ~0u << first_bit : ~0u;
  const uint32_t up_to_last = last != 0 ? ~0u >> (kWarpSize - 1 - last_bit) : ~0u;
  const int32_t rank = __popc(fresh & up_to & from_first) + (first != 0 ? 0 : before.count);
  const int32_t later = __popc(fresh & ~up_to & up_to_last) + (last != 0 ? 0 : behind.count);
  return {first_cut - 1, rank, 1 + rank + later, 0};
}

// Write what plan_cuts() writes. All threads of the team call this, after a barrier behind
// `starts`, which are in shared or in global memory.
template <class Team>
__device__ __forceinline__ void write_cuts(const Team& team, const LinePosition* starts,
                                           int32_t num_workers, CutMemory& memory, ItemCut* cuts) {
  FI_NO_UNROLL
  for (int32_t base = 0; base <= num_workers; base += team.num_threads()) {
    const int32_t w = base + int32_t(team.thread());
    CutFlags flags = {false, false, false};
    if (w <= num_workers) flags = cut_flags(starts, w);
    const uint32_t first = __ballot_sync(kFullWarp, flags.is_first);
    const uint32_t last = __ballot_sync(kFullWarp, flags.is_last);
    const uint32_t fresh = __ballot_sync(kFullWarp, flags.is_new);
    if (team.thread() % kWarpSize == 0 && w <= num_workers) {
      memory.first[w / kWarpSize] = first;
      memory.last[w / kWarpSize] = last;
      memory.fresh[w / kWarpSize] = fresh;
    }
  }
  team.sync();
  const int32_t num_words = num_workers / kWarpSize + 1;
  FI_NO_UNROLL
  for (int32_t base = 0; base <= num_workers; base += team.num_threads()) {
    const int32_t w = base + int32_t(team.thread());
    const int32_t word = w / kWarpSize;
    if (word >= num_words) break;
    const bool is_inside = w <= num_workers && is_cut(starts[w]);
    const ItemCut inside = find_cut(memory, is_inside, word, num_words);
    if (w > num_workers) break;
    cuts[w] = is_inside ? inside : ItemCut{w, 0, 1, 0};
  }
}

}  // namespace fi
