// From cache rows to the words that the matrix products read, in place wherever they fit.
#pragma once

#include <fi_backend/attention/cpu/compute.h>
#include <fi_backend/attention/cpu/rope.h>
#include <fi_backend/attention/params.h>

namespace fi::cpu {

// Addresses of the K and V rows of keys [first_key, first_key + num_keys) of one request and head.
template <class Kv>
void find_rows(const AttentionParams& params, int32_t request, int32_t kv_head, int32_t first_key,
               int num_keys, const Kv** k_rows, const Kv** v_rows) {
  const Kv* k_base = static_cast<const Kv*>(params.k_cache) + kv_head * params.k_strides.head;
  const Kv* v_base = static_cast<const Kv*>(params.v_cache) + kv_head * params.v_strides.head;
  const PageTable& table = params.pages;
  const int32_t* pages = table.pages_of(request);
  const int32_t page_size = table.page_size;
  int32_t page = first_key / page_size;
  int32_t offset = first_key % page_size;
  for (int i = 0; i < num_keys; ++page, offset = 0) {
    const int64_t id = pages != nullptr ? pages[page] : int64_t{table.indptr[request]} + page;
    const Kv* k = k_base + id * params.k_strides.page + offset * params.k_strides.token;
    const Kv* v = v_base + id * params.v_strides.page + offset * params.v_strides.token;
    for (; offset < page_size && i < num_keys; ++offset, ++i) {
      k_rows[i] = k;
      v_rows[i] = v;
      k += params.k_strides.token;
      v += params.v_strides.token;
    }
  }
}

// Widen head_dim values; out is written up to the next multiple of kLanes, with zeros past the end.
template <class T>
inline void widen_row(const T* row, int head_dim, float* out) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(row + d));
  if (d < head_dim) store(out + d, load_partial(row + d, head_dim - d));
}

template <class C>
inline void narrow_row(const float* row, int head_dim, C* out) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(row + d));
  if (d < head_dim) store_partial(out + d, load(row + d), head_dim - d);
}

// One word per column from the rows of two keys, both exact in bf16.
template <class Kv>
inline void pair_rows(const Kv* first, const Kv* second, int head_dim, float* out) {
  const auto pair = [](VecF a, VecF b) {
    return as_float((as_bits(a) >> 16) | (as_bits(b) & 0xffff0000u));
  };
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    store(out + d, pair(load(first + d), load(second + d)));
  }
  if (d < head_dim) {
    const int n = head_dim - d;
    store(out + d, pair(load_partial(first + d, n), load_partial(second + d, n)));
  }
}

}  // namespace fi::cpu
