// Plans of a step and of the outer levels that a caller gives (outer_levels.h), in one launch.
#pragma once

#include <fi_backend/plan/outer_levels.h>

#include <fi_backend/plan/group_plan.cuh>

namespace fi {

// Write the batch of groups that the levels make, and where its groups end. All threads of the
// block call this; `end_group` is in shared memory.
__device__ __forceinline__ void write_outer_levels(const OuterLevels& p, int32_t& end_group) {
  const int32_t num_places = num_group_places(p);
  if (threadIdx.x == 0) end_group = 0;
  for (int32_t i = threadIdx.x; i <= num_places; i += blockDim.x) write_group_place(p, i);
  for (int32_t i = threadIdx.x; i < p.num_levels * p.max_rows; i += blockDim.x) write_q_row(p, i);
  __syncthreads();
  for (int32_t i = threadIdx.x; i < num_places; i += blockDim.x) {
    if (p.group_indptr[i] != p.group_indptr[i + 1]) atomicMax(&end_group, i + 1);
  }
  __syncthreads();
}

// Grid: kNumLines + 1 blocks of whole warps, up to kPlanMaxThreads. The last one plans the groups.
__global__ void __launch_bounds__(kPlanMaxThreads, 1)
    level_plan_kernel(const __grid_constant__ LevelPlanParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  __shared__ PlanMemory memory;
  __shared__ int32_t end_group;
  __shared__ int32_t num_parts;
  if (blockIdx.x == kFewRows) {
    plan_line<kFewRows>(WholeBlock(), p.batch, memory);
    return;
  }
  const bool plans_groups = blockIdx.x == kNumLines;
  if (plans_groups) {
    if (threadIdx.x == 0) num_parts = 1;
    begin_group_plan(p.groups);
    write_outer_levels(p.levels, end_group);
  }
  plan_line<kManyRows>(WholeBlock(), plans_groups ? p.groups : p.batch, memory);
  if (plans_groups) finish_group_plan(WholeBlock(), p.groups, end_group, num_parts);
}

}  // namespace fi
