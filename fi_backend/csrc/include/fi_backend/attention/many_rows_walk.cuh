// The work of a thread block of the many-row line, piece by piece.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/plan/whole_items.h>
#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/common/fresh_registers.cuh>

namespace fi {

// The holders of parts of an item; see PlanView::cuts.
struct ItemHolders {
  int32_t first;  // the worker that has the item's first keys
  int32_t rank;   // of the part at hand
  int32_t count;
};

// Where a request's whole items are in the order in which they are dealt.
struct RequestItems {
  RequestSpan span;
  int32_t request;
  uint32_t first;  // item
  uint32_t num_tiles;
  uint32_t num_items;
  uint32_t section_heads;
};

// One thread of a block walks for all. Where it stands is in shared memory.
struct ManyRowsWalk {
  LinePosition next_start;  // where the next piece begins, of a cut line, or the first whole item
  int32_t worker;           // and the worker of the plan whose pieces these are
  // Of whole items:
  uint32_t num_items;
  uint32_t num_dealt;  // in the order of blocks, before blocks ask for more
  bool has_item;       // this block has taken one
  bool deals_items;
  RequestItems items;  // of the request that the last one is of

  __device__ __forceinline__ static PlanView plan_of(const AttentionParams& p,
                                                     const WorkGeometry& g) {
    // Where its arrays lie is computed anew with every call: there are no registers to keep it in.
    int32_t* buffer = p.plan;
    asm volatile("" : "+l"(buffer));
    return view_plan(buffer, g.num_reqs, g.num_workers);
  }

  // `first`: the block's first worker; gridDim.x further on come its others. `dealt`: below that,
  // it is its first whole item too, as of blocks that begin at once.
  __device__ __forceinline__ void begin(const AttentionParams& p, const PlanView& plan,
                                        int32_t num_reqs, int32_t first, uint32_t dealt) {
    worker = first;
    num_dealt = dealt;
    has_item = false;
    items.request = 0;
    items.first = 0;
    items.num_items = 0;
    // All is loaded at once.
    const int32_t has_work = plan.has_work[kManyRows];
    const LinePosition start = plan.starts[kManyRows][worker];
    const RequestSpan span = plan.spans[kManyRows][worker];
    const auto num_tiles = uint32_t(plan.prefix_cost[kManyRows][num_reqs]);
    deals_items = has_work == kWholeItems;
    num_items = num_tiles * uint32_t(p.num_kv_heads);
    next_start = start;
    items.span = span;
  }

  // False past the last piece; not to be called again after that. Whole items have no holders.
  __device__ __forceinline__ bool next(const AttentionParams& p, const WorkGeometry& g,
                                       const FastDivider& group_size, WorkPiece& piece,
                                       ItemHolders& holders) {
    if (deals_items) return next_item(p, g, group_size, piece);
    while (!next_piece(g, kManyRows, p.qo_indptr, p.kv_lens,
                       plan_of(p, g).starts[kManyRows][worker + 1], next_start, piece)) {
      worker += fresh_num_blocks();
      if (worker >= g.num_workers) return false;
      next_start = plan_of(p, g).starts[kManyRows][worker];
    }
    if (!piece.whole()) holders = find_holders(p, g, piece);
    return true;
  }

 private:
  // Blocks ask a counter for items until there is none left; the last one to ask leaves it at 0.
  // Those that are dealt before are in the plan: a step begins at once.
  __device__ __forceinline__ bool next_item(const AttentionParams& p, const WorkGeometry& g,
                                            const FastDivider& group_size, WorkPiece& piece) {
    LinePosition at = next_start;
    if (has_item || uint32_t(worker) >= num_dealt) {
      int32_t* counter = plan_of(p, g).finished[kManyRows] + g.num_workers;
      const uint32_t asked = atomicAdd(counter, 1);
      if (asked + 1 == num_items + fresh_num_blocks() - num_dealt) *counter = 0;
      const uint32_t item = num_dealt + asked;
      if (item >= num_items) return false;
      if (item - items.first >= items.num_items) find_request(p, g, item);
      at = whole_item(items.request, g.num_kv_heads, items.section_heads, items.num_tiles,
                      item - items.first);
    }
    has_item = true;
    if (at.request >= g.num_reqs) return false;
    piece.request = at.request;
    piece.kv_head = at.kv_head;
    piece.q_tile = at.q_tile;
    piece.qo_begin = items.span.qo_begin;
    piece.qo_len = items.span.qo_len;
    piece.kv_len = items.span.kv_len;
    piece.num_rows = num_tile_rows(g, kManyRows, piece.qo_len, piece.q_tile);
    const auto seen_by = [&](uint32_t row) {
      return visible_tokens(g, piece.qo_len, piece.kv_len, group_size(row));
    };
    const uint32_t first_row = uint32_t(piece.q_tile) * g.tile_rows;
    piece.item = {seen_by(first_row).begin, seen_by(first_row + piece.num_rows - 1).end};
    piece.tokens = piece.item;
    return true;
  }

  // Find the request that an item is of; it is not before the one of the last item.
  __device__ __forceinline__ void find_request(const AttentionParams& p, const WorkGeometry& g,
                                               uint32_t item) {
    const int64_t* tiles_before = plan_of(p, g).prefix_cost[kManyRows];
    const uint32_t num_heads = g.num_kv_heads;
    const int32_t r = last_at_most(tiles_before, items.request, g.num_reqs, item / num_heads);
    const auto before = uint32_t(tiles_before[r]);
    items.request = r;
    items.span = request_span(p.qo_indptr, p.kv_lens, g.num_reqs, r);
    items.first = before * num_heads;
    items.num_tiles = uint32_t(tiles_before[r + 1]) - before;
    items.num_items = items.num_tiles * num_heads;
    items.section_heads = section_heads(g, items.span.kv_len);
  }

  __device__ __forceinline__ ItemHolders find_holders(const AttentionParams& p,
                                                      const WorkGeometry& g,
                                                      const WorkPiece& piece) const {
    const ItemCut* cuts = plan_of(p, g).cuts[kManyRows];
    const bool begins_item = piece.tokens.begin == piece.item.begin;
    const ItemCut cut = cuts[begins_item ? worker + 1 : worker];
    return {cut.first_holder, begins_item ? 0 : cut.rank, cut.num_holders};
  }
};

}  // namespace fi
