// Rows of any length in vectors, the last one partial.
#pragma once

#include <fi_backend/cpu/simd.h>

namespace fi::cpu {

// Visit a row in vectors: body(offset, count), count < kLanes only at the end.
template <class Body>
inline void for_each_vector(int head_dim, const Body& body) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) body(d, kLanes);
  if (d < head_dim) body(d, head_dim - d);
}
template <class T>
inline VecF load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load_partial(p, count);
}
template <class T>
inline void store_some(T* p, VecF v, int count) {
  count == kLanes ? store(p, v) : store_partial(p, v, count);
}

}  // namespace fi::cpu
