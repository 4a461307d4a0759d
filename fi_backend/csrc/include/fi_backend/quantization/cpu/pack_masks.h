// Pack the masks of a step on the CPU; see pack_masks_params.h.
#pragma once

#include "fi_backend/quantization/pack_masks.h"

namespace fi::cpu {

inline void pack_masks(const PackMasksParams& p) {
  int64_t begin = 0;
  for (int64_t request = 0; request < p.num_requests; ++request) {
    const int64_t num_masks = count_masks(p, request);
    uint8_t* bits = p.bits + request * p.bytes_per_request;
    const int64_t num_bytes = count_mask_bytes(p, num_masks);
    for (int64_t i = 0; i < num_bytes; ++i) bits[i] = pack_mask_byte(p, begin, num_masks, i);
    begin += num_masks;
  }
}

}  // namespace fi::cpu
