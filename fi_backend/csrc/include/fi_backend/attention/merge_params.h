// Arguments of the merge kernels, shared by every target.
//
// A state is (v, lse): the softmax-weighted mean of some values and the base-2 logarithm of the
// sum of their weights. A state that saw no key is (anything, -inf) and has no influence; where
// every state is empty the result is exactly (0, -inf).
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// Element strides of v [num_rows, num_heads, head_dim] (last dim contiguous) and of its
// lse [num_rows, num_heads].
struct StateStrides {
  int64_t v_row;
  int64_t v_head;
  int64_t lse_row;
  int64_t lse_head;
};

// Merge two states per (row, head). The in-place form sets v_out = v_a and lse_out = lse_a, so
// none of these pointers is __restrict__.
struct MergePairParams {
  const void* v_a;         // [num_rows, num_heads, head_dim]
  const void* v_b;         // [num_rows, num_heads, head_dim]
  const float* lse_a;      // [num_rows, num_heads], base 2
  const float* lse_b;      // [num_rows, num_heads], base 2
  void* v_out;             // [num_rows, num_heads, head_dim]
  float* lse_out;          // [num_rows, num_heads], base 2; nullptr if unwanted
  const uint8_t* mask;     // [num_rows], rows with 0 are not written; nullptr = write every row
  StateStrides a_strides;  // in elements, as all strides here
  StateStrides b_strides;
  StateStrides out_strides;
  int64_t num_rows;
  int32_t num_heads;
  int32_t head_dim;
  bool enable_pdl;  // CUDA: launch as a programmatic dependent of the kernel before
};

// Merge num_states states per (row, head), in index order.
struct MergeStatesParams {
  const void* v;            // [num_rows, num_states, num_heads, head_dim]
  const float* lse;         // [num_rows, num_states, num_heads], base 2
  void* v_out;              // [num_rows, num_heads, head_dim]
  float* lse_out;           // [num_rows, num_heads], base 2; nullptr if unwanted
  StateStrides in_strides;  // row and head strides of v and lse
  int64_t v_state_stride;
  int64_t lse_state_stride;
  StateStrides out_strides;
  int64_t num_rows;
  int32_t num_states;  // 0 gives (0, -inf)
  int32_t num_heads;
  int32_t head_dim;
  bool enable_pdl;  // CUDA: launch as a programmatic dependent of the kernel before
};

}  // namespace fi
