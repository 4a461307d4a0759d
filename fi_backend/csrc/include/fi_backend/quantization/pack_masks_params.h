// Arguments of the kernel that packs the masks of a step, shared by every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// Each request has num_rows x kv_lens[r] booleans; they follow one another in `masks`. Booleans
// past its end, of requests that pad a batch, count as true.
struct PackMasksParams {
  uint8_t* bits;           // [num_requests, bytes_per_request], written; little endian
  const uint8_t* masks;    // [num_masks], 0 or 1
  const int32_t* kv_lens;  // [num_requests]
  int64_t num_requests;
  int64_t bytes_per_request;  // what does not fit is left out
  int64_t num_masks;
  int64_t num_rows;
};

}  // namespace fi
