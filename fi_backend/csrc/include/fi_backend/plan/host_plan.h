// The planner on the host, one thread. The device runs the same steps as a parallel prefix sum and
// one locate per worker.
#pragma once

#include <fi_backend/plan/group_rows.h>
#include <fi_backend/plan/item_cuts.h>
#include <fi_backend/plan/kept_parts.h>
#include <fi_backend/plan/shared_sms.h>
#include <fi_backend/plan/whole_items.h>

namespace fi {

// Write the plan of a step into `buffer`, of plan_ints() elements. first_pages: see RequestSpan.
inline void plan_work(const WorkGeometry& geometry, const int32_t* qo_indptr,
                      const int32_t* kv_lens, const int32_t* first_pages, int32_t* buffer) {
  const PlanView plan = view_plan(buffer, geometry.num_reqs, geometry.num_workers);
  *plan.geometry = geometry;
  for (int line = 0; line < kNumLines; ++line) {
    int64_t* prefix = plan.prefix_cost[line];
    prefix[0] = 0;
    LineLoad load = {0, 0, 0, 0, qo_indptr[geometry.num_reqs], 0};
    ItemsLoad items = {0, 0, 0, 0};
    for (int32_t r = 0; r < geometry.num_reqs; ++r) {
      const RequestLens lens = request_lens(qo_indptr, kv_lens, r);
      const int64_t cost = request_cost(geometry, line, lens);
      prefix[r + 1] = prefix[r] + cost;
      load.num_requests += num_q_tiles(geometry, line, lens.qo_len) > 0;
      if (clamp_cost(cost) > load.largest) load.largest = clamp_cost(cost);
      load.other_cost += other_line_cost(geometry, line, lens);
      if (line == kFewRows) load.num_chunks += num_fixed_chunks(geometry, lens);
      if (line == kManyRows) {
        items.num_items +=
            int64_t{num_q_tiles(geometry, line, lens.qo_len)} * geometry.num_kv_heads;
        items.longest = max64(items.longest, make_head_cost(geometry, lens).longest());
      }
    }
    int64_t total = items.cost = load.cost = prefix[geometry.num_reqs];
    items.num_heads = load.num_requests * geometry.num_kv_heads;
    const int32_t sharing = num_sharing_blocks(geometry, line, load);
    int32_t active = active_workers(geometry, line, load, sharing);
    if (line == kManyRows && geometry.kept_states > 0) {
      active = kept_part_workers(geometry, items, load.num_rows, active);
    }
    plan.has_work[line] = total > 0 ? kCutLine : kNoWork;
    if (line == kFewRows) *plan.few_row_blocks = few_row_blocks(geometry, load, sharing);
    if (line == kManyRows && deals_whole_items(geometry, items, active)) {
      plan.has_work[line] = kWholeItems;
      for (int32_t r = 0; r < geometry.num_reqs; ++r) {
        const int32_t qo_len = request_lens(qo_indptr, kv_lens, r).qo_len;
        prefix[r + 1] = prefix[r] + num_q_tiles(geometry, line, qo_len);
      }
    }
    for (int32_t w = 0; w <= geometry.num_workers; ++w) {
      plan.finished[line][w] = 0;
      const auto span = [&](int32_t request) {
        return request_span(qo_indptr, kv_lens, geometry.num_reqs, request, first_pages);
      };
      if (plan.has_work[line] == kWholeItems) {
        plan_whole_item(geometry, prefix, span, w, plan);
        continue;
      }
      const int64_t cost = w < active ? worker_cost(total, active, w) : total;
      if (cost >= total) {
        plan_end(geometry, line, w, plan);
        continue;
      }
      const int32_t r = last_at_most(prefix, 0, geometry.num_reqs, cost);
      plan_start(geometry, line, r, span(r), span(r + 1), cost - prefix[r], w, plan);
    }
    plan_cuts(plan.starts[line], geometry.num_workers, plan.cuts[line]);
  }
  *plan.num_parts = 1;
  if (geometry.kept_states == 0) return;
  int32_t end_group = geometry.num_reqs;
  while (end_group > 0 && qo_indptr[end_group - 1] == qo_indptr[end_group]) --end_group;
  const bool is_cut_line = plan.has_work[kManyRows] == kCutLine;
  for (int32_t w = 0; w <= geometry.num_workers; ++w) {
    if (is_cut_line) end_behind_groups(geometry, end_group, w, plan);
    const int32_t holders = geometry.kept_states < 0 ? 1 : plan.cuts[kManyRows][w].num_holders;
    if (holders > *plan.num_parts) *plan.num_parts = holders;
  }
  *plan.num_parts *= group_rows(qo_indptr, geometry.num_reqs).num_levels;
}

}  // namespace fi
