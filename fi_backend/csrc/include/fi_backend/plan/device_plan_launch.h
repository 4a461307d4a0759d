// Entry points of the device planner's module.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/plan/device_plan_params.h>

namespace fi {

cudaError_t launch_device_plan(const DevicePlanParams& params, cudaStream_t stream);
cudaError_t launch_shared_plan(const SharedPlanParams& params, cudaStream_t stream);
cudaError_t launch_level_plan(const LevelPlanParams& params, cudaStream_t stream);

}  // namespace fi
