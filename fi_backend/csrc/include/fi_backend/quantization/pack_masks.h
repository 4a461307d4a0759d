// What both targets do for one byte of a packed mask.
#pragma once

#include <fi_backend/quantization/pack_masks_params.h>

namespace fi {

FI_HOST_DEVICE int64_t count_masks(const PackMasksParams& p, int64_t request) {
  const int32_t kv_len = p.kv_lens[request];
  return kv_len > 0 ? p.num_rows * kv_len : 0;
}

FI_HOST_DEVICE int64_t count_mask_bytes(const PackMasksParams& p, int64_t num_masks) {
  const int64_t bytes = (num_masks + 7) / 8;
  return bytes < p.bytes_per_request ? bytes : p.bytes_per_request;
}

// Pack booleans 8 * index and on of a request, whose first one is masks[begin].
FI_HOST_DEVICE uint8_t pack_mask_byte(const PackMasksParams& p, int64_t begin, int64_t num_masks,
                                      int64_t index) {
  unsigned packed = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const int64_t i = 8 * index + bit;
    if (i >= num_masks) break;
    const bool is_set = begin + i >= p.num_masks || p.masks[begin + i] != 0;
    packed |= unsigned(is_set) << bit;
  }
  return static_cast<uint8_t>(packed);
}

}  // namespace fi
