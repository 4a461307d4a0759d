// Arguments of the kernel that writes new K and V rows into a paged cache, shared by every target.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/common/macros.h>

namespace fi {

// Element strides of a cache [num_pages, page_size, num_kv_heads, head_dim]; the last dimension is
// contiguous. The order of page, token and head in memory is free, so NHD and HND are both this.
struct PageStrides {
  int64_t page;
  int64_t token;
  int64_t head;
};

// Element strides of new rows [num_tokens, num_kv_heads, head_dim], last dimension contiguous.
struct TokenStrides {
  int64_t token;
  int64_t head;
};

// Where token i goes has two forms. With slot_mapping: slot = page * page_size + offset. Without:
// position p of request b is page kv_indices[kv_indptr[b] + p / page_size], offset p % page_size.
// (The length of a request's last page is not needed to find an address.)
// A token is skipped if its slot or batch index is negative, and also if it lies outside the cache,
// the batch or its request's pages: a kernel never writes where the caller owns nothing.
//
// NOTE: members are in the order of a kernel's first uses; see RopeParams for why.
struct AppendParams {
  const void* slot_mapping;  // [num_tokens], int64 or int32; nullptr = the other form
  const void* key;           // [num_tokens, num_kv_heads, head_dim_qk]
  const void* value;         // [num_tokens, num_kv_heads, head_dim_vo]
  int64_t num_tokens;
  int32_t num_kv_heads;
  int32_t head_dim_qk;
  int32_t head_dim_vo;
  bool slot_mapping_is_int64;
  bool enable_pdl;           // CUDA: launch as a programmatic dependent of the kernel before
  TokenStrides key_strides;  // in elements, as all strides here
  TokenStrides value_strides;
  const int32_t* batch_indices;  // [num_tokens]
  const int32_t* positions;      // [num_tokens]
  int32_t page_size;             // any value >= 1
  int32_t num_requests;
  FastDivider by_page_size;  // make_fast_divider(page_size)
  int64_t num_pages;
  PageStrides key_cache_strides;
  PageStrides value_cache_strides;
  void* key_cache;       // [num_pages, page_size, num_kv_heads, head_dim_qk]
  void* value_cache;     // [num_pages, page_size, num_kv_heads, head_dim_vo]
  const float* k_scale;  // [], [1] or [num_kv_heads]; nullptr = k_scale_value for all
  const float* v_scale;  // [], [1] or [num_kv_heads]; nullptr = v_scale_value for all
  float k_scale_value;   // an fp8 cache stores saturate(x / scale); 16- and 32-bit caches ignore it
  float v_scale_value;
  int32_t k_scale_head_stride;  // of k_scale: 0 = one scale for all heads, 1 = one per head
  int32_t v_scale_head_stride;
  const int32_t* kv_indptr;   // [num_requests + 1], counted in pages
  const int32_t* kv_indices;  // [num_kv_indices], page ids
  int64_t num_kv_indices;
};

}  // namespace fi
