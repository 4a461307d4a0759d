// Choose the block of the device planner, and launch it.
#pragma once

#include <fi_backend/plan/device_plan_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/plan/device_plan.cuh>

namespace fi {

inline cudaError_t device_plan(const DevicePlanParams& p, cudaStream_t stream) {
  // A thread per request and per worker, as far as a block goes.
  const int64_t wanted = max64(p.geometry.num_reqs, int64_t{p.geometry.num_workers} + 1);
  const int64_t warps = min64(ceil_div64(wanted, kWarpSize), kPlanMaxThreads / kWarpSize);
  const dim3 block(static_cast<unsigned>(warps * kWarpSize));
  return launch(device_plan_kernel, kNumLines, block, stream, p.enable_pdl, p);
}

}  // namespace fi
