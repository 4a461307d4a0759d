// Plans of a step whose requests may share pages, in one launch that depends on capacities alone.
//
// While two blocks plan the step as if nothing were shared, others search. Most steps end with
// that. The block that ends last forms the groups, if there are any, and plans again: most of its
// warps what each request attends to by itself, the others the groups.
#pragma once

#include <fi_backend/plan/group_plan.cuh>
#include <fi_backend/plan/shared_prefix.cuh>
#include <fi_backend/ptx/atomic.cuh>

namespace fi {

union SharedPlanMemory {
  PlanMemory plans[2];  // of own keys, which is that of a whole block too, and of groups
  SearchMemory search;
  PrefixGroups groups;
};

// The plan of no groups.
__device__ __forceinline__ void plan_no_groups(const PlannedBatch& groups) {
  const WorkGeometry& g = groups.geometry;
  begin_group_plan(groups);
  const PlanView plan = view_plan(groups.plan, g.num_reqs, g.num_workers);
  for (int32_t w = threadIdx.x; w <= g.num_workers; w += blockDim.x) {
    plan_end(g, kManyRows, w, plan);
  }
}

// Whether all other blocks have ended, and some request has something in common with another. The
// counters are 0 again then. `flag` is in shared memory.
__device__ __forceinline__ bool ends_last_with_matches(const SharedPlanParams& p, bool& flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // Between two barriers, this orders what all blocks have written before what the last one
    // reads.
    const uint32_t last = gridDim.x - 1;
    flag = false;
    if (ptx::atomic_count_acq_rel(p.search.finished, last) == last) {
      flag = __ldcg(p.found) != 0;
      *p.found = 0;
    }
  }
  __syncthreads();
  return flag;
}

// What a team plans.
struct PlannedLine {
  const PlannedBatch* batch;
  int line;
};

// What a team plans next, behind `now`; nothing if it is done. Requests share nothing or have few
// rows: without others, the many-row line of own keys is what it was.
__device__ __forceinline__ PlannedLine next_line(const SharedPlanParams& p, PlannedLine now) {
  const PlannedBatch& own = p.own;
  const PlanView plan = view_plan(own.plan, own.geometry.num_reqs, own.geometry.num_workers);
  const bool has_many_rows =
      now.batch == &own && now.line == kFewRows && __ldcg(plan.has_work + kManyRows) != kNoWork;
  return {has_many_rows ? &own : nullptr, kManyRows};
}

// Grid: kNumLines + num_search_blocks blocks of at least two warps, up to kPlanMaxThreads.
__global__ void __launch_bounds__(kPlanMaxThreads, 1)
    shared_plan_kernel(const __grid_constant__ SharedPlanParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  __shared__ SharedPlanMemory memory;
  __shared__ int32_t num_parts;
  __shared__ bool is_last;
  if (threadIdx.x == 0) num_parts = 1;
  const int32_t num_threads = blockDim.x;
  SomeWarps team = {0, num_threads, 0};
  int32_t end_group = 0;
  PlannedLine planned = {&p.batch, min(int(blockIdx.x), kNumLines)};
  if (planned.line == kManyRows) plan_no_groups(p.groups);
  // One body for each line, whatever is planned.
  while (planned.batch != nullptr) {
    PlanMemory& plan_memory = memory.plans[planned.batch == &p.groups];
    if (planned.line == kFewRows) {
      plan_line<kFewRows>(team, *planned.batch, plan_memory);
    } else if (planned.line == kManyRows) {
      plan_line<kManyRows>(team, *planned.batch, plan_memory);
    } else if (find_matches(p.search, blockIdx.x - kNumLines, p.num_search_blocks, memory.search)) {
      *p.found = 1;
    }
    if (planned.batch != &p.batch) {
      team.sync();  // nobody reads the memory that is written next
      planned = next_line(p, planned);
      continue;
    }
    if (!ends_last_with_matches(p, is_last)) return;
    end_group = form_groups(BlockTeam(), p.search, memory.groups);
    if (end_group == 0) return;
    const int32_t of_own = (num_threads / kWarpSize + 1) / 2 * kWarpSize;
    const bool plans_groups = threadIdx.x >= uint32_t(of_own);
    team = plans_groups ? SomeWarps{of_own, num_threads - of_own, 2} : SomeWarps{0, of_own, 1};
    planned = plans_groups ? PlannedLine{&p.groups, kManyRows} : PlannedLine{&p.own, kFewRows};
  }
  if (team.first_thread > 0) finish_group_plan(team, p.groups, end_group, num_parts);
}

}  // namespace fi
