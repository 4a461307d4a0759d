// Sizes of the few-row CUDA kernel that its host code needs too.
#pragma once

#include <fi_backend/attention/row_tiles.h>
#include <fi_backend/plan/work_line.h>

namespace fi {

// Most packed rows of a few-row item: their accumulators stay in registers.
FI_HOST_DEVICE constexpr int cuda_few_rows_limit(int head_dim_qk, int head_dim_vo) {
  return head_dim_qk <= 128 && head_dim_vo <= 128 ? 32 : 16;
}

// Teams of warps of the kernel for few rows of a request that fit an SM: wide heads leave room for
// fewer.
FI_HOST_DEVICE constexpr int few_rows_teams_per_sm(int head_dim_qk, int head_dim_vo) {
  return head_dim_qk <= 128 && head_dim_vo <= 128 ? 3 : 2;
}

// The workspace holds states of chunks of items, for items that do not fit one worker or are
// computed in several chunks. A worker shares at most two items: one it takes over at the head of
// its piece (end 0) and one it leaves at the tail (end 1).
struct PartialArea {
  int32_t rows;         // of a slot
  int32_t head_dim_vo;  // of a row
  int32_t chunks;       // per end: 1, or kMaxChunks in batch-invariant mode

  // A slot is the unnormalised values [rows, head_dim_vo], then (maximum logit, sum of weights)
  // per row.
  FI_HOST_DEVICE constexpr int64_t slot_floats() const {
    return int64_t{rows} * (head_dim_vo + kPartialTail);
  }
  FI_HOST_DEVICE constexpr int64_t floats(int64_t num_workers) const {
    return num_workers * 2 * chunks * slot_floats();
  }
  // First float of a slot.
  FI_HOST_DEVICE constexpr int64_t slot(int32_t worker, int end, int chunk) const {
    return ((int64_t{worker} * 2 + end) * chunks + chunk) * slot_floats();
  }
};

// Floats of workspace of a plan; chunks as in PartialArea.
inline int64_t few_rows_partial_floats(int head_dim_qk, int head_dim_vo, int64_t num_workers,
                                       int32_t chunks) {
  const PartialArea area = {cuda_few_rows_limit(head_dim_qk, head_dim_vo), head_dim_vo, chunks};
  return area.floats(num_workers);
}

}  // namespace fi
