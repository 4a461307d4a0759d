// Checks that the page table bindings of all targets share, and the params made from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/page/page_table_params.h>

#include <limits>

namespace fi::bindings {

// page_table int32 [num_requests * num_branches, max_pages] and kv_lens int32
// [num_requests * num_branches], written; token_table int32 [num_rows, max_tokens]; request_rows,
// seq_lens [num_requests] and slot_map [num_slots], int32 or int64. Values are not looked at.
inline PageTableParams checked_page_table_params(
    const TensorView& page_table, const TensorView& kv_lens, const TensorView& token_table,
    const TensorView& request_rows, const TensorView& seq_lens, int64_t extra_tokens,
    int64_t page_size, const Optional<TensorView>& slot_map, int64_t num_branches,
    int64_t branch_tokens, DLDevice device) {
  check_tensor("token_table", token_table, kDtypeOf<int32_t>, {kAnySize, kAnySize}, device);
  check_shape("request_rows", request_rows, {kAnySize});
  const int64_t num_requests = request_rows.size(0);
  if (num_branches < 1 || branch_tokens < 0 || (num_branches > 1 && page_size != 1)) {
    TVM_FFI_THROW(ValueError) << "num_branches and branch_tokens: must be at least 1 and 0, and "
                              << "page_size 1 if there are branches, got " << num_branches << ", "
                              << branch_tokens << " and page_size " << page_size;
  }
  const int64_t num_branch_rows = num_requests * num_branches;
  check_tensor("page_table", page_table, kDtypeOf<int32_t>, {num_branch_rows, kAnySize}, device);
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {num_branch_rows}, device);
  check_written("page_table", page_table);
  if (page_size < 1 || page_size > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "page_size: must be at least 1, got " << page_size;
  }

  PageTableParams params = {};
  params.request_rows_is_int64 =
      check_index_tensor("request_rows", request_rows, num_requests, device);
  params.seq_lens_is_int64 = check_index_tensor("seq_lens", seq_lens, num_requests, device);
  if (slot_map.has_value()) {
    const TensorView& slots = slot_map.value();
    params.slot_map_is_int64 = check_index_tensor("slot_map", slots, kAnySize, device);
    if (slots.size(0) == 0) TVM_FFI_THROW(ValueError) << "slot_map: must not be empty, got [0]";
    params.slot_map = slots.data_ptr();
    params.num_slots = slots.size(0);
  }
  params.page_table = static_cast<int32_t*>(page_table.data_ptr());
  params.kv_lens = static_cast<int32_t*>(kv_lens.data_ptr());
  params.token_table = static_cast<const int32_t*>(token_table.data_ptr());
  params.request_rows = request_rows.data_ptr();
  params.seq_lens = seq_lens.data_ptr();
  params.page_table_stride = page_table.stride(0);
  params.token_table_stride = token_table.stride(0);
  params.num_branch_rows = num_branch_rows;
  params.num_rows = token_table.size(0);
  params.max_pages = page_table.size(1);
  params.max_tokens = token_table.size(1);
  params.extra_tokens = extra_tokens;
  params.branch_tokens = branch_tokens;
  params.num_branches = static_cast<int32_t>(num_branches);
  params.page_size = static_cast<int32_t>(page_size);
  return params;
}

}  // namespace fi::bindings
