// A vector of indices that is int32 or int64 at run time: both are what engines have.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

struct IndexArray {
  const void* data;
  bool is_int64;

  FI_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace fi
