// Bindings of the normalisation kernels: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/norm_checks.h>

namespace fi::bindings {

// Positions in a row are 32-bit, and a block's step past the end must fit too.
inline void check_hidden_size(const TensorView& input) {
  constexpr int64_t kMaxHidden = int64_t(1) << 30;
  if (input.ndim() > 0 && input.size(-1) > kMaxHidden) {
    TVM_FFI_THROW(ValueError) << "input: hidden size must be at most " << kMaxHidden << ", got "
                              << input.size(-1);
  }
}

}  // namespace fi::bindings
