// Check the page ids that a run on the host reads: one outside the cache would end the process.
#pragma once

#include <bindings/checks.h>
#include <fi_backend/attention/params.h>

#include <algorithm>

namespace fi::bindings {

// Whether all `count` ids lie in [0, num_pages); without a branch, as every layer waits for it.
inline bool are_pages(const int32_t* ids, int64_t count, int64_t num_pages) {
  uint32_t largest = 0;  // a negative id is one of 2^31 or more
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  return count <= 0 || largest < num_pages;
}

// Entries past a request's length, and before what its window shows, may be stale.
inline void check_page_ids(const AttentionParams& p, int64_t num_reqs, int64_t num_pages,
                           int64_t window_left) {
  const PageTable& table = p.pages;
  for (int32_t r = 0; r < num_reqs; ++r) {
    const int64_t kv_len = p.kv_lens[r], qo_len = p.qo_indptr[r + 1] - p.qo_indptr[r];
    const int32_t* pages = table.pages_of(r);
    if (pages == nullptr || qo_len <= 0 || kv_len <= 0) continue;
    const int64_t hidden =
        window_left < 0 ? 0 : std::max<int64_t>(0, kv_len - qo_len - window_left);
    const int64_t skipped = p.first_pages == nullptr ? 0 : p.first_pages[r];
    const int64_t begin = skipped + hidden / table.page_size;
    const int64_t end = skipped + (kv_len + table.page_size - 1) / table.page_size;
    if (are_pages(pages + begin, end - begin, num_pages)) continue;
    const int32_t* bad = std::find_if(pages + begin, pages + end,
                                      [&](int32_t id) { return !are_pages(&id, 1, num_pages); });
    const bool is_csr = table.indices != nullptr;
    TVM_FFI_THROW(ValueError) << (is_csr ? "page_indices[" : "block_table[")
                              << (is_csr ? bad - table.indices : table.row_of(r))
                              << "] must hold page ids in [0, " << num_pages << "); got " << *bad;
  }
}

}  // namespace fi::bindings
