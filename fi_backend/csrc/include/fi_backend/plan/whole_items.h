// Items of the many-row line that are dealt whole: thread blocks take one after the other, longest
// first, and nobody merges anything.
//
// An item of 128 rows is a small part of most steps. Where it is not, the line is cut at equal
// costs instead (work_line.h): a part of an item costs its reader and its writer as much as some
// hundred keys do.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

// What PlanView::has_work says of a line. Workers begin where PlanView::starts says.
constexpr int kNoWork = 0;
constexpr int kCutLine = 1;
constexpr int kWholeItems = 2;  // workers have an item each at most, and blocks find the others:
                                // PlanView::prefix_cost counts the query tiles of requests before

// What the items of the many-row line have in sum.
struct ItemsLoad {
  int64_t cost;
  int64_t num_items;
  int64_t longest;    // cost of an item
  int64_t num_heads;  // whose K and V they read, of all requests
};

// True if all items are dealt whole: they cannot be cut, or that takes little longer than equal
// parts for so many workers would.
FI_HOST_DEVICE bool deals_whole_items(const WorkGeometry& g, const ItemsLoad& load,
                                      int64_t workers) {
  constexpr int kMergeTokens = 640;   // keys in the time it takes to write parts and merge them
  constexpr int kMaxItems = 1 << 30;  // for short divisions when they are dealt
  if (g.teams_per_sm == 0 || load.num_items == 0 || load.num_items > kMaxItems) return false;
  if (g.kept_states > 0) return workers == 0;  // see kept_part_workers()
  if (g.split != 0) return true;
  const int64_t share = divide_index(load.cost, workers).quot;
  const int64_t mean = divide_index(load.cost, load.num_items).quot;
  const int64_t in_last_round = divide_index(load.num_items - 1, workers).rem + 1;
  // Costs of one request grow evenly, and the shortest items come last; those of several lengths
  // come in any order.
  const int64_t shortest = 2 * mean - load.longest;
  const int64_t tail = shortest >= 0
                           ? divide_index(shortest * (workers - in_last_round), workers).quot
                           : load.longest / 2;
  // Items of a head begin together, their parts at different keys. So parts read from memory what
  // L2 has no room for, and that takes longer than the arithmetic.
  const int64_t cost_in_l2 = g.section_tokens / kCostTokens * unit_cost(g.tile_rows);
  const int64_t from_memory = load.num_heads * load.longest > cost_in_l2 ? share / 3 : 0;
  const int64_t merging = kMergeTokens / kCostTokens * unit_cost(g.tile_rows);
  const int64_t parts = share + share / 16 + from_memory + merging;
  return max64(load.longest, share + tail) <= parts;
}

FI_HOST_DEVICE uint32_t ceil_div32(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Kv heads of a request that make up a section: their keys and values fit the L2 cache together.
FI_HOST_DEVICE uint32_t section_heads(const WorkGeometry& g, int32_t kv_len) {
  const uint32_t num_heads = g.num_kv_heads;
  const uint32_t fitting = uint32_t(g.section_tokens) / (kv_len > 0 ? kv_len : 1);
  const uint32_t num_sections = fitting < 1 ? num_heads : ceil_div32(num_heads, fitting);
  return ceil_div32(num_heads, num_sections);
}

// Item `index` of a request, in the order in which whole items are dealt: by sections of
// `section_heads` kv heads, and among these the last tiles, which see most under a causal mask, of
// all heads first.
FI_HOST_DEVICE LinePosition whole_item(int32_t request, uint32_t num_heads, uint32_t section_heads,
                                       uint32_t num_tiles, uint32_t index) {
  const uint32_t section = index / (section_heads * num_tiles);
  const uint32_t in_section = index - section * section_heads * num_tiles;
  const uint32_t first_head = section * section_heads;
  const uint32_t rest = num_heads - first_head;
  const uint32_t heads = section_heads < rest ? section_heads : rest;
  const uint32_t tile = in_section / heads;
  return {request, static_cast<int32_t>(first_head + in_section - tile * heads),
          static_cast<int32_t>(num_tiles - 1 - tile), 0};
}

// Write what worker w begins with where items are dealt whole, which is item w: blocks need not
// look for it. tiles_before: PlanView::prefix_cost. Return its place, or the line's end.
template <class FindSpan>
FI_HOST_DEVICE LinePosition plan_whole_item(const WorkGeometry& g, const int64_t* tiles_before,
                                            const FindSpan& find_span, int32_t w,
                                            const PlanView& plan) {
  const int64_t num_items = tiles_before[g.num_reqs] * g.num_kv_heads;
  if (w >= num_items) return plan_end(g, kManyRows, w, plan);
  const int32_t tiles = w / g.num_kv_heads;
  const int32_t r = last_at_most(tiles_before, 0, g.num_reqs, tiles);
  const RequestSpan span = find_span(r);
  const auto before = static_cast<uint32_t>(tiles_before[r]);
  const uint32_t num_tiles = static_cast<uint32_t>(tiles_before[r + 1]) - before;
  const LinePosition item =
      whole_item(r, g.num_kv_heads, section_heads(g, span.kv_len), num_tiles,
                 static_cast<uint32_t>(w) - before * static_cast<uint32_t>(g.num_kv_heads));
  plan.starts[kManyRows][w] = item;
  plan.spans[kManyRows][w] = span;
  return item;
}

}  // namespace fi
