// Arguments of the device planner.
#pragma once

#include <fi_backend/plan/outer_levels.h>
#include <fi_backend/plan/shared_prefix.h>
#include <fi_backend/plan/work_line.h>

namespace fi {

struct PlannedBatch {
  WorkGeometry geometry;
  const int32_t* qo_indptr;    // [num_reqs + 1], first query row of each request
  const int32_t* kv_lens;      // [num_reqs]
  const int32_t* first_pages;  // [num_reqs], in a request's table; nullptr = 0
  int32_t* plan;               // [plan_ints(num_reqs, num_workers)], see PlanView; written
};

struct DevicePlanParams {
  PlannedBatch batch;
  bool enable_pdl;  // launch as a programmatic dependent of the kernel before
};

// What a step's requests share is searched for, and the step planned with or without it: one batch
// for what each request attends to by itself, and one of the groups, as requests with many rows.
struct SharedPlanParams {
  SharedPrefixParams search;
  PlannedBatch batch;   // as it is, if there are no groups
  PlannedBatch own;     // the same, with lengths that the search writes
  PlannedBatch groups;  // lengths are written by the search too
  int32_t* found;       // [1], scratch; 0 between launches
  int32_t num_search_blocks;
  bool enable_pdl;
};

// A step whose rows attend to given levels of keys before those of `batch`.
struct LevelPlanParams {
  OuterLevels levels;
  PlannedBatch batch;
  PlannedBatch groups;  // that the levels make; lengths are written first
  bool enable_pdl;
};

}  // namespace fi
