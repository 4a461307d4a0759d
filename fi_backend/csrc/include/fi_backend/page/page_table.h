// What both targets do for a row and for an entry of a page table.
#pragma once

#include <fi_backend/common/div.h>
#include <fi_backend/common/index_array.h>
#include <fi_backend/page/page_table_params.h>

namespace fi {

// Where a row of the page table finds its slots.
struct TokenRow {
  const int32_t* slots;
  int64_t kv_len;
  int64_t shared_tokens;  // of all branches
  int64_t branch_offset;  // how much further on the branch's own tokens are
};

FI_HOST_DEVICE TokenRow find_token_row(const PageTableParams& p, int64_t branch_row) {
  const QuotRem at = divide_index(branch_row, p.num_branches);
  const int64_t row = IndexArray{p.request_rows, p.request_rows_is_int64}[at.quot];
  if (row < 0 || row >= p.num_rows) return {p.token_table, 0, 0, 0};
  const int64_t seq_len = IndexArray{p.seq_lens, p.seq_lens_is_int64}[at.quot];
  const int64_t offset = at.rem * p.branch_tokens;
  const int64_t wanted = seq_len + p.extra_tokens;
  const int64_t fits = p.max_pages * p.page_size;
  const int64_t there = p.max_tokens - offset;
  const int64_t limit = fits < there ? fits : there;
  const int64_t kv_len = wanted < limit ? wanted : limit;
  return {p.token_table + row * p.token_table_stride, kv_len < 0 ? 0 : kv_len, seq_len, offset};
}

FI_HOST_DEVICE int64_t count_pages(const PageTableParams& p, int64_t kv_len) {
  return divide_index(kv_len + p.page_size - 1, p.page_size).quot;
}

FI_HOST_DEVICE int32_t find_page(const PageTableParams& p, const TokenRow& row, int64_t index) {
  const int64_t token = index * p.page_size;
  int64_t slot = row.slots[token < row.shared_tokens ? token : token + row.branch_offset];
  if (p.slot_map != nullptr) {
    const bool is_inside = slot >= 0 && slot < p.num_slots;
    slot = is_inside ? IndexArray{p.slot_map, p.slot_map_is_int64}[slot] : 0;
  }
  return slot < 0 ? 0 : static_cast<int32_t>(divide_index(slot, p.page_size).quot);
}

}  // namespace fi
