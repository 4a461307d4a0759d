// Arguments of the device planner.
#pragma once

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
  // The step's; and groups of its requests that share pages, as requests with many rows, which is a
  // batch of one line. plan nullptr = no groups.
  PlannedBatch batches[2];
  bool enable_pdl;  // launch as a programmatic dependent of the kernel before
};

}  // namespace fi
