// Binding of the device planner for steps with outer levels.
#pragma once

#include <bindings/cuda/plan.h>
#include <bindings/outer_levels.h>

namespace fi::bindings {

// Write the batch of groups that the levels make, see outer_levels(), and plan it, with room for
// group_states states of rows, and the step: one launch on the current stream. The other arguments
// are those of device_plan().
inline void level_plan(TensorView plan_buffer, TensorView group_plan, TensorView qo_indptr,
                       TensorView kv_lens, Optional<TensorView> first_qo_indptr,
                       Optional<TensorView> first_kv_lens, Optional<TensorView> first_page_indptr,
                       Optional<TensorView> second_qo_indptr, Optional<TensorView> second_kv_lens,
                       Optional<TensorView> second_page_indptr, int64_t second_pages,
                       TensorView group_indptr, TensorView group_lens, TensorView group_tables,
                       TensorView q_rows, int64_t group_states, int64_t num_qo_heads,
                       int64_t num_kv_heads, int64_t head_dim_qk, int64_t head_dim_vo, bool causal,
                       int64_t num_workers, bool same_types, bool has_sm90_code, bool has_mixed,
                       bool enable_pdl) {
  const TileLimits limits =
      limits_for(plan_buffer, head_dim_qk, head_dim_vo, same_types, has_sm90_code, has_mixed);
  const DLDevice device = plan_buffer.device();
  const WorkGeometry step =
      make_geometry(plan_buffer, qo_indptr, kv_lens, num_qo_heads, num_kv_heads, limits, causal, -1,
                    num_workers, 0, false, device);
  const WorkGeometry groups =
      make_geometry(group_plan, group_indptr, group_lens, num_qo_heads, num_kv_heads, limits, false,
                    -1, num_workers, 0, true, device, group_states);

  LevelPlanParams params = {};
  params.levels = outer_levels(qo_indptr, {first_qo_indptr, first_kv_lens, first_page_indptr},
                               {second_qo_indptr, second_kv_lens, second_page_indptr}, second_pages,
                               {group_indptr, group_lens, group_tables, q_rows}, device);
  params.batch = planned_batch(step, plan_buffer, qo_indptr, kv_lens);
  params.groups = planned_batch(groups, group_plan, group_indptr, group_lens);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("level_plan", launch_level_plan(params, current_stream(device)));
}

}  // namespace fi::bindings
