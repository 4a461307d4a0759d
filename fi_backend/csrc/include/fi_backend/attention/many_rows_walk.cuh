// The work of a thread block of the many-row line, piece by piece.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/plan/whole_items.h>
#include <fi_backend/plan/work_pieces.h>

namespace fi {

// The holders of parts of an item; see PlanView::cuts.
struct ItemHolders {
  int32_t first;  // the worker that has the item's first keys
  int32_t rank;   // of the part at hand
  int32_t count;
};

// One thread of a block walks for all. Where it stands is in shared memory.
struct ManyRowsWalk {
  LinePosition next_start;  // of a cut line: where the next piece begins
  int32_t worker;           // and the worker of the plan whose pieces these are

  __device__ __forceinline__ static PlanView plan_of(const AttentionParams& p,
                                                     const WorkGeometry& g) {
    // Only the counters are written, and in the end are what they were.
    return view_plan(const_cast<int32_t*>(p.plan), g.num_reqs, g.num_workers);
  }

  __device__ __forceinline__ void begin(const AttentionParams& p, const WorkGeometry& g) {
    worker = blockIdx.x;
    next_start = plan_of(p, g).starts[kManyRows][worker];
  }

  // False past the last piece; not to be called again after that. Whole items have no holders.
  __device__ __forceinline__ bool next(const AttentionParams& p, const WorkGeometry& g,
                                       WorkPiece& piece, ItemHolders& holders) {
    const PlanView plan = plan_of(p, g);
    if (plan.has_work[kManyRows] == kWholeItems) return next_item(p, g, plan, piece);
    const LinePosition* starts = plan.starts[kManyRows];
    while (
        !next_piece(g, kManyRows, p.qo_indptr, p.kv_lens, starts[worker + 1], next_start, piece)) {
      worker += gridDim.x;
      if (worker >= g.num_workers) return false;
      next_start = starts[worker];
    }
    if (!piece.whole()) holders = find_holders(plan.cuts[kManyRows], piece);
    return true;
  }

 private:
  // Every block asks until there is none left; the last one to ask leaves the counter at 0.
  __device__ __forceinline__ static bool next_item(const AttentionParams& p, const WorkGeometry& g,
                                                   const PlanView& plan, WorkPiece& piece) {
    const int64_t* tiles_before = plan.prefix_cost[kManyRows];
    const uint32_t num_heads = g.num_kv_heads;
    const uint32_t num_items = uint32_t(tiles_before[g.num_reqs]) * num_heads;
    int32_t* num_taken = plan.finished[kManyRows] + g.num_workers;
    const uint32_t taken = atomicAdd(num_taken, 1);
    if (taken + 1 == num_items + gridDim.x) *num_taken = 0;
    if (taken >= num_items) return false;
    const int32_t r = last_at_most(tiles_before, 0, g.num_reqs, taken / num_heads);
    const auto before = uint32_t(tiles_before[r]);
    const auto num_tiles = uint32_t(tiles_before[r + 1]) - before;
    const RequestSpan span = request_span(p.qo_indptr, p.kv_lens, g.num_reqs, r);
    LinePosition at = whole_item(g, r, span.kv_len, num_tiles, taken - before * num_heads);
    const LinePosition end = {g.num_reqs, 0, 0, 0};
    take_piece(g, kManyRows, span, end, at, piece);
    return true;
  }

  __device__ __forceinline__ ItemHolders find_holders(const ItemCut* cuts,
                                                      const WorkPiece& piece) const {
    const bool begins_item = piece.tokens.begin == piece.item.begin;
    const ItemCut cut = cuts[begins_item ? worker + 1 : worker];
    return {cut.first_holder, begins_item ? 0 : cut.rank, cut.num_holders};
  }
};

}  // namespace fi
