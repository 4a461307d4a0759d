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

constexpr int kMaxWorkers = 16383;  // far more than a GPU has thread blocks resident
constexpr int kMaxChunks = 16;      // chunks of one item in batch-invariant mode

// A place in a line. kv_offset counts tokens from the start of the item's kv range.
struct LinePosition {
  int32_t request;
  int32_t kv_head;
  int32_t q_tile;
  int32_t kv_offset;
};

// The item that a worker begins inside of.
struct ItemCut {
  int32_t first_holder;  // the worker that has the item's first keys
  int32_t rank;          // of the worker among those that have keys of it, in their order
  int32_t num_holders;
  int32_t unused;  // 16 bytes can be one load
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
  const int64_t wish = kv_offset + align / 2;
  const int64_t cut = chunk == 0 ? wish & -align : divide_index(wish, align).quot * align;
  const int64_t smallest = chunk == 0 ? g.min_piece_tokens : 1;
  if (cut < smallest) return 0;
  if (cut > num_tokens - smallest) return num_tokens;
  return static_cast<int32_t>(cut);
}

// Of a plan's buffer, in bytes: the size of a start, cut or span, each of which can be one load.
constexpr int64_t kPlanAlignment = 16;

// The plan's arrays in its int32 buffer. Workers own neighbouring pieces of a line: starts[line][w]
// is where worker w begins, starts[line][num_workers] the end.
struct PlanView {
  WorkGeometry* geometry;
  int32_t* has_work;                // [kNumLines], 0 if the line has no item; see whole_items.h
  int32_t* few_row_blocks;          // [1], see few_row_blocks()
  int32_t* num_parts;               // [1], states of a row of groups (group_rows.h); 1 of others
  int64_t* prefix_cost[kNumLines];  // [num_reqs + 1], cost of the line's requests before r
  LinePosition* starts[kNumLines];  // [num_workers + 1]
  ItemCut* cuts[kNumLines];         // [num_workers + 1]; {w, 0, 1} where w begins at an item's edge
  RequestSpan* spans[kNumLines];    // [num_workers + 1], of the requests where workers begin
  int32_t* finished[kNumLines];     // [num_workers + 1], 0: counters for the run, which leaves 0;
                                    // the last one is of whole items
};

constexpr int kPlanHeaderInts = 20;
constexpr int kHasWorkInt = 16;  // places in the header
constexpr int kFewRowBlocksInt = kHasWorkInt + kNumLines;
constexpr int kNumPartsInt = kFewRowBlocksInt + 1;
static_assert(kNumPartsInt < kPlanHeaderInts, "header too small");
static_assert(sizeof(WorkGeometry) <= kHasWorkInt * sizeof(int32_t), "header too small");

FI_HOST_DEVICE int64_t plan_ints(int64_t num_reqs, int64_t num_workers) {
  return kPlanHeaderInts + kNumLines * (2 * (num_reqs + 1) + 13 * (num_workers + 1));
}

FI_HOST_DEVICE PlanView view_plan(int32_t* buffer, int32_t num_reqs, int32_t num_workers) {
  PlanView plan;
  plan.geometry = reinterpret_cast<WorkGeometry*>(buffer);
  plan.has_work = buffer + kHasWorkInt;
  plan.few_row_blocks = buffer + kFewRowBlocksInt;
  plan.num_parts = buffer + kNumPartsInt;
  const int64_t num_costs = int64_t{num_reqs} + 1;
  const int64_t num_starts = int64_t{num_workers} + 1;
  auto* cost = reinterpret_cast<int64_t*>(buffer + kPlanHeaderInts);
  auto* starts = reinterpret_cast<LinePosition*>(cost + kNumLines * num_costs);
  auto* cuts = reinterpret_cast<ItemCut*>(starts + kNumLines * num_starts);
  auto* spans = reinterpret_cast<RequestSpan*>(cuts + kNumLines * num_starts);
  auto* finished = reinterpret_cast<int32_t*>(spans + kNumLines * num_starts);
  for (int line = 0; line < kNumLines; ++line) {
    plan.prefix_cost[line] = cost + line * num_costs;
    plan.starts[line] = starts + line * num_starts;
    plan.cuts[line] = cuts + line * num_starts;
    plan.spans[line] = spans + line * num_starts;
    plan.finished[line] = finished + line * num_starts;
  }
  return plan;
}

// The last of the ascending values [begin, end) that is at most x, or begin if there is none.
FI_HOST_DEVICE int32_t last_at_most(const int64_t* values, int32_t begin, int32_t end, int64_t x) {
  FI_NO_UNROLL
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

// Move the place of an item to the legal cut nearest to a wished one.
FI_HOST_DEVICE LinePosition cut_item(const WorkGeometry& g, int line, int32_t num_tiles,
                                     int32_t num_tokens, int64_t wish, LinePosition at) {
  at.kv_offset = legal_cut(g, line, num_tokens, min64(wish, num_tokens));
  return num_tokens > 0 && at.kv_offset == num_tokens ? next_item(g, num_tiles, at) : at;
}

// Find the place of a cost inside a few-row request, moved to a legal cut. Every piece of an item
// has its share of what an item costs besides its keys.
FI_HOST_DEVICE LinePosition locate_few_rows(const WorkGeometry& g, int32_t request,
                                            const RequestLens& lens, int64_t cost) {
  const int64_t item = max64(1, item_cost(g, kFewRows, lens.qo_len, lens.kv_len, 0));
  const QuotRem in_head = divide_index(cost, item);
  const KvRange tokens = item_tokens(g, kFewRows, lens.qo_len, lens.kv_len, 0);
  const int32_t num_tokens = tokens.end - tokens.begin;
  const int64_t units = (int64_t{num_tokens} + kCostTokens - 1) / kCostTokens;
  const int64_t wish = divide_index(in_head.rem * units, item).quot * kCostTokens;
  const LinePosition at = {request, static_cast<int32_t>(in_head.quot), 0, 0};
  return cut_item(g, kFewRows, 1, num_tokens, wish, at);
}

// Find the place of a cost inside a request, moved to a legal cut. Places grow with costs.
FI_HOST_DEVICE LinePosition locate(const WorkGeometry& g, int line, int32_t request,
                                   const RequestLens& lens, int64_t cost) {
  if (line == kFewRows) return locate_few_rows(g, request, lens, cost);
  const HeadCost head = make_head_cost(g, lens);
  const QuotRem in_head = divide_index(cost, max64(1, head.all()));
  LinePosition at{request, static_cast<int32_t>(in_head.quot), 0, 0};
  int32_t end_tile = head.num_tiles;
  FI_NO_UNROLL
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
  const int32_t rows = num_tile_rows(g, line, lens.qo_len, at.q_tile);
  const int64_t rows_cost = tile_unit_cost(g, line, rows);
  const int64_t wish =
      divide_index(max64(0, in_item - g.item_overhead) * kCostTokens, rows_cost).quot;
  return cut_item(g, line, head.num_tiles, tokens.end - tokens.begin, wish, at);
}

// Write where worker w begins, at a cost inside of `request`; return it. A legal cut may lie at the
// next request, so both spans are wanted.
FI_HOST_DEVICE LinePosition plan_start(const WorkGeometry& g, int line, int32_t request,
                                       const RequestSpan& here, const RequestSpan& next,
                                       int64_t cost, int32_t w, const PlanView& plan) {
  const LinePosition start = locate(g, line, request, {here.qo_len, here.kv_len}, cost);
  plan.starts[line][w] = start;
  plan.spans[line][w] = start.request == request ? here : next;
  return start;
}

// Write the start of a worker that has nothing to do, or the end of the line; return it.
FI_HOST_DEVICE LinePosition plan_end(const WorkGeometry& g, int line, int32_t w,
                                     const PlanView& plan) {
  const LinePosition end = {g.num_reqs, 0, 0, 0};
  plan.starts[line][w] = end;
  plan.spans[line][w] = {};
  return end;
}

// Packed rows of a request up to which more than one team of the few-row CUDA kernel fits an SM.
constexpr int kSmallItemRows = 8;

// Cost of the keys that keep a worker busy for as long as it takes to start it; and of those that
// do for as long as merging its piece with many others of an item takes, in which nothing is read.
constexpr int kWorthStarting = 32;
constexpr int kWorthMerging = 128;
constexpr int kManyPieces = 16;  // of an item

// What a line's requests have in sum.
struct LineLoad {
  int64_t num_requests;  // in the line
  int64_t cost;
  int64_t num_chunks;  // of all items, if they are only cut at chunks of a fixed size
  uint32_t largest;    // cost of a request, see clamp_cost()
  int64_t num_rows;    // of q, those of the other line included
  int64_t other_cost;  // of the other line, if g.shares_sms
};

FI_HOST_DEVICE uint32_t clamp_cost(int64_t cost) {
  return static_cast<uint32_t>(min64(cost, 0xffffffff));
}

// Chunks of a few-row request's items, if they are cut at chunks of a fixed size.
FI_HOST_DEVICE int64_t num_fixed_chunks(const WorkGeometry& g, const RequestLens& lens) {
  if (g.split <= 0 || num_q_tiles(g, kFewRows, lens.qo_len) == 0) return 0;
  const KvRange tokens = item_tokens(g, kFewRows, lens.qo_len, lens.kv_len, 0);
  const int32_t num_tokens = tokens.end - tokens.begin;
  const int64_t chunk = chunk_tokens(g, kFewRows, num_tokens);
  return g.num_kv_heads * max64(1, divide_index(num_tokens + chunk - 1, chunk).quot);
}

// Teams an SM: as many as fit, which hide each other's latencies, or fewer if the SM with the most
// chunks then has fewer of them by far.
FI_HOST_DEVICE uint32_t teams_for_chunks(uint32_t num_sms, uint32_t most_teams,
                                         int64_t num_chunks) {
  uint32_t best = most_teams;
  int64_t least = 0;
  FI_NO_UNROLL
  for (uint32_t teams = most_teams; teams > 0; --teams) {
    const int64_t of_sm = ceil_div64(num_chunks, int64_t{teams} * num_sms) * teams;
    if (teams < most_teams && of_sm * 8 > least * 7) continue;
    best = teams;
    least = of_sm;
  }
  return best;
}

// True if a step has but few rows on average. Kernels are chosen by the same rule, though by the
// rows that q has room for.
FI_HOST_DEVICE bool has_few_rows(const WorkGeometry& g, int64_t num_rows) {
  return num_rows <= int64_t{g.num_reqs} * (kSmallItemRows / g.group_size);
}

// Multiprocessors of a GPU that a plan for so many workers is for.
FI_HOST_DEVICE int32_t planned_sms(int32_t num_workers) { return (num_workers + 2) / 3; }

// True if a step cannot have more few-row items than multiprocessors. One large team an SM then
// reads as fast as several, and has fewer pieces to merge and more warps to do it. Kernels are
// chosen by the same rule.
FI_HOST_DEVICE bool has_few_items(int64_t num_reqs, int64_t num_kv_heads, int32_t num_workers) {
  return num_reqs * num_kv_heads <= planned_sms(num_workers);
}

// The first so many workers of the few-row line get work: one an SM, a third of them, or as many as
// fit where that is worth it. In between, some SMs would have twice the work of others. Equal items
// are cut into equal pieces, or not at all, if that leaves few without work; or, with one team an
// SM, if it adds less than the second piece that a worker across the border of an item has. Two
// teams of an SM that have work read as fast as three, so equal items may be dealt in one round or
// two; in more, teams drift apart for longer than the merges of cut items take.
FI_HOST_DEVICE int32_t active_few_row_workers(const WorkGeometry& g, const LineLoad& load) {
  const uint32_t num_sms = planned_sms(g.num_workers);
  const bool is_one_team =
      !has_few_rows(g, load.num_rows) || has_few_items(g.num_reqs, g.num_kv_heads, g.num_workers);
  const uint32_t num_teams = is_one_team ? 1 : g.teams_per_sm;
  const int64_t num_items = load.num_requests * g.num_kv_heads;
  const int64_t pieces = min64(load.cost / kWorthStarting, num_items * kManyPieces);
  const bool needs_all = max64(pieces, load.cost / kWorthMerging) >= 2 * int64_t{num_sms};
  uint32_t most_teams = needs_all ? num_teams : 1;
  if (g.split > 0) most_teams = teams_for_chunks(num_sms, most_teams, load.num_chunks);
  int64_t active = min64(g.num_workers, most_teams * num_sms);
  // A worker for each piece at most: no team of an SM idles while another has two pieces.
  const int64_t cost_of_piece = g.cut_tokens / kCostTokens * unit_cost(1);
  if (load.cost < active * cost_of_piece) {
    active = max64(1, divide_index(load.cost, cost_of_piece).quot);
  }

  const bool items_are_equal = load.largest * load.num_requests <= load.cost + load.cost / 32;
  if (!items_are_equal || num_items == 0) return static_cast<int32_t>(active);
  constexpr uint32_t kMostRounds = 2;
  const bool items_are_same = load.largest * load.num_requests == load.cost;
  FI_NO_UNROLL
  for (uint32_t teams = (uint32_t(active) + num_sms - 1) / num_sms; teams > 0; --teams) {
    const auto resident = static_cast<uint32_t>(min64(active, teams * num_sms));
    if (num_items > resident) {
      if (!items_are_same || num_items > kMostRounds * resident) break;
      const uint32_t workers = uint32_t(num_items) / kMostRounds;
      const bool are_whole = workers * kMostRounds == uint32_t(num_items);
      if (are_whole && teams > 1 && (resident - workers) * 16 <= resident) {
        return static_cast<int32_t>(workers);
      }
      continue;
    }
    const uint32_t without_work = resident % uint32_t(num_items);
    const bool is_cut = teams < most_teams && uint32_t(num_items) * 2 <= resident;
    if (is_cut) continue;
    const auto added_share = [&] {
      const int64_t share = divide_index(load.cost, resident).quot;
      return divide_index(load.cost, resident - without_work).quot - share;
    };
    if (without_work * 16 <= resident || (teams == 1 && 2 * added_share() <= g.item_overhead)) {
      return static_cast<int32_t>(resident - without_work);
    }
  }
  return static_cast<int32_t>(active);
}

// Cost at which worker w of a line begins, without overflow.
FI_HOST_DEVICE int64_t worker_cost(int64_t total, int32_t num_workers, int32_t worker) {
  const QuotRem share = divide_index(total, num_workers);
  const uint32_t rest = uint32_t(share.rem) * uint32_t(worker);  // below kMaxWorkers^2
  return share.quot * worker + rest / uint32_t(num_workers);
}

}  // namespace fi
