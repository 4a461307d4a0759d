// Rows of query tiles, and what a row's partial state takes: the same on every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// Packed rows per query tile of the many-row line: wide heads take fewer, so that a tile's state
// stays in the second-level cache.
FI_HOST_DEVICE constexpr int many_row_tile(int head_dim_qk, int head_dim_vo) {
  const int head_dim = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
  return head_dim <= 128 ? 256 : head_dim <= 256 ? 128 : 64;
}

// A row's partial state: head_dim_vo values, not normalised, and its maximum logit and sum of
// weights.
constexpr int kPartialTail = 2;

}  // namespace fi
