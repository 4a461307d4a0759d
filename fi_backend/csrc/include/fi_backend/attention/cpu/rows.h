// Rows of the cache: where they are, and conversions of whole rows.
#pragma once

#include <fi_backend/attention/cpu/bf16_rows.h>
#include <fi_backend/attention/cpu/row_vectors.h>
#include <fi_backend/attention/params.h>

#include <type_traits>

namespace fi::cpu {

// Consecutive keys of one request and head.
struct KeyRange {
  int32_t request;
  int32_t kv_head;
  int32_t first;
  int count;

  bool operator==(const KeyRange& other) const {
    return request == other.request && kv_head == other.kv_head && first == other.first &&
           count == other.count;
  }
};

// Addresses of the K and V rows of a range of keys.
template <class Kv>
void find_rows(const AttentionParams& params, const KeyRange& keys, const Kv** k_rows,
               const Kv** v_rows) {
  if (keys.count == 0) return;
  const Kv* k_base = static_cast<const Kv*>(params.k_cache) + keys.kv_head * params.k_strides.head;
  const Kv* v_base = static_cast<const Kv*>(params.v_cache) + keys.kv_head * params.v_strides.head;
  const PageTable& table = params.pages;
  const int32_t* pages = table.pages_of(keys.request);
  const int32_t page_size = table.page_size;
  const int32_t first_page = params.first_pages == nullptr ? 0 : params.first_pages[keys.request];
  int32_t page = first_page + keys.first / page_size;
  int32_t offset = keys.first % page_size;
  for (int i = 0; i < keys.count; ++page, offset = 0) {
    const int64_t id = pages != nullptr ? pages[page] : int64_t{table.indptr[keys.request]} + page;
    const Kv* k = k_base + id * params.k_strides.page + offset * params.k_strides.token;
    const Kv* v = v_base + id * params.v_strides.page + offset * params.v_strides.token;
    for (; offset < page_size && i < keys.count; ++offset, ++i) {
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
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, e4m3> || std::is_same_v<T, e5m2>) {
    return widen_through_bf16(row, head_dim, out);  // half the work of load()
  }
#endif
  for_each_vector(head_dim, [&](int d, int n) { store(out + d, load_some(row + d, n)); });
}

template <class C>
inline void narrow_row(const float* row, int head_dim, C* out) {
  for_each_vector(head_dim, [&](int d, int n) { store_some(out + d, load(row + d), n); });
}

// Convert head_dim values, each exact in C.
template <class C, class Kv>
inline void convert_row(const Kv* row, int head_dim, C* out) {
  if constexpr (std::is_same_v<C, bf16>) {
    convert_to_bf16(row, head_dim, out);
  } else {
    for_each_vector(head_dim, [&](int d, int n) { store_some(out + d, load_some(row + d, n), n); });
  }
}

}  // namespace fi::cpu
