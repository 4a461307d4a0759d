// Binding of the device planner for steps whose requests may share pages.
#pragma once

#include <bindings/cuda/plan.h>
#include <bindings/shared_prefix.h>

namespace fi::bindings {

// Find what requests share, see shared_prefix_params(), and plan the step and its groups, which
// have room for group_states states of rows: one launch on the current stream. The other arguments
// are those of device_plan().
inline void shared_plan(TensorView plan_buffer, TensorView group_plan, TensorView qo_indptr,
                        TensorView kv_lens, Optional<TensorView> page_indptr,
                        Optional<TensorView> page_indices, Optional<TensorView> block_table,
                        Optional<TensorView> request_rows, int64_t page_size, TensorView own_lens,
                        TensorView first_pages, TensorView first_rows, TensorView group_indptr,
                        TensorView group_lens, TensorView group_tables, TensorView q_rows,
                        TensorView scratch, int64_t group_states, int64_t num_qo_heads,
                        int64_t num_kv_heads, int64_t head_dim_qk, int64_t head_dim_vo, bool causal,
                        int64_t window_left, int64_t num_workers, int64_t min_tokens,
                        int64_t worth_keys, bool same_types, bool has_sm90_code, bool has_mixed,
                        bool enable_pdl) {
  const TileLimits limits =
      limits_for(plan_buffer, head_dim_qk, head_dim_vo, same_types, has_sm90_code, has_mixed);
  const DLDevice device = plan_buffer.device();
  const WorkGeometry step =
      make_geometry(plan_buffer, qo_indptr, kv_lens, num_qo_heads, num_kv_heads, limits, causal,
                    window_left, num_workers, 0, false, device);
  const WorkGeometry groups =
      make_geometry(group_plan, group_indptr, group_lens, num_qo_heads, num_kv_heads, limits, false,
                    -1, num_workers, 0, true, device, group_states);

  SharedPlanParams params = {};
  params.search = shared_prefix_params(
      qo_indptr, kv_lens, {page_indptr, page_indices, block_table, request_rows}, page_size,
      {own_lens, first_pages, first_rows, group_indptr, group_lens, group_tables, q_rows, scratch},
      num_qo_heads, num_kv_heads, limits.few_rows, window_left, min_tokens, worth_keys, device);
  params.batch = planned_batch(step, plan_buffer, qo_indptr, kv_lens);
  params.own = planned_batch(step, plan_buffer, qo_indptr, own_lens);
  params.own.first_pages = params.search.first_pages;
  params.groups = planned_batch(groups, group_plan, group_indptr, group_lens);
  params.found = params.search.finished + 1;
  // Beside the blocks that plan, as many as run at once.
  const int32_t num_sms = planned_sms(step.num_workers);
  params.num_search_blocks = std::clamp(num_searched(step.num_reqs), 1, std::max(num_sms - 2, 1));
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("shared_plan", launch_shared_plan(params, current_stream(device)));
}

}  // namespace fi::bindings
