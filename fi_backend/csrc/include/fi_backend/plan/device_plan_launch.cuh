// Launch the kernels of the device planner.
#pragma once

#include <fi_backend/plan/device_plan_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/plan/device_plan.cuh>
#include <fi_backend/plan/level_plan.cuh>
#include <fi_backend/plan/shared_plan.cuh>

namespace fi {

// A thread per request and per worker, as far as a block of so many teams of warps goes.
inline dim3 plan_block(const WorkGeometry& g, int num_teams) {
  const int64_t wanted = max64(g.num_reqs, int64_t{g.num_workers} + 1);
  const int64_t warps =
      min64(max64(ceil_div64(wanted, kWarpSize), num_teams), kPlanMaxThreads / kWarpSize);
  return dim3(static_cast<unsigned>(warps * kWarpSize));
}

inline cudaError_t device_plan(const DevicePlanParams& p, cudaStream_t stream) {
  return launch(device_plan_kernel, kNumLines, plan_block(p.batch.geometry, 1), stream,
                p.enable_pdl, p);
}

inline cudaError_t shared_plan(const SharedPlanParams& p, cudaStream_t stream) {
  return launch(shared_plan_kernel, kNumLines + p.num_search_blocks,
                plan_block(p.batch.geometry, 2), stream, p.enable_pdl, p);
}

inline cudaError_t level_plan(const LevelPlanParams& p, cudaStream_t stream) {
  return launch(level_plan_kernel, kNumLines + 1, plan_block(p.batch.geometry, 1), stream,
                p.enable_pdl, p);
}

}  // namespace fi
