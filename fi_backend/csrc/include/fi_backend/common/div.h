// Division of indices.
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
  const auto quot = static_cast<int64_t>(uint64_t(index) / uint64_t(divisor));
  return {quot, index - quot * divisor};
}

// Divides many indices below 2^31 by one divisor, without a division.
struct FastDivider {
  uint32_t multiplier;
  uint32_t shift;

  FI_HOST_DEVICE uint32_t operator()(uint32_t index) const {
    const auto high = static_cast<uint32_t>((uint64_t{index} * multiplier) >> 32);
    return (high + index) >> shift;
  }
};

// From a divisor in [1, 2^31): the multiplier is 2^32 * (2^shift - divisor) / divisor, rounded up.
FI_HOST_DEVICE FastDivider make_fast_divider(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint32_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - divisor;
  return {static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
}

}  // namespace fi
