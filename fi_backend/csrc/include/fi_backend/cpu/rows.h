// Element-wise work over rows: whole vectors, then a tail, and rows shared out among threads.
#pragma once

#include <cstdint>

#include "fi_backend/cpu/parallel.h"
#include "fi_backend/cpu/simd.h"

namespace fi::cpu {

// How a row body reads and writes kLanes values: all of them, or the last few of a row.
struct FullVector {
  template <class T>
  VecF read(const T* p) const {
    return load(p);
  }
  template <class T>
  void write(T* p, VecF v) const {
    store(p, v);
  }
};
struct PartialVector {
  int count;
  template <class T>
  VecF read(const T* p) const {
    return load_partial(p, count);
  }
  template <class T>
  void write(T* p, VecF v) const {
    store_partial(p, v, count);
  }
};

// Call body(i, io) for i = 0, kLanes, 2 * kLanes, ... below size.
// NOTE: always inlined, and bodies should capture by value: a pointer that lives in a closure in
// memory would be loaded again after every store.
template <class Body>
[[gnu::always_inline]] inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, FullVector{});
  if (i < size) body(i, PartialVector{static_cast<int>(size - i)});
}

// Sum term(i, io), a VecF, over a row. Four chains hide the latency of an addition and keep the
// rounding error of long rows small.
template <class Term>
[[gnu::always_inline]] inline float sum_row(int64_t size, const Term& term) {
  constexpr int kChains = 4;
  VecF sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) sums[c] += term(i + c * kLanes, FullVector{});
  }
  for (; i + kLanes <= size; i += kLanes) sums[0] += term(i, FullVector{});
  if (i < size) {
    const VecF last = term(i, PartialVector{static_cast<int>(size - i)});
    const VecF left = broadcast(static_cast<float>(size - i));
    sums[0] += select(lane_indices() < left, last, VecF{});
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The least number of rows worth a thread of their own: waking it costs a few microseconds, in
// which one core moves about 32 KB.
inline int64_t min_rows_per_worker(int64_t bytes_per_row) {
  constexpr int64_t kMinBytesPerWorker = 32 << 10;
  return kMinBytesPerWorker / (bytes_per_row > 0 ? bytes_per_row : 1) + 1;
}

// Call body(outer, inner) for every row, on as many threads as the bytes moved are worth.
template <class Body>
void for_each_row(int64_t num_outer, int64_t num_inner, int64_t bytes_per_row, int num_threads,
                  const Body& body) {
  const int64_t min_rows = min_rows_per_worker(bytes_per_row);
  parallel_for(num_outer * num_inner, min_rows, num_threads, [&](int64_t begin, int64_t end) {
    int64_t outer = num_inner > 0 ? begin / num_inner : 0;
    int64_t inner = begin - outer * num_inner;
    for (int64_t row = begin; row < end; ++row) {
      body(outer, inner);
      if (++inner == num_inner) {
        inner = 0;
        ++outer;
      }
    }
  });
}

}  // namespace fi::cpu
