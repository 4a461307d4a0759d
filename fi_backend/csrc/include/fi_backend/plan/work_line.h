// The planner: cut a step's attention into one equal-cost, contiguous piece per worker.
//
// The items of a line (geometry.h) stand in order of request, head and query tile; the line is cut
// at equal costs (work_cost.h), and an item that a cut falls into is finished by merging its pieces
// in line order.
//
// Every function is a pure function of lengths, so that the host (host_plan.h) and the device
// (device_plan.cuh) run the same code, and the arrays live in one int32 buffer (see PlanView) whose
// size depends on capacities alone.
#pragma once

#include <fi_backend/plan/work_cost.h>

namespace fi {

constexpr int kMaxChunks = 16;  // chunks of one item in batch-invariant mode

// A place in a line. kv_offset counts tokens from the start of the item's kv range.
struct LinePosition {
  int32_t request;
  int32_t kv_head;
  int32_t q_tile;
  int32_t kv_offset;
};

// Tokens per chunk of an item: its state is computed per chunk, and chunks are merged in order.
// 0 = one chunk wherever the item is cut. A function of the item alone, so results are invariant.
FI_HOST_DEVICE int32_t chunk_tokens(const WorkGeometry& g, int line, int32_t num_tokens) {
  if (g.split == 0) return 0;
  if (g.split < 0 || line == kManyRows) return num_tokens > 0 ? num_tokens : 1;
  const int64_t per_chunk = ceil_div64(num_tokens, int64_t{g.split} * kMaxChunks);
  return static_cast<int32_t>(min64(max64(per_chunk, 1) * g.split, 0x7fffffff));
}

// Move a cut wished for at kv_offset to a legal place of the item, its end included.
FI_HOST_DEVICE int32_t legal_cut(const WorkGeometry& g, int line, int32_t num_tokens,
                                 int64_t kv_offset) {
  const int32_t chunk = chunk_tokens(g, line, num_tokens);
  const int64_t align = chunk == 0 ? g.cut_tokens : chunk;
  const int64_t cut = divide_index(kv_offset + align / 2, align).quot * align;
  const int64_t smallest = chunk == 0 ? g.min_piece_tokens : 1;
  if (cut < smallest) return 0;
  if (cut > num_tokens - smallest) return num_tokens;
  return static_cast<int32_t>(cut);
}

// The plan's arrays in its int32 buffer, which is aligned to 8 bytes. Workers own neighbouring
// pieces of a line: starts[line][w] is where worker w begins, starts[line][num_workers] the end.
// Starts and spans are 16 bytes each, and as well aligned as the buffer up to that.
struct PlanView {
  WorkGeometry* geometry;
  int32_t* has_work;                // [kNumLines], 1 if the line has any item, else 0
  int64_t* prefix_cost[kNumLines];  // [num_reqs + 1], cost of the line's requests before r
  LinePosition* starts[kNumLines];  // [num_workers + 1]
  RequestSpan* spans[kNumLines];    // [num_workers + 1], of the requests where workers begin
  int32_t* finished[kNumLines];     // [num_workers + 1], 0: counters for the run, which leaves 0
};

constexpr int kPlanHeaderInts = 16;
constexpr int kHasWorkInt = 14;  // place of has_work in the header
static_assert(sizeof(WorkGeometry) <= kHasWorkInt * sizeof(int32_t), "header too small");

FI_HOST_DEVICE int64_t plan_ints(int64_t num_reqs, int64_t num_workers) {
  return kPlanHeaderInts + kNumLines * (2 * (num_reqs + 1) + 9 * (num_workers + 1));
}

FI_HOST_DEVICE PlanView view_plan(int32_t* buffer, int32_t num_reqs, int32_t num_workers) {
  PlanView plan;
  plan.geometry = reinterpret_cast<WorkGeometry*>(buffer);
  plan.has_work = buffer + kHasWorkInt;
  const int64_t num_costs = int64_t{num_reqs} + 1;
  const int64_t num_starts = int64_t{num_workers} + 1;
  auto* cost = reinterpret_cast<int64_t*>(buffer + kPlanHeaderInts);
  auto* starts = reinterpret_cast<LinePosition*>(cost + kNumLines * num_costs);
  auto* spans = reinterpret_cast<RequestSpan*>(starts + kNumLines * num_starts);
  auto* finished = reinterpret_cast<int32_t*>(spans + kNumLines * num_starts);
  for (int line = 0; line < kNumLines; ++line) {
    plan.prefix_cost[line] = cost + line * num_costs;
    plan.starts[line] = starts + line * num_starts;
    plan.spans[line] = spans + line * num_starts;
    plan.finished[line] = finished + line * num_starts;
  }
  return plan;
}

// The last of the ascending values [begin, end) that is at most x, or begin if there is none.
FI_HOST_DEVICE int32_t last_at_most(const int64_t* values, int32_t begin, int32_t end, int64_t x) {
  while (end - begin > 1) {
    const int32_t middle = begin + (end - begin) / 2;
    if (values[middle] <= x) {
      begin = middle;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The place of the item after the one at `at`, whose request has num_tiles query tiles.
FI_HOST_DEVICE LinePosition next_item(const WorkGeometry& g, int32_t num_tiles,
                                      const LinePosition& at) {
  if (at.q_tile + 1 < num_tiles) return {at.request, at.kv_head, at.q_tile + 1, 0};
  if (at.kv_head + 1 < g.num_kv_heads) return {at.request, at.kv_head + 1, 0, 0};
  return {at.request + 1, 0, 0, 0};
}

// Find the place of a cost inside a request, moved to a legal cut. Places grow with costs.
FI_HOST_DEVICE LinePosition locate(const WorkGeometry& g, int line, int32_t request,
                                   const RequestLens& lens, int64_t cost) {
  const HeadCost head = make_head_cost(g, line, lens.qo_len, lens.kv_len);
  const QuotRem in_head = divide_index(cost, max64(1, head.all()));
  LinePosition at{request, static_cast<int32_t>(in_head.quot), 0, 0};
  int32_t end_tile = head.num_tiles;
  while (end_tile - at.q_tile > 1) {
    const int32_t middle = at.q_tile + (end_tile - at.q_tile) / 2;
    if (head.is_before_at_most(middle, in_head.rem)) {
      at.q_tile = middle;
    } else {
      end_tile = middle;
    }
  }
  const int64_t in_item = in_head.rem - head.before(at.q_tile);
  const KvRange tokens = item_tokens(g, line, lens.qo_len, lens.kv_len, at.q_tile);
  const int32_t num_tokens = tokens.end - tokens.begin;
  const int64_t rows_cost = unit_cost(num_tile_rows(g, line, lens.qo_len, at.q_tile));
  const int64_t wish =
      divide_index(max64(0, in_item - g.item_overhead) * kCostTokens, rows_cost).quot;
  at.kv_offset = legal_cut(g, line, num_tokens, min64(wish, num_tokens));
  return num_tokens > 0 && at.kv_offset == num_tokens ? next_item(g, head.num_tiles, at) : at;
}

// Write where worker w begins: at a cost inside of `request`.
FI_HOST_DEVICE void plan_start(const WorkGeometry& g, int line, const int32_t* qo_indptr,
                               const int32_t* kv_lens, int32_t request, int64_t cost, int32_t w,
                               const PlanView& plan) {
  const RequestSpan here = request_span(qo_indptr, kv_lens, request);
  // A legal cut may lie at the next request. Its lengths are loaded together with this one's.
  RequestSpan next = {};
  if (request + 1 < g.num_reqs) next = request_span(qo_indptr, kv_lens, request + 1);
  const LinePosition start = locate(g, line, request, {here.qo_len, here.kv_len}, cost);
  plan.starts[line][w] = start;
  plan.spans[line][w] = start.request == request ? here : next;
}

// Write the start of a worker that has nothing to do, or the end of the line.
FI_HOST_DEVICE void plan_end(const WorkGeometry& g, int line, int32_t w, const PlanView& plan) {
  plan.starts[line][w] = {g.num_reqs, 0, 0, 0};
  plan.spans[line][w] = {};
}

// Packed rows of a request up to which the few-row CUDA kernel needs so little that a third more of
// its thread blocks fit an SM.
constexpr int kSmallItemRows = 8;

// The first so many workers of a line get work. Two thirds of them where no more thread blocks fit
// a GPU at a time, and where a line has few items: more pieces of an item only take longer to
// merge.
FI_HOST_DEVICE int32_t active_workers(const WorkGeometry& g, int line, int64_t num_items,
                                      int64_t num_rows) {
  const int64_t small_rows = int64_t{g.num_reqs} * (kSmallItemRows / g.group_size);
  const bool needs_all = line == kFewRows && num_items >= g.many_items && num_rows <= small_rows;
  return g.many_items == 0 || needs_all ? g.num_workers : (2 * g.num_workers + 2) / 3;
}

// Cost at which worker w of a line begins, without overflow.
FI_HOST_DEVICE int64_t worker_cost(int64_t total, int32_t num_workers, int32_t worker) {
  const QuotRem share = divide_index(total, num_workers);
  return share.quot * worker + divide_index(share.rem * worker, num_workers).quot;
}

}  // namespace fi
