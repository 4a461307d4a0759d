// Binding of the device planner: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/plan_geometry.h>
#include <fi_backend/plan/device_plan_launch.h>

#include <algorithm>

namespace fi::bindings {

// Floats of workspace of a plan, whichever kernels run it: nobody has to compile them to know.
// has_chunks: items are cut at fixed places. has_mixed: one kernel may run both lines.
inline int64_t partial_floats(int64_t head_dim_qk, int64_t head_dim_vo, int64_t num_workers,
                              bool has_chunks, bool many_rows_only, bool has_mixed) {
  const int qk = static_cast<int>(head_dim_qk);
  const int vo = static_cast<int>(head_dim_vo);
  const int64_t many = many_rows_partial_floats(qk, vo, num_workers);
  if (many_rows_only) return many;
  const int64_t few = few_rows_partial_floats(qk, vo, num_workers, has_chunks ? kMaxChunks : 1);
  return has_mixed ? few + many : std::max(few, many);
}

// What the attention kernels that run a plan on its device have room for. same_types: q and the
// caches have one type. has_sm90_code: the kernels are compiled for sm_90a too. has_mixed: the one
// for both lines is used where there is one.
inline TileLimits limits_for(const TensorView& plan, int64_t head_dim_qk, int64_t head_dim_vo,
                             bool same_types, bool has_sm90_code, bool has_mixed) {
  check_cuda("plan_buffer", plan);
  int major = 0;
  check_launch("device_plan", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                                     plan.device().device_id));
  return cuda_limits(head_dim_qk, head_dim_vo, same_types, major == 9 && has_sm90_code, has_mixed);
}

inline PlannedBatch planned_batch(const WorkGeometry& geometry, const TensorView& plan,
                                  const TensorView& qo_indptr, const TensorView& kv_lens) {
  return {geometry, static_cast<const int32_t*>(qo_indptr.data_ptr()),
          static_cast<const int32_t*>(kv_lens.data_ptr()), nullptr,
          static_cast<int32_t*>(plan.data_ptr())};
}

// qo_indptr int32 [num_reqs + 1], kv_lens int32 [num_reqs]; writes plan_buffer. Lengths are not
// looked at here: bad ones are empty requests (request_lens).
inline void device_plan(TensorView plan_buffer, TensorView qo_indptr, TensorView kv_lens,
                        int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim_qk,
                        int64_t head_dim_vo, bool causal, int64_t window_left, int64_t num_workers,
                        int64_t split, bool many_rows_only, bool same_types, bool has_sm90_code,
                        bool has_mixed, bool enable_pdl) {
  const TileLimits limits =
      limits_for(plan_buffer, head_dim_qk, head_dim_vo, same_types, has_sm90_code, has_mixed);
  const DLDevice device = plan_buffer.device();
  const WorkGeometry geometry =
      make_geometry(plan_buffer, qo_indptr, kv_lens, num_qo_heads, num_kv_heads, limits, causal,
                    window_left, num_workers, split, many_rows_only, device);

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const cudaStream_t stream = current_stream(device);

  DevicePlanParams params = {};
  params.batch = planned_batch(geometry, plan_buffer, qo_indptr, kv_lens);
  params.enable_pdl = enable_pdl;

  check_launch("device_plan", launch_device_plan(params, stream));
}

}  // namespace fi::bindings
