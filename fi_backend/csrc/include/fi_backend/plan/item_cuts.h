// Who else holds keys of an item that a worker begins or ends inside of: found once per step by the
// planner, so that no launch has to search the starts.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

// Starts inside of an item are cuts of it. Workers whose range is empty begin where the next worker
// begins: equal starts are one cut.
FI_HOST_DEVICE bool is_cut(const LinePosition& start) { return start.kv_offset > 0; }

FI_HOST_DEVICE bool same_item(const LinePosition& a, const LinePosition& b) {
  return a.request == b.request && a.kv_head == b.kv_head && a.q_tile == b.q_tile;
}

// A start's part in the line.
struct CutFlags {
  bool is_first;  // of its item's cuts
  bool is_last;
  bool is_new;  // another place than the start before
};

FI_HOST_DEVICE CutFlags cut_flags(const LinePosition* starts, int32_t w) {
  const LinePosition start = starts[w];
  if (!is_cut(start)) return {false, false, false};
  // The first start and the end of the line are no cuts.
  const LinePosition before = starts[w - 1];
  const LinePosition after = starts[w + 1];
  const bool continues = is_cut(before) && same_item(before, start);
  return {!continues, !(is_cut(after) && same_item(start, after)),
          !continues || before.kv_offset != start.kv_offset};
}

// Write the cuts of a line whose starts are known, on the host.
inline void plan_cuts(const LinePosition* starts, int32_t num_workers, ItemCut* cuts) {
  int32_t first = 0;  // cut of the item at hand
  int32_t rank = 0;
  for (int32_t w = 0; w <= num_workers; ++w) {
    cuts[w] = {w, 0, 1, 0};
    const CutFlags flags = cut_flags(starts, w);
    if (flags.is_first) first = w;
    rank = flags.is_first ? 1 : rank + flags.is_new;
    if (!is_cut(starts[w])) continue;
    cuts[w] = {first - 1, rank, 0, 0};
    if (!flags.is_last) continue;
    for (int32_t cut = first; cut <= w; ++cut) cuts[cut].num_holders = rank + 1;
  }
}

}  // namespace fi
