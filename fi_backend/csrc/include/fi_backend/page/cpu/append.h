// Writing new K and V rows into a paged cache on the CPU.
#pragma once

#include "fi_backend/common/div.h"
#include "fi_backend/common/index_array.h"
#include "fi_backend/page/append_params.h"
#include "fi_backend/page/cpu/convert.h"

namespace fi::cpu {

enum class Placement { kInside, kSkipped, kOutside };

struct CacheRow {
  int64_t page;
  int64_t offset;
};

// Find where token i goes. kv_indptr must be valid, everything else may hold anything.
inline Placement place_token(const AppendParams& p, int64_t i, CacheRow* row) {
  if (p.slot_mapping != nullptr) {
    const int64_t slot = IndexArray{p.slot_mapping, p.slot_mapping_is_int64}[i];
    if (slot < 0) return Placement::kSkipped;
    const QuotRem at = divide_index(slot, p.page_size);
    *row = {at.quot, at.rem};
  } else {
    const int32_t request = p.batch_indices[i];
    if (request < 0) return Placement::kSkipped;
    if (request >= p.num_requests || p.positions[i] < 0) return Placement::kOutside;
    const QuotRem at = divide_index(p.positions[i], p.page_size);
    const int64_t index = p.kv_indptr[request] + at.quot;
    if (index >= p.kv_indptr[request + 1]) return Placement::kOutside;
    *row = {p.kv_indices[index], at.rem};
  }
  return row->page >= 0 && row->page < p.num_pages ? Placement::kInside : Placement::kOutside;
}

// How the rows of K, or of V, reach their cache. Strides are in bytes.
struct RowWriter {
  const char* rows;
  char* cache;
  TokenStrides row_strides;
  PageStrides cache_strides;
  int64_t num_heads;
  int64_t head_dim;
  const float* scales;
  int64_t scale_stride;
  ConvertRow convert;

  void write(int64_t token, CacheRow at) const {
    const char* from = rows + token * row_strides.token;
    char* to = cache + at.page * cache_strides.page + at.offset * cache_strides.token;
    for (int64_t h = 0; h < num_heads; ++h) {
      convert(from + h * row_strides.head, to + h * cache_strides.head, head_dim,
              scales[h * scale_stride]);
    }
  }
};

inline RowWriter make_writer(const void* rows, void* cache, TokenStrides row_strides,
                             PageStrides cache_strides, int64_t num_heads, int64_t head_dim,
                             const float* scales, int64_t scale_stride, Storage in, Storage out) {
  const int64_t in_bytes = storage_bytes(in), out_bytes = storage_bytes(out);
  // Heads that lie one after the other on both sides are one long head.
  const bool joined = row_strides.head == head_dim && cache_strides.head == head_dim;
  if (joined && scale_stride == 0) {
    head_dim *= num_heads;
    num_heads = 1;
  }
  return {static_cast<const char*>(rows),
          static_cast<char*>(cache),
          {row_strides.token * in_bytes, row_strides.head * in_bytes},
          {cache_strides.page * out_bytes, cache_strides.token * out_bytes,
           cache_strides.head * out_bytes},
          num_heads,
          head_dim,
          scales,
          scale_stride,
          find_conversion(in, out)};
}

// Tokens that place_token does not find inside are skipped. find_conversion(in, out) must exist.
inline void append(const AppendParams& p, Storage in, Storage out, int num_threads) {
  const RowWriter key = make_writer(
      p.key, p.key_cache, p.key_strides, p.key_cache_strides, p.num_kv_heads, p.head_dim_qk,
      p.k_scale != nullptr ? p.k_scale : &p.k_scale_value, p.k_scale_head_stride, in, out);
  const RowWriter value = make_writer(
      p.value, p.value_cache, p.value_strides, p.value_cache_strides, p.num_kv_heads, p.head_dim_vo,
      p.v_scale != nullptr ? p.v_scale : &p.v_scale_value, p.v_scale_head_stride, in, out);
  const int64_t bytes_per_token = int64_t{p.num_kv_heads} * (p.head_dim_qk + p.head_dim_vo) *
                                  (storage_bytes(in) + storage_bytes(out));
  parallel_for(p.num_tokens, min_rows_per_worker(bytes_per_token), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t token = begin; token < end; ++token) {
                   CacheRow at;
                   if (place_token(p, token, &at) != Placement::kInside) continue;
                   key.write(token, at);
                   value.write(token, at);
                 }
               });
}

}  // namespace fi::cpu
