// Where the rows of a normalisation are, and how many threads one takes.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/norm/norm_params.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

inline constexpr int kNormMaxThreads = 512;
inline constexpr int kNormVecsPerThread = 4;  // accesses that a thread keeps in registers

// The place of row `index` among [num_outer, num_inner] rows.
__device__ __forceinline__ QuotRem find_row(int64_t index, int64_t num_inner) {
  return num_inner == 1 ? QuotRem{index, 0} : divide_index(index, num_inner);
}

template <class T>
__device__ __forceinline__ T* row_at(T* base, const RowStrides& strides, QuotRem at) {
  return base + (at.quot * strides.outer + at.rem * strides.inner);
}

}  // namespace fi
