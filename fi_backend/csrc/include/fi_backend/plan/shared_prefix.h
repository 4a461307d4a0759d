// Shared prefixes: requests whose page tables begin with the same pages attend to those as one.
//
// A group is a set of few-row requests with a number of leading pages in common. Its rows form one
// request of another batch, without a mask, for the many-row kernel, whose states the few-row
// kernel puts before each row's own keys. Only pages that are full, and that no row of the step
// writes, are shared.
//
// Requests are looked at one by one (find_match), then the groups are formed (form_groups). The
// host and a thread block run the same code, as teams of one and of many threads.
#pragma once

#include <fi_backend/layout/paged_kv.h>
#include <fi_backend/plan/geometry.h>

#if defined(__CUDACC__)
#define FI_TEAM_FUNCTION __device__ __forceinline__
#else
#define FI_TEAM_FUNCTION inline
#endif

namespace fi {

constexpr int kMaxSharing = 1024;  // requests that are looked at; others keep to themselves
// Packed rows that attend to a page in the time in which it is read once.
constexpr int kRowsPerReading = 64;
// Query rows of groups whose states take as long to be written and merged as all else that groups
// cost a layer.
constexpr int kRowsWorthAsMuch = 352;

// What two requests have in common.
struct PrefixMatch {
  int32_t leader;     // the first request whose pages begin like this one's, or
                      // itself; -1 = may not share
  int32_t num_pages;  // in common with the leader
};

struct SharedPrefixParams {
  WorkGeometry geometry;
  PageTable pages;
  const int32_t* qo_indptr;  // [num_reqs + 1]
  const int32_t* kv_lens;    // [num_reqs]
  int32_t min_pages;         // that a group has in common, at least 1
  int32_t max_rows;          // of all groups
  int64_t worth_keys;        // that a step must not read because of its groups, summed
                             // over kv heads, if these had few rows
  // Written. Requests of no group have first_pages 0; groups that do not exist have no rows.
  int32_t* own_lens;      // [num_reqs], keys that a request attends to by itself
  int32_t* first_pages;   // [num_reqs], pages before those
  int32_t* first_rows;    // [num_reqs], where its rows are among those of all groups
  int32_t* group_indptr;  // [max_groups() + 1], first row of each group
  int32_t* group_lens;    // [max_groups()], keys
  int32_t* group_tables;  // [max_groups() + 1], row of the block table, or place in page_indices
  int32_t* q_rows;        // [max_rows], row of q of each row
  // Scratch.
  PrefixMatch* matches;  // [num_reqs]
  int32_t* finished;     // [1], thread blocks; 0 between launches
};

FI_HOST_DEVICE int32_t num_searched(int32_t num_reqs) {
  return num_reqs < kMaxSharing ? num_reqs : kMaxSharing;
}
// A group has two members at least.
FI_HOST_DEVICE int32_t max_groups(int32_t num_reqs) { return (num_searched(num_reqs) + 1) / 2; }

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

// The leader of a request: at the depth at which most pages need not be read. All requests at that
// depth see the same counts up to there, but some may choose a greater depth among fewer.
FI_HOST_DEVICE int32_t choose_leader(const SharedPrefixParams& p, const KeyCounts& counts,
                                     int32_t request) {
  int32_t leader = request;
  int64_t best = 0;
  for (int depth = 0; depth < kKeyDepths; ++depth) {
    const int64_t saved = (counts.count[depth] - 1) * key_depth(p, depth);
    if (saved <= best) continue;
    best = saved;
    leader = counts.first[depth];
  }
  return leader;
}

// Groups as they are formed. A group goes by its leader, who need not be a member.
struct PrefixGroups {
  PrefixMatch matches[kMaxSharing];
  uint64_t best[kMaxSharing];    // of each leader: (pages not read, pages in common), the largest
  int32_t members[kMaxSharing];  // of each leader's group
  int32_t rows[kMaxSharing];     // of those members
  int32_t qo_lens[kMaxSharing];  // of members; 0 of other requests
  int64_t saved_keys;            // of all groups
  int32_t num_groups;
  int32_t end_row;      // of the last group
  int32_t num_matches;  // requests with something in common with another
};

constexpr int kDepthBits = 31;  // of PrefixGroups::best

// Pages that a group need not read if it shares as many as `request` has in common with its leader:
// those of the members that have so many, but one.
FI_HOST_DEVICE int64_t pages_saved(const PrefixGroups& groups, int32_t num_reqs, int32_t request) {
  const PrefixMatch mine = groups.matches[request];
  int32_t others = -1;
  for (int32_t r = 0; r < num_reqs; ++r) {
    const PrefixMatch match = groups.matches[r];
    others += match.leader == mine.leader && match.num_pages >= mine.num_pages;
  }
  return int64_t{others} * mine.num_pages;
}

FI_HOST_DEVICE int32_t shared_pages(const PrefixGroups& groups, int32_t leader) {
  return static_cast<int32_t>(groups.best[leader] & ((uint64_t{1} << kDepthBits) - 1));
}

// Keys of all kv heads that a group need not read: its rows take as long as some readings.
FI_HOST_DEVICE int64_t keys_saved(const SharedPrefixParams& p, const PrefixGroups& groups,
                                  int32_t leader) {
  const WorkGeometry& g = p.geometry;
  const int64_t packed_rows = int64_t{groups.rows[leader]} * g.group_size;
  const int64_t readings = ceil_div64(packed_rows, kRowsPerReading);
  return (groups.members[leader] - readings) * shared_pages(groups, leader) * p.pages.page_size *
         g.num_kv_heads;
}

// Rows of all groups before a request's, which come in order of leaders and of requests.
FI_HOST_DEVICE int32_t rows_before(const PrefixGroups& groups, int32_t leader, int32_t request) {
  int32_t rows = 0;
  for (int32_t r = 0; r < leader; ++r) rows += groups.rows[r];
  for (int32_t r = 0; r < request; ++r) {
    if (groups.matches[r].leader == leader) rows += groups.qo_lens[r];
  }
  return rows;
}

FI_HOST_DEVICE int32_t groups_before(const PrefixGroups& groups, int32_t leader) {
  int32_t count = 0;
  for (int32_t r = 0; r < leader; ++r) count += groups.members[r] > 0;
  return count;
}

// Decide who shares how much with whom.
template <class Team>
FI_TEAM_FUNCTION void find_members(const Team& team, const SharedPrefixParams& p,
                                   PrefixGroups& groups, int32_t n) {
  // The length that saves most: some requests have little in common with their leader.
  team.for_each(n, [&](int32_t r) {
    const PrefixMatch match = groups.matches[r];
    if (match.leader < 0) return;
    const int64_t saved = pages_saved(groups, n, r);
    if (saved == 0) return;
    team.max_into(groups.best[match.leader],
                  uint64_t(saved) << kDepthBits | uint32_t(match.num_pages));
  });
  team.for_each(n, [&](int32_t r) {
    const PrefixMatch match = groups.matches[r];
    if (match.leader < 0) return;
    const int32_t depth = shared_pages(groups, match.leader);
    if (depth == 0 || match.num_pages < depth) return;
    groups.qo_lens[r] = request_lens(p.qo_indptr, p.kv_lens, r).qo_len;
    team.add_into(groups.members[match.leader], 1);
    team.add_into(groups.rows[match.leader], groups.qo_lens[r]);
  });
  team.for_each(n, [&](int32_t r) {
    if (groups.members[r] == 0 || keys_saved(p, groups, r) > 0) return;
    groups.members[r] = groups.rows[r] = 0;
  });
  // Where there is no room for a group, there is none for those after it.
  team.for_each(n, [&](int32_t r) {
    if (groups.members[r] == 0) return;
    const int32_t end_row = rows_before(groups, r, 0) + groups.rows[r];
    if (end_row > p.max_rows) {
      groups.members[r] = 0;
      return;
    }
    team.add_into(groups.num_groups, 1);
    team.max_into(groups.end_row, end_row);
    team.add_into(groups.saved_keys, keys_saved(p, groups, r));
  });
}

// Write a group: a request of rows that see all pages which its members share.
FI_HOST_DEVICE void write_group(const SharedPrefixParams& p, const PrefixGroups& groups,
                                int32_t leader) {
  const int32_t group = groups_before(groups, leader);
  const PageTable& pages = p.pages;
  p.group_indptr[group + 1] = rows_before(groups, leader, 0) + groups.rows[leader];
  p.group_lens[group] = shared_pages(groups, leader) * pages.page_size;
  p.group_tables[group] =
      pages.indices != nullptr ? pages.indptr[leader] : static_cast<int32_t>(pages.row_of(leader));
}

FI_HOST_DEVICE void write_member(const SharedPrefixParams& p, const PrefixGroups& groups,
                                 int32_t request) {
  const int32_t leader = groups.matches[request].leader;
  const int32_t depth = shared_pages(groups, leader);
  const int32_t first_row = rows_before(groups, leader, request);
  p.own_lens[request] = p.kv_lens[request] - depth * p.pages.page_size;
  p.first_pages[request] = depth;
  p.first_rows[request] = first_row;
  for (int32_t i = 0; i < groups.qo_lens[request]; ++i) {
    p.q_rows[first_row + i] = p.qo_indptr[request] + i;
  }
}

// Form groups from p.matches, and write them. All threads of the team call this; for_each() ends
// with a barrier among them. True if there are groups.
template <class Team>
FI_TEAM_FUNCTION bool form_groups(const Team& team, const SharedPrefixParams& p,
                                  PrefixGroups& groups) {
  const int32_t n = num_searched(p.geometry.num_reqs);
  team.for_each(1, [&](int32_t) {
    groups.saved_keys = 0;
    groups.num_groups = groups.end_row = groups.num_matches = 0;
  });
  team.for_each(n, [&](int32_t r) {
    const PrefixMatch match = p.matches[r];
    groups.matches[r] = match;
    groups.best[r] = 0;
    groups.members[r] = groups.rows[r] = groups.qo_lens[r] = 0;
    if (match.leader >= 0 && match.leader != r) team.add_into(groups.num_matches, 1);
  });
  if (groups.num_matches > 0) find_members(team, p, groups, n);
  const int64_t of_rows = divide_index(p.worth_keys * groups.end_row, kRowsWorthAsMuch).quot;
  const int32_t num_groups = groups.saved_keys >= p.worth_keys + of_rows ? groups.num_groups : 0;
  // Groups that do not exist are behind the others.
  team.for_each(max_groups(p.geometry.num_reqs) + 1, [&](int32_t i) {
    if (i == 0 || i > num_groups) p.group_indptr[i] = num_groups > 0 && i > 0 ? groups.end_row : 0;
    if (i >= num_groups) p.group_tables[i] = 0;
    if (i >= num_groups && i < max_groups(p.geometry.num_reqs)) p.group_lens[i] = 0;
  });
  if (num_groups == 0) return false;
  team.for_each(n, [&](int32_t r) {
    if (groups.members[r] > 0) write_group(p, groups, r);
    if (groups.qo_lens[r] > 0 && groups.members[groups.matches[r].leader] > 0) {
      write_member(p, groups, r);
    }
  });
  return true;
}

}  // namespace fi
