// From (request, token) to the address of a K or V row, for every form of page table.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// Where the pages of request r are listed. Exactly one form is set:
//   CSR:         indices[indptr[r] + page]
//   block table: block_table[row * row_stride + page], row = request_rows[r], or r without it
//   identity:    page indptr[r] + page, with page_size 1: ragged K and V
// Entries past a request's length are never read: engines leave stale ids there.
struct PageTable {
  const int32_t* indptr;       // [num_reqs + 1], counted in pages
  const int32_t* indices;      // [indptr[num_reqs]]; nullptr = another form
  const int32_t* block_table;  // [*, row_stride]; nullptr = another form
  const void* request_rows;    // [num_reqs], int32 or int64; nullptr = row r
  int64_t row_stride;          // of block_table, in elements
  int32_t page_size;           // tokens per page, any value >= 1
  bool request_rows_is_int64;

  FI_HOST_DEVICE bool is_ragged() const { return indices == nullptr && block_table == nullptr; }

  // Of block_table.
  FI_HOST_DEVICE int64_t row_of(int32_t request) const {
    if (request_rows == nullptr) return request;
    return request_rows_is_int64 ? static_cast<const int64_t*>(request_rows)[request]
                                 : static_cast<const int32_t*>(request_rows)[request];
  }

  // Where its pages begin in indices, or in block_table.
  FI_HOST_DEVICE int64_t first_page_of(int32_t request) const {
    return indices != nullptr ? indptr[request] : row_of(request) * row_stride;
  }

  FI_HOST_DEVICE const int32_t* pages_of(int32_t request) const {
    if (indices != nullptr) return indices + indptr[request];
    if (block_table == nullptr) return nullptr;
    return block_table + row_of(request) * row_stride;
  }
};

// Element strides of a cache [num_pages, page_size, num_kv_heads, head_dim], last dim contiguous.
struct KvStrides {
  int64_t page;
  int64_t token;
  int64_t head;
};

}  // namespace fi
