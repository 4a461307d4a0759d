// Choose the grid of a page table, and launch it.
#pragma once

#include <fi_backend/page/page_table_launch.h>

#include <algorithm>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/page/page_table.cuh>

namespace fi {

// The grid follows from capacities alone: the host knows no length.
inline cudaError_t gather_page_table(const PageTableParams& p, cudaStream_t stream) {
  if (p.num_branch_rows == 0) return cudaSuccess;
  constexpr int64_t kBlocks = 1024;       // enough loads in flight on any GPU
  constexpr int64_t kPagesPerThread = 4;  // less is not worth a block
  const int64_t useful = p.max_pages / (kPageTableThreads * kPagesPerThread) + 1;
  const int64_t parts = std::min(useful, kBlocks / p.num_branch_rows + 1);
  const GridShape grid = {unsigned(p.num_branch_rows), unsigned(parts), 1};
  return launch(page_table_kernel, grid, kPageTableThreads, 0, stream, false, p);
}

}  // namespace fi
