// Sizes of the many-row CUDA kernel that its host code needs too.
#pragma once

#include <fi_backend/attention/row_tiles.h>
#include <fi_backend/plan/work_line.h>

namespace fi {

// Packed rows per query tile where many_rows_sm90.cuh computes the many-row line: as many as a
// block of it has in work. Small heads leave the registers for a third group of warps, but for
// those that widen a cache whose elements have one byte.
constexpr int sm90_tile_rows(int head_dim_qk, int head_dim_vo, int kv_bytes) {
  return head_dim_qk <= 64 && head_dim_vo <= 64 && kv_bytes > 1 ? 192 : 128;
}

// Head sizes that it is made for. Beside warps that widen fp8, wide ones leave too few registers.
constexpr bool has_sm90_head_dims(int qk, int vo, int kv_bytes) {
  return vo <= qk && (qk <= 128 || kv_bytes > 1) &&
         (qk == 64 || qk == 96 || qk == 128 || qk == 192 || qk == 256) &&
         (vo == 64 || vo == 96 || vo == 128 || vo == 192 || vo == 256);
}

// Head sizes that the kernel for both lines (mixed_rows.cuh) is made for: wider ones spill there.
constexpr bool has_mixed_rows_dims(int qk, int vo) {
  return qk == vo && qk <= 192 && has_sm90_head_dims(qk, vo, 2);
}

// A worker holds parts of two items at most: one it takes over at the head of its share of the line
// (end 0), and one it leaves unfinished at the tail (end 1). The state of a part is values
// [tile rows, head_dim_vo], not normalised, then (maximum logit, sum of weights) per row.
struct ManyRowsPartials {
  int32_t tile_rows;
  int32_t head_dim_vo;

  static constexpr int kEnds = 2;

  FI_HOST_DEVICE constexpr int64_t offset(int64_t worker, int end) const {
    return (worker * kEnds + end) * tile_rows * (head_dim_vo + kPartialTail);
  }
  FI_HOST_DEVICE constexpr int64_t floats(int64_t num_workers) const {
    return offset(num_workers, 0);
  }
};

// Floats of workspace of a plan. Only as many workers of the many-row line as there are SMs get
// work.
inline int64_t many_rows_partial_floats(int head_dim_qk, int head_dim_vo, int64_t num_workers) {
  const ManyRowsPartials partials = {many_row_tile(head_dim_qk, head_dim_vo), head_dim_vo};
  return partials.floats(planned_sms(static_cast<int32_t>(num_workers)));
}

}  // namespace fi
