// Launch the kernels of the device planner.
#pragma once

#include <fi_backend/plan/device_plan_launch.h>

#include <fi_backend/common/launch.cuh>
#include <fi_backend/plan/device_plan.cuh>
#include <fi_backend/plan/shared_prefix.cuh>

namespace fi {

inline cudaError_t device_plan(const DevicePlanParams& p, cudaStream_t stream) {
  // A thread per request and per worker, as far as a block goes.
  const WorkGeometry& g = p.batches[0].geometry;
  const int64_t wanted = max64(g.num_reqs, int64_t{g.num_workers} + 1);
  const int64_t warps = min64(ceil_div64(wanted, kWarpSize), kPlanMaxThreads / kWarpSize);
  const dim3 block(static_cast<unsigned>(warps * kWarpSize));
  const int num_blocks = p.batches[1].plan == nullptr ? kNumLines : kNumLines + 1;
  return launch(device_plan_kernel, num_blocks, block, stream, p.enable_pdl, p);
}

inline cudaError_t shared_prefix(const SharedPrefixParams& p, cudaStream_t stream) {
  return launch(shared_prefix_kernel, p.geometry.num_reqs, dim3(kSearchThreads), stream,
                p.enable_pdl, p);
}

}  // namespace fi
