// Binding of mask packing: validate, params, run.
#pragma once

#include <bindings/pack_masks_checks.h>
#include <fi_backend/quantization/cpu/pack_masks.h>

namespace fi::bindings {

// See checked_pack_masks_params.
inline void pack_masks(TensorView bits, TensorView masks, TensorView kv_lens, int64_t num_rows) {
  cpu::pack_masks(checked_pack_masks_params(bits, masks, kv_lens, num_rows, kCpu));
}

}  // namespace fi::bindings
