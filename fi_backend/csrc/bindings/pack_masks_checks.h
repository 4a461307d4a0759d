// Checks that the mask packing bindings of all targets share, and the params made from them.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/quantization/pack_masks_params.h>

namespace fi::bindings {

// bits uint8 [num_requests, bytes_per_request], written; masks bool [any]; kv_lens int32
// [num_requests]. Values are not looked at.
inline PackMasksParams checked_pack_masks_params(const TensorView& bits, const TensorView& masks,
                                                 const TensorView& kv_lens, int64_t num_rows,
                                                 DLDevice device) {
  check_tensor("bits", bits, kDtypeOf<uint8_t>, {kAnySize, kAnySize}, device);
  check_tensor("masks", masks, kDtypeOf<bool>, {kAnySize}, device);
  check_tensor("kv_lens", kv_lens, kDtypeOf<int32_t>, {bits.size(0)}, device);
  if (bits.size(0) > 1 && bits.stride(0) != bits.size(1)) {
    TVM_FFI_THROW(ValueError) << "bits: must be contiguous, got row stride " << bits.stride(0);
  }
  if (num_rows < 0) {
    TVM_FFI_THROW(ValueError) << "num_rows: must be at least 0, got " << num_rows;
  }

  PackMasksParams params = {};
  params.bits = static_cast<uint8_t*>(bits.data_ptr());
  params.masks = static_cast<const uint8_t*>(masks.data_ptr());
  params.kv_lens = static_cast<const int32_t*>(kv_lens.data_ptr());
  params.num_requests = bits.size(0);
  params.bytes_per_request = bits.size(1);
  params.num_masks = masks.size(0);
  params.num_rows = num_rows;
  return params;
}

}  // namespace fi::bindings
