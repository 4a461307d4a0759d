// Bindings of the host planner: validate, fill the geometry, plan.
#pragma once

#include <bindings/outer_levels.h>
#include <bindings/plan_geometry.h>
#include <bindings/shared_prefix.h>
#include <fi_backend/attention/cpu/scratch.h>
#include <fi_backend/plan/host_plan.h>
#include <fi_backend/plan/host_shared_prefix.h>

namespace fi::bindings {

// Few, large pieces: a thread pays for a cut, and there are not many of them to keep busy.
inline TileLimits cpu_limits(int head_dim_qk, int head_dim_vo) {
  return {cpu::kFewRowsLimit, many_row_tile(head_dim_qk, head_dim_vo), 64, 128, 4, 0, 0, 0};
}

inline int64_t workspace_floats(int64_t num_workers, int64_t head_dim_qk, int64_t head_dim_vo) {
  if (num_workers < 1 || head_dim_qk < 1 || head_dim_vo < 1) {
    TVM_FFI_THROW(ValueError) << "num_workers, head_dim_qk and head_dim_vo must be positive, got "
                              << num_workers << ", " << head_dim_qk << " and " << head_dim_vo;
  }
  return cpu::arena_floats(num_workers, static_cast<int>(head_dim_qk),
                           static_cast<int>(head_dim_vo));
}

// qo_indptr int32 [num_reqs + 1], kv_lens int32 [num_reqs]; writes plan_buffer. for_cuda: the plan
// is for the CUDA kernels, and bad lengths are empty as on a device; else they are an error.
// kept_states: see WorkGeometry. same_types and on_sm90: see cuda_limits().
// first_pages int32 [num_reqs]: see RequestSpan.
inline void host_plan(TensorView plan_buffer, TensorView qo_indptr, TensorView kv_lens,
                      Optional<TensorView> first_pages, int64_t num_qo_heads, int64_t num_kv_heads,
                      int64_t head_dim_qk, int64_t head_dim_vo, bool causal, int64_t window_left,
                      int64_t num_workers, int64_t split, bool many_rows_only, int64_t kept_states,
                      bool for_cuda, bool same_types, bool on_sm90) {
  const int qk = static_cast<int>(head_dim_qk);
  const int vo = static_cast<int>(head_dim_vo);
  const TileLimits limits =
      for_cuda ? cuda_limits(qk, vo, same_types, on_sm90, on_sm90) : cpu_limits(qk, vo);
  const WorkGeometry geometry =
      make_geometry(plan_buffer, qo_indptr, kv_lens, num_qo_heads, num_kv_heads, limits, causal,
                    window_left, num_workers, split, many_rows_only, kCpu, kept_states);
  const auto* indptr = static_cast<const int32_t*>(qo_indptr.data_ptr());
  const auto* lens = static_cast<const int32_t*>(kv_lens.data_ptr());
  const int32_t* pages = checked_first_pages(first_pages, geometry.num_reqs, kCpu);
  for (int32_t r = 0; !for_cuda && r < geometry.num_reqs; ++r) {
    if (indptr[r] < 0 || indptr[r + 1] < indptr[r]) {
      TVM_FFI_THROW(ValueError) << "qo_indptr must start at 0 or above and never decrease, got "
                                << indptr[r] << " and " << indptr[r + 1] << " at index " << r;
    }
    if (lens[r] < 0) {
      TVM_FFI_THROW(ValueError) << "kv_lens must be at least 0, got " << lens[r] << " at index "
                                << r;
    }
  }
  plan_work(geometry, indptr, lens, pages, static_cast<int32_t*>(plan_buffer.data_ptr()));
}

// See shared_prefix_params(). for_cuda: of a batch that CUDA kernels run.
inline void find_shared_prefixes(
    TensorView qo_indptr, TensorView kv_lens, Optional<TensorView> page_indptr,
    Optional<TensorView> page_indices, Optional<TensorView> block_table,
    Optional<TensorView> request_rows, int64_t page_size, TensorView own_lens,
    TensorView first_pages, TensorView first_rows, TensorView group_indptr, TensorView group_lens,
    TensorView group_tables, TensorView q_rows, TensorView scratch, int64_t num_qo_heads,
    int64_t num_kv_heads, int64_t head_dim_qk, int64_t head_dim_vo, int64_t window_left,
    int64_t min_tokens, int64_t worth_keys, bool for_cuda) {
  const int qk = static_cast<int>(head_dim_qk);
  const int vo = static_cast<int>(head_dim_vo);
  const TileLimits limits = for_cuda ? cuda_limits(qk, vo, true, false, false) : cpu_limits(qk, vo);
  const SharedPrefixParams params = shared_prefix_params(
      qo_indptr, kv_lens, {page_indptr, page_indices, block_table, request_rows}, page_size,
      {own_lens, first_pages, first_rows, group_indptr, group_lens, group_tables, q_rows, scratch},
      num_qo_heads, num_kv_heads, limits.few_rows, window_left, min_tokens, worth_keys, kCpu);
  fi::find_shared_prefixes(params);
}

// See outer_levels().
inline void write_outer_levels(TensorView qo_indptr, Optional<TensorView> first_qo_indptr,
                               Optional<TensorView> first_kv_lens,
                               Optional<TensorView> first_page_indptr,
                               Optional<TensorView> second_qo_indptr,
                               Optional<TensorView> second_kv_lens,
                               Optional<TensorView> second_page_indptr, int64_t second_pages,
                               TensorView group_indptr, TensorView group_lens,
                               TensorView group_tables, TensorView q_rows) {
  const OuterLevels levels =
      outer_levels(qo_indptr, {first_qo_indptr, first_kv_lens, first_page_indptr},
                   {second_qo_indptr, second_kv_lens, second_page_indptr}, second_pages,
                   {group_indptr, group_lens, group_tables, q_rows}, kCpu);
  const int32_t num_places = num_group_places(levels);
  for (int32_t i = 0; i <= num_places; ++i) write_group_place(levels, i);
  for (int32_t i = 0; i < levels.num_levels * levels.max_rows; ++i) write_q_row(levels, i);
}

}  // namespace fi::bindings
