// Binding of the page table: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/page_table_checks.h>
#include <fi_backend/page/page_table_launch.h>

namespace fi::bindings {

// See checked_page_table_params. The CPU's number of threads has no meaning here.
inline void gather_page_table(TensorView page_table, TensorView kv_lens, TensorView token_table,
                              TensorView request_rows, TensorView seq_lens, int64_t extra_tokens,
                              int64_t page_size, Optional<TensorView> slot_map,
                              int64_t num_branches, int64_t branch_tokens, int64_t) {
  check_cuda("page_table", page_table);
  const DLDevice device = page_table.device();
  const PageTableParams params = checked_page_table_params(
      page_table, kv_lens, token_table, request_rows, seq_lens, extra_tokens, page_size, slot_map,
      num_branches, branch_tokens, device);
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("page_table", launch_page_table(params, current_stream(device)));
}

}  // namespace fi::bindings
