// Division of 64-bit indices.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

struct QuotRem {
  int64_t quot;
  int64_t rem;
};

// Divide index >= 0 by divisor > 0. A 64-bit division is a call of about 100 instructions, so
// indices that fit 32 bits, nearly all, take the short one.
FI_HOST_DEVICE QuotRem divide_index(int64_t index, int64_t divisor) {
  if (((index | divisor) >> 32) == 0) {
    const uint32_t quot = uint32_t(index) / uint32_t(divisor);
    return {int64_t(quot), int64_t(uint32_t(index) - quot * uint32_t(divisor))};
  }
  return {index / divisor, index % divisor};
}

}  // namespace fi
