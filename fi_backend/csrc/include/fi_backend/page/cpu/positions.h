// The request and position of every appended token of a ragged batch.
#pragma once

#include <cstdint>

#include "fi_backend/common/index_array.h"

namespace fi::cpu {

// Request b appends tokens indptr[b] .. indptr[b + 1] - 1, the last ones of its seq_lens[b] tokens.
// Rows of the outputs that no request owns get the batch index -1 and position 0.
inline void batch_positions(IndexArray indptr, IndexArray seq_lens, int64_t num_requests,
                            int32_t* batch_indices, int32_t* positions, int64_t num_rows) {
  int64_t row = 0;
  const auto skip_to = [&](int64_t end) {
    for (; row < end; ++row) {
      batch_indices[row] = -1;
      positions[row] = 0;
    }
  };
  for (int64_t b = 0; b < num_requests; ++b) {
    const int64_t end = indptr[b + 1];
    skip_to(indptr[b]);
    for (; row < end; ++row) {
      batch_indices[row] = static_cast<int32_t>(b);
      positions[row] = static_cast<int32_t>(seq_lens[b] - end + row);
    }
  }
  skip_to(num_rows);
}

}  // namespace fi::cpu
