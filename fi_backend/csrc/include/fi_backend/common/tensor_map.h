// A tensor map of the copy engine (CUtensorMap) where cuda.h is not.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

}  // namespace fi
