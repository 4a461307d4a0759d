// How many workers of each line get work, and how the lines share the multiprocessors where one
// kernel runs both (attention/mixed_rows.cuh).
//
// A thread block of that kernel fills an SM. Some begin with a part of the few-row line each, the
// others with the many-row line, so that memory and the tensor cores are busy at the same time;
// whoever is done with few rows helps with whole items of many. Nobody helps the other way, so the
// few-row line must not be the one that ends last.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

// What a unit of cost (work_cost.h) of the few-row line takes an SM, in units of the other line.
// Measured: with 2 and 2.5 few rows end last where there are few of them, with 3.5 and 4 many rows.
constexpr int kFewRowsTime = 3;

// Thread blocks that begin with the few-row line of a step whose lines share the SMs, such that
// both lines end together; 0 of any other step.
FI_HOST_DEVICE int32_t num_sharing_blocks(const WorkGeometry& g, int64_t few_cost,
                                          int64_t many_cost, int64_t num_rows) {
  const int32_t num_sms = planned_sms(g.num_workers);
  const bool has_both = few_cost > 0 && many_cost > 0;
  if (!g.shares_sms || !has_both || num_sms < 2 || has_few_rows(g, num_rows)) return 0;
  const int64_t few_time = kFewRowsTime * few_cost;
  const int64_t share = max64(1, divide_index(few_time + many_cost, num_sms).quot);
  const int64_t wanted = ceil_div64(few_time, share);
  // No more than there are pieces.
  const int64_t pieces = divide_index(few_cost, g.cut_tokens / kCostTokens * unit_cost(1)).quot;
  return static_cast<int32_t>(max64(1, min64(wanted, min64(pieces, num_sms - 1))));
}

FI_HOST_DEVICE int32_t num_sharing_blocks(const WorkGeometry& g, int line, const LineLoad& load) {
  return line == kFewRows ? num_sharing_blocks(g, load.cost, load.other_cost, load.num_rows)
                          : num_sharing_blocks(g, load.other_cost, load.cost, load.num_rows);
}

// The first so many workers of a line get work. sharing: num_sharing_blocks() of the step.
FI_HOST_DEVICE int32_t active_workers(const WorkGeometry& g, int line, const LineLoad& load,
                                      int32_t sharing) {
  if (g.teams_per_sm == 0) return g.num_workers;
  if (line == kFewRows) return sharing > 0 ? sharing : active_few_row_workers(g, load);
  return planned_sms(g.num_workers) - sharing;  // one block of the many-row kernel fits an SM
}

// Thread blocks that begin with the few-row line, if one kernel runs both lines: all where the
// lines do not share the SMs.
FI_HOST_DEVICE int32_t few_row_blocks(const WorkGeometry& g, const LineLoad& few, int32_t sharing) {
  if (few.cost == 0) return 0;
  return sharing > 0 ? sharing : g.num_workers;
}

// What a request adds to LineLoad::other_cost of `line`.
FI_HOST_DEVICE int64_t other_line_cost(const WorkGeometry& g, int line, const RequestLens& lens) {
  if (!g.shares_sms || lens.qo_len == 0 || line_of(g, lens.qo_len) == line) return 0;
  return request_cost(g, kNumLines - 1 - line, lens);
}

}  // namespace fi
