// Binding of the device planner: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/plan_geometry.h>
#include <bindings/shared_prefix.h>
#include <fi_backend/plan/device_plan_launch.h>

namespace fi::bindings {

// The major compute capability of a device.
inline int compute_major(int device) {
  int major = 0;
  check_launch("device_plan",
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
}

inline PlannedBatch planned_batch(const WorkGeometry& geometry, const TensorView& plan,
                                  const TensorView& qo_indptr, const TensorView& kv_lens) {
  return {geometry, static_cast<const int32_t*>(qo_indptr.data_ptr()),
          static_cast<const int32_t*>(kv_lens.data_ptr()), nullptr,
          static_cast<int32_t*>(plan.data_ptr())};
}

// qo_indptr int32 [num_reqs + 1], kv_lens int32 [num_reqs]; writes plan_buffer. Lengths are not
// looked at here: bad ones are empty requests (request_lens). first_pages int32 [num_reqs]: see
// RequestSpan. The group_ tensors are those of the batch that groups of requests make, to be
// planned too. same_types: q and the caches have one type.
inline void device_plan(TensorView plan_buffer, TensorView qo_indptr, TensorView kv_lens,
                        Optional<TensorView> first_pages, Optional<TensorView> group_plan,
                        Optional<TensorView> group_indptr, Optional<TensorView> group_lens,
                        int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim_qk,
                        int64_t head_dim_vo, bool causal, int64_t window_left, int64_t num_workers,
                        int64_t split, bool many_rows_only, bool same_types, bool enable_pdl) {
  check_cuda("plan_buffer", plan_buffer);
  const DLDevice device = plan_buffer.device();
  const bool allows_sm90 = same_types && compute_major(device.device_id) == 9;
  const TileLimits limits = cuda_limits(head_dim_qk, head_dim_vo, allows_sm90);
  const WorkGeometry geometry =
      make_geometry(plan_buffer, qo_indptr, kv_lens, num_qo_heads, num_kv_heads, limits, causal,
                    window_left, num_workers, split, many_rows_only, device);

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const cudaStream_t stream = current_stream(device);

  DevicePlanParams params = {};
  params.batches[0] = planned_batch(geometry, plan_buffer, qo_indptr, kv_lens);
  params.batches[0].first_pages = checked_first_pages(first_pages, geometry.num_reqs, device);
  if (group_plan.has_value()) {
    const TensorView& plan = group_plan.value();
    const TensorView &indptr = group_indptr.value(), &lens = group_lens.value();
    params.batches[1] =
        planned_batch(make_geometry(plan, indptr, lens, num_qo_heads, num_kv_heads, limits, false,
                                    -1, num_workers, 0, true, device),
                      plan, indptr, lens);
  }
  params.enable_pdl = enable_pdl;

  check_launch("device_plan", launch_device_plan(params, stream));
}

// See shared_prefix_params(). One launch on the current stream.
inline void find_shared_prefixes(
    TensorView qo_indptr, TensorView kv_lens, Optional<TensorView> page_indptr,
    Optional<TensorView> page_indices, Optional<TensorView> block_table,
    Optional<TensorView> request_rows, int64_t page_size, TensorView own_lens,
    TensorView first_pages, TensorView first_rows, TensorView group_indptr, TensorView group_lens,
    TensorView group_tables, TensorView q_rows, TensorView scratch, int64_t num_qo_heads,
    int64_t num_kv_heads, int64_t head_dim_qk, int64_t head_dim_vo, int64_t window_left,
    int64_t min_tokens, int64_t worth_keys, bool enable_pdl) {
  check_cuda("own_lens", own_lens);
  const DLDevice device = own_lens.device();
  const TileLimits limits = cuda_limits(head_dim_qk, head_dim_vo, false);
  SharedPrefixParams params = shared_prefix_params(
      qo_indptr, kv_lens, {page_indptr, page_indices, block_table, request_rows}, page_size,
      {own_lens, first_pages, first_rows, group_indptr, group_lens, group_tables, q_rows, scratch},
      num_qo_heads, num_kv_heads, limits.few_rows, window_left, min_tokens, worth_keys, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("find_shared_prefixes", launch_shared_prefix(params, current_stream(device)));
}

}  // namespace fi::bindings
