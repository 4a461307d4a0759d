// What the searches for shared prefixes of all targets share: checks of their arguments, and the
// params made from them.
#pragma once

#include <bindings/attention_checks.h>
#include <bindings/plan_geometry.h>
#include <fi_backend/plan/shared_prefix.h>

#include <tuple>

namespace fi::bindings {

// Places of the scratch memory: counters, which must be 0 before the first search, then matches.
constexpr int64_t kCounterInts = 2;

inline int64_t max_shared_groups(int64_t num_reqs) {
  return max_groups(static_cast<int32_t>(num_reqs));
}
inline int64_t shared_prefix_scratch_ints(int64_t num_reqs) { return kCounterInts + 2 * num_reqs; }

// What a search writes; see SharedPrefixParams.
struct SharedPrefixOutputs {
  TensorView own_lens;
  TensorView first_pages;
  TensorView first_rows;
  TensorView group_indptr;
  TensorView group_lens;
  TensorView group_tables;
  TensorView q_rows;
  TensorView scratch;
};

// Groups have at least min_tokens in common, and a step's groups save worth_keys or are none.
// num_qo_heads, num_kv_heads, few_rows and window_left are those that the batch is planned with.
inline SharedPrefixParams shared_prefix_params(const TensorView& qo_indptr,
                                               const TensorView& kv_lens,
                                               const PageTableArguments& pages, int64_t page_size,
                                               const SharedPrefixOutputs& out, int64_t num_qo_heads,
                                               int64_t num_kv_heads, int32_t few_rows,
                                               int64_t window_left, int64_t min_tokens,
                                               int64_t worth_keys, DLDevice device) {
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {kAnySize}, device);
  const int64_t num_reqs = kv_lens.size(0);
  check_tensor("qo_indptr", qo_indptr, kDtypeOf<int32_t>, {num_reqs + 1}, device);
  if (num_kv_heads < 1 || num_qo_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "num_qo_heads must be a positive multiple of num_kv_heads, got "
                              << num_qo_heads << " and " << num_kv_heads;
  }
  if (page_size < 1 || min_tokens < 1 || page_size > INT32_MAX || min_tokens > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "page_size and min_tokens must be at least 1, got " << page_size
                              << " and " << min_tokens;
  }
  const int64_t groups = max_shared_groups(num_reqs);
  for (const auto& [name, tensor, size] : {
           std::tuple{"own_lens", &out.own_lens, num_reqs},
           {"first_pages", &out.first_pages, num_reqs},
           {"first_rows", &out.first_rows, num_reqs},
           {"group_indptr", &out.group_indptr, groups + 1},
           {"group_lens", &out.group_lens, groups},
           {"group_tables", &out.group_tables, groups + 1},
           {"q_rows", &out.q_rows, kAnySize},
           {"scratch", &out.scratch, kAnySize},
       }) {
    check_tensor(name, *tensor, kDtypeOf<int32_t>, {size}, device);
  }
  if (out.scratch.size(0) < shared_prefix_scratch_ints(num_reqs)) {
    TVM_FFI_THROW(ValueError) << "scratch: must have at least "
                              << shared_prefix_scratch_ints(num_reqs) << " elements for "
                              << num_reqs << " requests, got " << out.scratch.size(0);
  }
  const auto ints = [](const TensorView& tensor) {
    return static_cast<int32_t*>(tensor.data_ptr());
  };
  SharedPrefixParams params = {};
  params.geometry.num_reqs = static_cast<int32_t>(num_reqs);
  params.geometry.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  params.geometry.group_size = static_cast<int32_t>(num_qo_heads / num_kv_heads);
  params.geometry.few_rows_limit = few_rows;
  params.geometry.window_left = static_cast<int32_t>(window_left);
  params.pages = page_table(pages, page_size, num_reqs, device);
  params.qo_indptr = ints(qo_indptr);
  params.kv_lens = ints(kv_lens);
  params.min_pages = static_cast<int32_t>((min_tokens + page_size - 1) / page_size);
  params.max_rows = static_cast<int32_t>(out.q_rows.size(0) / 2);
  params.worth_keys = worth_keys;
  params.own_lens = ints(out.own_lens);
  params.first_pages = ints(out.first_pages);
  params.first_rows = ints(out.first_rows);
  params.group_indptr = ints(out.group_indptr);
  params.group_lens = ints(out.group_lens);
  params.group_tables = ints(out.group_tables);
  params.q_rows = ints(out.q_rows);
  params.finished = ints(out.scratch);
  params.matches = reinterpret_cast<PrefixMatch*>(ints(out.scratch) + kCounterInts);
  return params;
}

}  // namespace fi::bindings
