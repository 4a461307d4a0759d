// Binding of the page table: validate, params, run.
#pragma once

#include <bindings/page_table_checks.h>
#include <fi_backend/page/cpu/page_table.h>

namespace fi::bindings {

// See checked_page_table_params.
inline void gather_page_table(TensorView page_table, TensorView kv_lens, TensorView token_table,
                              TensorView request_rows, TensorView seq_lens, int64_t extra_tokens,
                              int64_t page_size, Optional<TensorView> slot_map,
                              int64_t num_branches, int64_t branch_tokens, int64_t num_threads) {
  const PageTableParams params = checked_page_table_params(
      page_table, kv_lens, token_table, request_rows, seq_lens, extra_tokens, page_size, slot_map,
      num_branches, branch_tokens, kCpu);

  cpu::gather_page_table(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
