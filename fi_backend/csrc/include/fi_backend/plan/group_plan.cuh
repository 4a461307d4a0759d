// What the device planners of a batch of groups (group_rows.h) have in common, besides the line.
#pragma once

#include <fi_backend/plan/group_rows.h>

#include <fi_backend/plan/device_plan.cuh>

namespace fi {

// Write the head of a plan of groups, which has no work yet.
__device__ __forceinline__ void begin_group_plan(const PlannedBatch& groups) {
  const WorkGeometry& g = groups.geometry;
  const PlanView plan = view_plan(groups.plan, g.num_reqs, g.num_workers);
  if (threadIdx.x > 0) return;
  *plan.geometry = g;
  plan.has_work[kFewRows] = plan.has_work[kManyRows] = kNoWork;
  *plan.few_row_blocks = 0;
  *plan.num_parts = 1;
}

// Write how many states a row of the groups has. All threads of the team call this behind their
// plan: each reads the cuts that it has written. `most` is in shared memory, 1.
template <class Team>
__device__ __forceinline__ void finish_group_plan(const Team& team, const PlannedBatch& groups,
                                                  int32_t end_group, int32_t& most) {
  const WorkGeometry& g = groups.geometry;
  const PlanView plan = view_plan(groups.plan, g.num_reqs, g.num_workers);
  const bool is_cut_line = plan.has_work[kManyRows] == kCutLine;
  int32_t holders = 1;
  for (int32_t w = team.thread(); w <= g.num_workers; w += team.num_threads()) {
    holders = max(holders, plan.cuts[kManyRows][w].num_holders);
    if (is_cut_line) end_behind_groups(g, end_group, w, plan);
  }
  holders = __reduce_max_sync(kFullWarp, holders);
  if (team.thread() % kWarpSize == 0) atomicMax(&most, holders);
  team.sync();
  if (team.thread() > 0) return;
  *plan.num_parts = most * group_rows(groups.qo_indptr, g.num_reqs).num_levels;
}

}  // namespace fi
