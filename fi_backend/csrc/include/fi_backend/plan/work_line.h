// The planner: cut a step's attention into one equal-cost, contiguous piece per worker.
//
// A work item is (request, kv head, query tile) with the range of kv tokens its rows can see. Items
// stand in line in that order; a line is cut at equal costs, and an item that a cut falls into is
// finished by merging the pieces in line order. A step has two lines, because requests with few
// rows are bound by reading KV and requests with many rows by arithmetic: each line has its own
// kernel. Which line a request stands in follows from its own query length alone.
//
// Every function is a pure function of lengths, so that host and device run the same code, and the
// arrays live in one int32 buffer (see PlanView) whose size depends on capacities alone.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

constexpr int kFewRows = 0;   // line of requests with at most few_rows_limit packed rows
constexpr int kManyRows = 1;  // line of all other requests
constexpr int kNumLines = 2;

constexpr int kCostTokens = 16;       // kv tokens per unit of cost
constexpr int kCostRows = 16;         // packed query rows per unit of cost
constexpr int kCutTokens = 64;        // an item is cut at multiples of this many tokens
constexpr int kMinPieceTokens = 128;  // a cut that would leave less moves to the item's edge
constexpr int kMaxChunks = 16;        // chunks of one item in batch-invariant mode
constexpr int kItemCost = 4;          // fixed cost of an item, in units

// What the planner knows besides lengths. Stored at the head of the plan; run checks it.
struct WorkGeometry {
  int32_t num_reqs;
  int32_t num_kv_heads;
  int32_t group_size;      // query heads per kv head; a packed row is (query token, head in group)
  int32_t few_rows_limit;  // requests with at most this many packed rows are few-row; 0 = none
  int32_t tile_rows;       // packed rows per query tile of the many-row line
  int32_t causal;          // 0 or 1
  int32_t window_left;     // a row sees this many keys to the left of its own; -1 = all
  int32_t split;           // 0 = cut anywhere, -1 = never cut, n = cut at multiples of n tokens
  int32_t num_workers;
};

// A place in a line. kv_offset counts tokens from the start of the item's kv range.
struct LinePosition {
  int32_t request;
  int32_t kv_head;
  int32_t q_tile;
  int32_t kv_offset;
};

struct KvRange {
  int32_t begin;
  int32_t end;
};

FI_HOST_DEVICE int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }
FI_HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FI_HOST_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

FI_HOST_DEVICE int line_of(const WorkGeometry& g, int32_t qo_len) {
  return int64_t{qo_len} * g.group_size <= g.few_rows_limit ? kFewRows : kManyRows;
}

FI_HOST_DEVICE int32_t num_q_tiles(const WorkGeometry& g, int line, int32_t qo_len) {
  if (qo_len <= 0 || line_of(g, qo_len) != line) return 0;
  if (line == kFewRows) return 1;
  return static_cast<int32_t>(ceil_div64(int64_t{qo_len} * g.group_size, g.tile_rows));
}

// Number of packed rows of a query tile.
FI_HOST_DEVICE int32_t num_tile_rows(const WorkGeometry& g, int line, int32_t qo_len,
                                     int32_t q_tile) {
  const int64_t rows = int64_t{qo_len} * g.group_size;
  if (line == kFewRows) return static_cast<int32_t>(rows);
  return static_cast<int32_t>(min64(g.tile_rows, rows - int64_t{q_tile} * g.tile_rows));
}

// The kv tokens that query token qo_idx of a request sees.
FI_HOST_DEVICE KvRange visible_tokens(const WorkGeometry& g, int32_t qo_len, int32_t kv_len,
                                      int64_t qo_idx) {
  const int64_t diagonal = int64_t{kv_len} - qo_len + qo_idx;  // the row's own position
  const int64_t end = g.causal ? max64(0, min64(kv_len, diagonal + 1)) : kv_len;
  const int64_t begin = g.window_left < 0 ? 0 : min64(end, max64(0, diagonal - g.window_left));
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// The kv tokens that at least one row of a query tile sees: one range, since ranges of consecutive
// rows overlap or touch.
FI_HOST_DEVICE KvRange item_tokens(const WorkGeometry& g, int line, int32_t qo_len, int32_t kv_len,
                                   int32_t q_tile) {
  const int64_t first_row = line == kFewRows ? 0 : int64_t{q_tile} * g.tile_rows;
  const int64_t last_row = first_row + num_tile_rows(g, line, qo_len, q_tile) - 1;
  const KvRange first = visible_tokens(g, qo_len, kv_len, first_row / g.group_size);
  const KvRange last = visible_tokens(g, qo_len, kv_len, last_row / g.group_size);
  return {first.begin, last.end};
}

// Cost of one unit of kv tokens of an item: memory traffic counts as one more unit of rows.
FI_HOST_DEVICE int64_t unit_cost(int32_t num_rows) { return ceil_div64(num_rows, kCostRows) + 1; }

FI_HOST_DEVICE int64_t item_cost(const WorkGeometry& g, int line, int32_t qo_len, int32_t kv_len,
                                 int32_t q_tile) {
  const KvRange tokens = item_tokens(g, line, qo_len, kv_len, q_tile);
  const int32_t rows = num_tile_rows(g, line, qo_len, q_tile);
  // Causal kernels skip what a tile's early rows do not see: half of the triangle at its end.
  const int64_t triangle = g.causal ? min64(rows / g.group_size, tokens.end - tokens.begin) / 2 : 0;
  const int64_t units = ceil_div64(int64_t{tokens.end} - tokens.begin - triangle, kCostTokens);
  return kItemCost + units * unit_cost(rows);
}

FI_HOST_DEVICE int64_t head_cost(const WorkGeometry& g, int line, int32_t qo_len, int32_t kv_len) {
  const int32_t num_tiles = num_q_tiles(g, line, qo_len);
  int64_t cost = 0;
  for (int32_t t = 0; t < num_tiles; ++t) cost += item_cost(g, line, qo_len, kv_len, t);
  return cost;
}

FI_HOST_DEVICE int64_t request_cost(const WorkGeometry& g, int line, int32_t qo_len,
                                    int32_t kv_len) {
  return head_cost(g, line, qo_len, kv_len) * g.num_kv_heads;
}

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
  const int64_t align = chunk == 0 ? kCutTokens : chunk;
  const int64_t cut = (kv_offset + align / 2) / align * align;
  const int64_t smallest = chunk == 0 ? kMinPieceTokens : 1;
  if (cut < smallest) return 0;
  if (cut > num_tokens - smallest) return num_tokens;
  return static_cast<int32_t>(cut);
}

// The plan's arrays in its int32 buffer. has_work[line] tells whether a line has any item;
// prefix_cost[line][r] is the cost of a line's requests
// before r; starts[line][w] is where worker w begins, and starts[line][num_workers] is the end.
struct PlanView {
  WorkGeometry* geometry;
  int32_t* has_work;  // [kNumLines]
  int64_t* prefix_cost[kNumLines];
  LinePosition* starts[kNumLines];
};

constexpr int kPlanHeaderInts = 16;
constexpr int kHasWorkInt = 14;  // place of has_work in the header
static_assert(sizeof(WorkGeometry) <= kHasWorkInt * sizeof(int32_t), "header too small");

FI_HOST_DEVICE int64_t plan_ints(int64_t num_reqs, int64_t num_workers) {
  return kPlanHeaderInts + kNumLines * (2 * (num_reqs + 1) + 4 * (num_workers + 1));
}

FI_HOST_DEVICE PlanView view_plan(int32_t* buffer, int32_t num_reqs, int32_t num_workers) {
  PlanView plan;
  plan.geometry = reinterpret_cast<WorkGeometry*>(buffer);
  plan.has_work = buffer + kHasWorkInt;
  auto* cost = reinterpret_cast<int64_t*>(buffer + kPlanHeaderInts);
  auto* starts = reinterpret_cast<LinePosition*>(cost + kNumLines * (int64_t{num_reqs} + 1));
  for (int line = 0; line < kNumLines; ++line) {
    plan.prefix_cost[line] = cost + line * (int64_t{num_reqs} + 1);
    plan.starts[line] = starts + line * (int64_t{num_workers} + 1);
  }
  return plan;
}

// Find the place of a cost in a line, moved to a legal cut. Places grow with costs.
FI_HOST_DEVICE LinePosition locate(const WorkGeometry& g, int line, const int64_t* prefix_cost,
                                   const int32_t* qo_indptr, const int32_t* kv_lens, int64_t cost) {
  // The last request that begins at or before the cost: it has work in this line.
  int32_t low = 0;
  int32_t high = g.num_reqs;
  while (high - low > 1) {
    const int32_t mid = low + (high - low) / 2;
    if (prefix_cost[mid] <= cost) {
      low = mid;
    } else {
      high = mid;
    }
  }
  if (cost >= prefix_cost[g.num_reqs]) return {g.num_reqs, 0, 0, 0};
  const int32_t qo_len = qo_indptr[low + 1] - qo_indptr[low];
  const int32_t kv_len = kv_lens[low];
  const int64_t per_head = (prefix_cost[low + 1] - prefix_cost[low]) / g.num_kv_heads;
  int64_t rest = cost - prefix_cost[low];
  LinePosition at{low, static_cast<int32_t>(rest / per_head), 0, 0};
  rest %= per_head;
  while (true) {
    const int64_t item = item_cost(g, line, qo_len, kv_len, at.q_tile);
    if (rest < item) break;
    rest -= item;
    ++at.q_tile;
  }
  const KvRange tokens = item_tokens(g, line, qo_len, kv_len, at.q_tile);
  const int32_t num_tokens = tokens.end - tokens.begin;
  const int64_t rows_cost = unit_cost(num_tile_rows(g, line, qo_len, at.q_tile));
  const int64_t wish = max64(0, rest - kItemCost) * kCostTokens / rows_cost;
  at.kv_offset = legal_cut(g, line, num_tokens, min64(wish, num_tokens));
  if (num_tokens > 0 && at.kv_offset == num_tokens) {
    ++at.q_tile;
    at.kv_offset = 0;
  }
  return at;
}

// Cost at which worker w of a line begins, without overflow.
FI_HOST_DEVICE int64_t worker_cost(int64_t total, int32_t num_workers, int32_t worker) {
  const int64_t share = total / num_workers;
  const int64_t rest = total % num_workers;
  return share * worker + rest * worker / num_workers;
}

// Plan on the host, one thread. The device runs the same steps as a prefix sum and one locate per
// worker.
inline void plan_work(const WorkGeometry& geometry, const int32_t* qo_indptr,
                      const int32_t* kv_lens, int32_t* buffer) {
  PlanView plan = view_plan(buffer, geometry.num_reqs, geometry.num_workers);
  *plan.geometry = geometry;
  for (int line = 0; line < kNumLines; ++line) {
    int64_t* prefix = plan.prefix_cost[line];
    prefix[0] = 0;
    for (int32_t r = 0; r < geometry.num_reqs; ++r) {
      const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
      prefix[r + 1] = prefix[r] + request_cost(geometry, line, qo_len, kv_lens[r]);
    }
    const int64_t total = prefix[geometry.num_reqs];
    plan.has_work[line] = total > 0;
    for (int32_t w = 0; w <= geometry.num_workers; ++w) {
      plan.starts[line][w] = geometry.num_reqs == 0
                                 ? LinePosition{0, 0, 0, 0}
                                 : locate(geometry, line, prefix, qo_indptr, kv_lens,
                                          w == 0 ? 0 : worker_cost(total, geometry.num_workers, w));
    }
  }
}

}  // namespace fi
