// Gather the page table of a step on the CPU; see page_table_params.h.
#pragma once

#include "fi_backend/cpu/parallel.h"
#include "fi_backend/page/page_table.h"

namespace fi::cpu {

inline void gather_page_table(const PageTableParams& p, int num_threads) {
  constexpr int64_t kMinRowsPerWorker = 16;
  parallel_for(p.num_branch_rows, kMinRowsPerWorker, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t branch_row = begin; branch_row < end; ++branch_row) {
      const TokenRow row = find_token_row(p, branch_row);
      int32_t* pages = p.page_table + branch_row * p.page_table_stride;
      const int64_t num_pages = count_pages(p, row.kv_len);
      for (int64_t i = 0; i < num_pages; ++i) pages[i] = find_page(p, row, i);
      p.kv_lens[branch_row] = static_cast<int32_t>(row.kv_len);
    }
  });
}

}  // namespace fi::cpu
