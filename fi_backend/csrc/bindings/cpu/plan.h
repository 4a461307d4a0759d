// Bindings of the host planner: validate, fill the geometry, plan.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/cpu/scratch.h>
#include <fi_backend/plan/work_line.h>

namespace fi::bindings {

inline int64_t plan_buffer_ints(int64_t max_reqs, int64_t num_workers) {
  if (max_reqs < 0 || num_workers < 1) {
    TVM_FFI_THROW(ValueError) << "max_reqs must be at least 0 and num_workers at least 1, got "
                              << max_reqs << " and " << num_workers;
  }
  return plan_ints(max_reqs, num_workers);
}

inline int64_t workspace_floats(int64_t num_workers, int64_t head_dim_qk, int64_t head_dim_vo) {
  if (num_workers < 1 || head_dim_qk < 1 || head_dim_vo < 1) {
    TVM_FFI_THROW(ValueError) << "num_workers, head_dim_qk and head_dim_vo must be positive, got "
                              << num_workers << ", " << head_dim_qk << " and " << head_dim_vo;
  }
  return cpu::arena_floats(num_workers, static_cast<int>(head_dim_qk),
                           static_cast<int>(head_dim_vo));
}

// qo_indptr int32 [num_reqs + 1], kv_lens int32 [num_reqs]; writes plan_buffer.
inline void host_plan(TensorView plan_buffer, TensorView qo_indptr, TensorView kv_lens,
                      int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim_qk,
                      int64_t head_dim_vo, bool causal, int64_t window_left, int64_t num_workers,
                      int64_t split, bool many_rows_only) {
  const DLDevice device = {kDLCPU, 0};
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_reqs = kv_lens.size(0);
  check_tensor("qo_indptr", qo_indptr, kDtypeOf<int32_t>, {num_reqs + 1}, device);
  check_tensor("plan_buffer", plan_buffer, kDtypeOf<int32_t>, {kAnySize}, device);
  if (num_kv_heads < 1 || num_qo_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "num_qo_heads must be a positive multiple of num_kv_heads, got "
                              << num_qo_heads << " and " << num_kv_heads;
  }
  if (window_left < -1 || window_left > INT32_MAX || split < -1 || split > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "window_left and split must be -1 or an int32 of at least 0, got "
                              << window_left << " and " << split;
  }
  const int64_t needed = plan_buffer_ints(num_reqs, num_workers);
  if (plan_buffer.size(0) < needed) {
    TVM_FFI_THROW(ValueError) << "plan_buffer must have at least " << needed << " elements for "
                              << num_reqs << " requests and " << num_workers << " workers, got "
                              << plan_buffer.size(0) << "; size it with plan_buffer_ints()";
  }
  const auto* indptr = static_cast<const int32_t*>(qo_indptr.data_ptr());
  const auto* lens = static_cast<const int32_t*>(kv_lens.data_ptr());
  for (int64_t r = 0; r < num_reqs; ++r) {
    if (indptr[r] < 0 || indptr[r + 1] < indptr[r]) {
      TVM_FFI_THROW(ValueError) << "qo_indptr must start at 0 or above and never decrease, got "
                                << indptr[r] << " and " << indptr[r + 1] << " at index " << r;
    }
    if (lens[r] < 0) {
      TVM_FFI_THROW(ValueError) << "kv_lens must be at least 0, got " << lens[r] << " at index "
                                << r;
    }
  }

  WorkGeometry geometry = {};
  geometry.num_reqs = static_cast<int32_t>(num_reqs);
  geometry.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  geometry.group_size = static_cast<int32_t>(num_qo_heads / num_kv_heads);
  geometry.few_rows_limit = many_rows_only ? 0 : kFewRowsLimit;
  geometry.tile_rows = many_row_tile(static_cast<int>(head_dim_qk), static_cast<int>(head_dim_vo));
  geometry.causal = causal;
  geometry.window_left = static_cast<int32_t>(window_left);
  geometry.split = static_cast<int32_t>(split);
  geometry.num_workers = static_cast<int32_t>(num_workers);
  plan_work(geometry, indptr, lens, static_cast<int32_t*>(plan_buffer.data_ptr()));
}

}  // namespace fi::bindings
