// Arguments of the device planner.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

struct DevicePlanParams {
  WorkGeometry geometry;
  const int32_t* qo_indptr;  // [num_reqs + 1], first query row of each request
  const int32_t* kv_lens;    // [num_reqs]
  int32_t* plan;             // [plan_ints(num_reqs, num_workers)], see PlanView; written
  bool enable_pdl;           // launch as a programmatic dependent of the kernel before
};

}  // namespace fi
