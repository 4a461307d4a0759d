// Arguments of the gated activation kernels, shared by every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// out = gate(input[..., :hidden_size]) * input[..., hidden_size:], a row being addressed by
// (outer, inner). Strides are in elements; the last dimension is contiguous.
struct GatedActivationParams {
  struct Strides {
    int64_t outer;
    int64_t inner;
  };
  const void* input;  // [num_outer, num_inner, 2 * hidden_size]
  void* out;          // [num_outer, num_inner, hidden_size]
  Strides input_strides;
  Strides out_strides;
  int64_t num_outer;
  int64_t num_inner;
  int64_t hidden_size;
  bool enable_pdl;  // CUDA: launch as a programmatic dependent of the kernel before
};

}  // namespace fi
