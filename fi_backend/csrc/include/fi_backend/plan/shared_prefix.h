// Shared prefixes: requests whose page tables begin with the same pages attend to those as one.
//
// A group is a set of few-row requests with a number of leading pages in common. Its rows form one
// request of another batch, without a mask, for the many-row kernel, whose states the few-row
// kernel puts before each row's own keys. Only pages that are full, and that no row of the step
// writes, are shared.
//
// Groups nest in two levels: what groups have in common is an outer group's, and each of them has
// what comes behind it.
//
// Requests are looked at one by one (find_match), then the groups are formed (prefix_groups.h).
#pragma once

#include <fi_backend/layout/paged_kv.h>
#include <fi_backend/plan/geometry.h>
#include <fi_backend/plan/group_rows.h>

namespace fi {

constexpr int kMaxSharing = 1024;  // requests that are looked at; others keep to themselves
// Packed rows that attend to a page in the time in which it is read once.
constexpr int kRowsPerReading = 64;
// Query rows of groups whose states take as long to be written and merged as all else that groups
// cost a layer.
constexpr int kRowsWorthAsMuch = 352;

// What two requests have in common.
struct PrefixMatch {
  int32_t leader;     // the first request whose pages begin like this one's, or itself; it may
                      // have a leader too; -1 = may not share
  int32_t num_pages;  // in common with the leader
};

struct SharedPrefixParams {
  WorkGeometry geometry;
  PageTable pages;
  const int32_t* qo_indptr;  // [num_reqs + 1]
  const int32_t* kv_lens;    // [num_reqs]
  int32_t min_pages;         // that a group has in common, at least 1
  int32_t max_rows;          // of all groups of a level
  int64_t worth_keys;        // that a step must not read because of its groups, summed
                             // over kv heads, if these had few rows
  // Written. Requests of no group have first_pages 0; groups that do not exist have no rows.
  int32_t* own_lens;      // [num_reqs], keys that a request attends to by itself
  int32_t* first_pages;   // [num_reqs], pages before those
  int32_t* first_rows;    // [num_reqs], where its rows are among those of a level
  int32_t* group_indptr;  // [max_groups() + 1], first row of each group; see group_rows.h
  int32_t* group_lens;    // [max_groups()], keys
  int32_t* group_tables;  // [max_groups() + 1], place of the first page in page_indices, or in the
                          // block table as if its rows were one
  int32_t* q_rows;        // [2 * max_rows], row of q of each row
  // Scratch.
  PrefixMatch* matches;  // [num_reqs]
  int32_t* finished;     // [1], thread blocks; 0 between launches
};

FI_HOST_DEVICE int32_t num_searched(int32_t num_reqs) {
  return num_reqs < kMaxSharing ? num_reqs : kMaxSharing;
}
// A group of the first level has two members at least.
FI_HOST_DEVICE int32_t max_groups(int32_t num_reqs) {
  return kGroupLevelsShare * ((num_searched(num_reqs) + 1) / 2);
}

// Pages of a request that may be shared; 0 where they are too few.
FI_HOST_DEVICE int32_t sharable_pages(const SharedPrefixParams& p, int32_t request) {
  const WorkGeometry& g = p.geometry;
  const RequestLens lens = request_lens(p.qo_indptr, p.kv_lens, request);
  if (num_q_tiles(g, kFewRows, lens.qo_len) == 0 || lens.kv_len <= lens.qo_len) return 0;
  // A window that hides keys hides the prefix, or a part that differs from row to row.
  if (g.window_left >= 0 && lens.kv_len - 1 > g.window_left) return 0;
  const int32_t pages =
      static_cast<int32_t>(uint32_t(lens.kv_len - lens.qo_len) / uint32_t(p.pages.page_size));
  return pages < p.min_pages ? 0 : pages;
}

// Lengths of prefixes by which requests are told apart, in pages: min_pages and its multiples by
// powers of 4. Of requests with the same page at such a depth, the first one leads.
constexpr int kKeyDepths = 5;

FI_HOST_DEVICE int64_t key_depth(const SharedPrefixParams& p, int depth) {
  return int64_t{p.min_pages} << 2 * depth;
}

// How many requests are like one at each depth, itself included, and the first of them.
struct KeyCounts {
  int32_t count[kKeyDepths];
  int32_t first[kKeyDepths];
};

// Depths at which the pages of `other` are those of a request with so many `pages` to share.
FI_HOST_DEVICE int num_like_keys(const SharedPrefixParams& p, const int32_t* table, int32_t pages,
                                 int32_t other) {
  const int32_t theirs = sharable_pages(p, other);
  const int32_t end = theirs < pages ? theirs : pages;
  if (end == 0) return 0;
  const int32_t* other_table = p.pages.pages_of(other);
  // All are loaded at once.
  bool is_like[kKeyDepths];
  for (int depth = 0; depth < kKeyDepths; ++depth) {
    const int64_t key = key_depth(p, depth);
    is_like[depth] = key <= end && table[key - 1] == other_table[key - 1];
  }
  int depth = 0;
  while (depth < kKeyDepths && is_like[depth]) ++depth;
  return depth;
}

// The leader of a request, by the two depths at which its pages are read the least often: all
// requests that are like it read those before the first depth once, and those like it at the second
// depth what comes next. The first of these leads it; who is that has the first of all as leader.
FI_HOST_DEVICE int32_t choose_leader(const SharedPrefixParams& p, const KeyCounts& counts,
                                     int32_t request) {
  constexpr uint32_t kOnce = 1 << 20;
  const auto saved_share = [&](int depth) {  // of readings that are not done
    return kOnce - kOnce / uint32_t(counts.count[depth]);
  };
  // Where all go on to the next depth, that one is better. Few depths are left, mostly one.
  const auto some_leave = [&](int depth) {
    const int32_t count = counts.count[depth];
    return count > 1 && (depth + 1 == kKeyDepths || counts.count[depth + 1] < count);
  };
  int32_t leader = request;
  int64_t best = 0;
  FI_NO_UNROLL
  for (int inner = 0; inner < kKeyDepths; ++inner) {
    if (!some_leave(inner)) continue;
    FI_NO_UNROLL
    for (int outer = 0; outer <= inner; ++outer) {
      if (!some_leave(outer)) continue;
      const int64_t behind = key_depth(p, inner) - key_depth(p, outer);
      const int64_t saved = key_depth(p, outer) * saved_share(outer) + behind * saved_share(inner);
      if (saved <= best) continue;
      best = saved;
      const int32_t first = counts.first[inner];
      leader = first != request ? first : counts.first[outer];
    }
  }
  return leader;
}

}  // namespace fi
