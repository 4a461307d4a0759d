// Sizes and layout of the attention workspace: bounded by the number of workers alone.
//
// Each worker owns partial states of items that it shares with others (at most one at the head and
// one at the tail of its piece of the line, each in up to kMaxChunks chunks) and scratch for the
// tile it works on.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

constexpr int kFewRowsLimit = 16;

// Packed rows per query tile of the many-row line: wide heads take fewer, so that a tile's state
// stays in the second-level cache.
FI_HOST_DEVICE constexpr int many_row_tile(int head_dim_qk, int head_dim_vo) {
  const int head_dim = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
  return head_dim <= 128 ? 256 : head_dim <= 256 ? 128 : 64;
}

// A partial row: head_dim_vo floats (unnormalised), then its maximum logit and sum of weights.
constexpr int kPartialTail = 2;
constexpr int kPartialRows = 2 * kMaxChunks * kFewRowsLimit;  // per worker, both ends
static_assert(kPartialRows >= 2 * many_row_tile(128, 128), "both lines use one partial area");

FI_HOST_DEVICE constexpr int64_t partial_worker_floats(int head_dim_vo) {
  return (int64_t{kPartialRows} * (head_dim_vo + kPartialTail) + 15) / 16 * 16;
}

}  // namespace fi
