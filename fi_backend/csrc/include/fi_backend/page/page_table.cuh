// Gather the page table of a step; see page_table_params.h.
#pragma once

#include <fi_backend/page/page_table.h>

#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kPageTableThreads = 256;

// Grid: [num_branch_rows, parts]. The blocks of a row take its pages in turn, so that one long
// request is as quick as many short ones.
__global__ void __launch_bounds__(kPageTableThreads)
    page_table_kernel(const __grid_constant__ PageTableParams p) {
  ptx::grid_dependency_wait();
  const int64_t branch_row = blockIdx.x;
  const TokenRow row = find_token_row(p, branch_row);
  int32_t* pages = p.page_table + branch_row * p.page_table_stride;
  const int64_t num_pages = count_pages(p, row.kv_len);
  const int64_t step = int64_t(gridDim.y) * kPageTableThreads;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.y) * kPageTableThreads + threadIdx.x; i < num_pages;
       i += step) {
    pages[i] = find_page(p, row, i);
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) p.kv_lens[branch_row] = static_cast<int32_t>(row.kv_len);
}

}  // namespace fi
