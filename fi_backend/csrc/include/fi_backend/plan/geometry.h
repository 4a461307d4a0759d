// What a step's attention work is made of: requests, their query tiles, the keys a tile sees.
//
// A work item is (request, kv head, query tile) with the range of kv tokens its rows can see. A
// step has two lines of items, because requests with few rows are bound by reading KV and requests
// with many rows by arithmetic: each line has its own kernel, or its own part of one. Which line a
// request stands in follows from its own query length alone.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/common/macros.h>

namespace fi {

constexpr int kFewRows = 0;   // line of requests with at most few_rows_limit packed rows
constexpr int kManyRows = 1;  // line of all other requests
constexpr int kNumLines = 2;

// What the planner knows besides lengths. Stored at the head of the plan, where a run on the CPU
// checks it; on a GPU nobody can.
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
  int32_t cut_tokens;        // where split is 0, an item is cut at multiples of this power of two
  int32_t min_piece_tokens;  // and a cut that would leave less moves to the item's edge
  int32_t item_overhead;     // cost of an item besides its keys, in units (work_cost.h)
  int32_t teams_per_sm;      // of the few-row kernel, for few rows; 0 = all workers are active
  int32_t section_tokens;    // whose K and V, of one head, fit the L2 cache; see whole_item()
  int32_t shares_sms;        // 0 or 1: one kernel runs both lines, see shared_sms.h
  int32_t kept_states;       // of rows of groups, room for those of all parts of items; -1 = their
                             // parts are merged; 0 = this is no batch of groups (group_rows.h)
};

struct RequestLens {
  int32_t qo_len;
  int32_t kv_len;
};

// A request's place in q and in its page table, and its lengths: 16 bytes can be one load.
struct RequestSpan {
  int32_t qo_begin;
  int32_t qo_len;
  int32_t kv_len;
  int32_t first_page;  // kv_len counts from there on: others attend to the pages before
};

struct KvRange {
  int32_t begin;
  int32_t end;
};

FI_HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FI_HOST_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// a >= 0, b > 0.
FI_HOST_DEVICE int64_t ceil_div64(int64_t a, int64_t b) { return divide_index(a + b - 1, b).quot; }

// Lengths of a request; those that are negative or decrease qo_indptr are empty. A kernel cannot
// refuse them, for nobody reads lengths that live on the device, and must not run for ever. Lengths
// beyond what q or a page table have are not noticed.
FI_HOST_DEVICE RequestLens make_request_lens(int32_t first_row, int32_t end_row, int32_t kv_len) {
  return {first_row < 0 || end_row < first_row ? 0 : end_row - first_row, kv_len < 0 ? 0 : kv_len};
}

FI_HOST_DEVICE RequestLens request_lens(const int32_t* qo_indptr, const int32_t* kv_lens,
                                        int32_t request) {
  return make_request_lens(qo_indptr[request], qo_indptr[request + 1], kv_lens[request]);
}

// Of a request, or empty for the one after the last. first_pages: nullptr = 0 for all.
FI_HOST_DEVICE RequestSpan request_span(const int32_t* qo_indptr, const int32_t* kv_lens,
                                        int32_t num_reqs, int32_t request,
                                        const int32_t* first_pages = nullptr) {
  if (request >= num_reqs) return {};
  const RequestLens lens = request_lens(qo_indptr, kv_lens, request);
  return {qo_indptr[request], lens.qo_len, lens.kv_len,
          first_pages == nullptr ? 0 : first_pages[request]};
}

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

// The kv tokens that query token qo_idx < qo_len of a request sees.
FI_HOST_DEVICE KvRange visible_tokens(const WorkGeometry& g, int32_t qo_len, int32_t kv_len,
                                      int32_t qo_idx) {
  const int32_t diagonal = kv_len - qo_len + qo_idx;  // the row's own position, below kv_len
  const int32_t end = !g.causal ? kv_len : diagonal < 0 ? 0 : diagonal + 1;
  const bool sees_all_before = g.window_left < 0 || diagonal <= g.window_left;
  const int32_t begin = sees_all_before ? 0 : diagonal - g.window_left;
  return {begin < end ? begin : end, end};
}

// The kv tokens that at least one row of a query tile sees: one range, since ranges of consecutive
// rows overlap or touch.
FI_HOST_DEVICE KvRange item_tokens(const WorkGeometry& g, int line, int32_t qo_len, int32_t kv_len,
                                   int32_t q_tile) {
  int32_t first_token = 0;
  int32_t last_token = qo_len - 1;
  if (line == kManyRows) {
    const QuotRem first = divide_index(int64_t{q_tile} * g.tile_rows, g.group_size);
    const int32_t last_row = num_tile_rows(g, line, qo_len, q_tile) - 1;  // of the tile
    first_token = static_cast<int32_t>(first.quot);
    last_token = first_token + int32_t(uint32_t(first.rem + last_row) / uint32_t(g.group_size));
  }
  const KvRange first = visible_tokens(g, qo_len, kv_len, first_token);
  const KvRange last = visible_tokens(g, qo_len, kv_len, last_token);
  return {first.begin, last.end};
}

}  // namespace fi
