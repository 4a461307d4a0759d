// Arguments of the kernel that gathers the page table of a step, shared by every target.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// An engine keeps one row of cache slots for every request that it knows, a slot for each token. A
// step wants pages, of its own requests alone: entry j of a request is the page of token
// j * page_size. Entries past its last page are left alone.
// Row r of the page table is branch r % num_branches of request r / num_branches. The branches
// share their request's seq_len tokens; those that follow begin branch_tokens further on for each
// branch. A row outside token_table makes the request empty, a slot outside slot_map page 0, so
// that no value makes the kernel read where the caller owns nothing.
struct PageTableParams {
  int32_t* page_table;         // [num_requests * num_branches, max_pages], written
  int32_t* kv_lens;            // [num_requests * num_branches], written: seq_len + extra_tokens
  const int32_t* token_table;  // [num_rows, max_tokens], slot = page * page_size + offset
  const void* request_rows;    // [num_requests], int64 or int32: row of token_table
  const void* seq_lens;        // [num_requests], int64 or int32: tokens
  const void* slot_map;        // [num_slots], int64 or int32: slot of another pool; nullptr = none
  int64_t page_table_stride;   // of rows, in elements
  int64_t token_table_stride;  // of rows, in elements
  int64_t num_branch_rows;     // num_requests * num_branches
  int64_t num_rows;
  int64_t max_pages;
  int64_t max_tokens;
  int64_t num_slots;
  int64_t extra_tokens;  // of every request, beyond its seq_len
  int64_t branch_tokens;
  int32_t num_branches;
  int32_t page_size;  // 1 if there are branches
  bool request_rows_is_int64;
  bool seq_lens_is_int64;
  bool slot_map_is_int64;
};

}  // namespace fi
