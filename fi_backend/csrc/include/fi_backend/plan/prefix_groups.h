// Groups of requests, formed from what each has in common with its leader (shared_prefix.h).
//
// The host and a thread block run the same code, as teams of one and of many threads. A team has
// for_each(count, fn), sort(keys, count) and sums_before(values, count), which end with a barrier;
// and add_into(sum, x) and max_into(largest, x) for what many threads add to.
#pragma once

#include <fi_backend/plan/shared_prefix.h>

#if defined(__CUDACC__)
#define FI_TEAM_FUNCTION __device__ __forceinline__
#else
#define FI_TEAM_FUNCTION inline
#endif

namespace fi {

// Groups as they are formed. What is grouped is a unit: first each request by itself, then, for the
// outer groups, each group that there is and each request of none. A group goes by its leader.
struct PrefixGroups {
  uint64_t order[kMaxSharing];       // units or requests, as sort keys
  uint64_t best[kMaxSharing + 1];    // of each leader: (pages not read, pages in common), the
                                     // largest; then of each place in the order: PlaceSums before
  PrefixMatch units[kMaxSharing];    // leader of each unit, and pages in common; -1 = is no unit
  int32_t unit_rows[kMaxSharing];    // query rows
  int32_t first[kMaxSharing];        // of each leader: place of its first unit in the order
  int32_t sums[kMaxSharing];         // of each leader: rows of its group, and readings without it
  int32_t inner_pages[kMaxSharing];  // that the group of each leader shares; 0 = there is none
  int32_t outer_pages[kMaxSharing];
  int16_t unit_of[kMaxSharing];  // each request's
  bool has_units;                // that have something in common with another
  bool has_outer_units;
  bool has_second;        // groups behind others
  int64_t saved_keys;     // of all groups
  int32_t end_row;        // of the last group
  int32_t num_groups[2];  // of each level
};

// Sort keys: the leader, the pages in common, most first, and the unit.
constexpr int kUnitBits = 10;
constexpr int kPagesBits = 31;
constexpr uint64_t kNoUnit = ~uint64_t{0};
constexpr uint32_t kMostPages = (1u << kPagesBits) - 1;
static_assert(kMaxSharing == 1 << kUnitBits, "a unit must fit its bits");

FI_HOST_DEVICE uint64_t unit_key(const PrefixMatch& match, int32_t unit) {
  if (match.leader < 0) return kNoUnit;
  const uint64_t pages = kMostPages - uint32_t(match.num_pages);
  return (uint64_t(match.leader) << kPagesBits | pages) << kUnitBits | uint32_t(unit);
}
FI_HOST_DEVICE int32_t unit_of_key(uint64_t key) {
  return static_cast<int32_t>(key & (kMaxSharing - 1));
}

// PrefixGroups::sums, which have few bits to spare: rows, then readings.
constexpr int kSumBits = 20;
constexpr int32_t kSumMask = (1 << kSumBits) - 1;

// How often a page is read for so many query rows: rows take as long as some readings.
FI_HOST_DEVICE int32_t num_readings(const SharedPrefixParams& p, int32_t rows) {
  return (rows * p.geometry.group_size + kRowsPerReading - 1) / kRowsPerReading;
}

// Keys of all kv heads that need not be read thanks to a group.
FI_HOST_DEVICE int64_t keys_saved(const SharedPrefixParams& p, int32_t sums, int32_t pages) {
  const int64_t readings = (sums >> kSumBits) - num_readings(p, sums & kSumMask);
  return readings * pages * p.pages.page_size * p.geometry.num_kv_heads;
}

// Decide which units share how much with their leaders, and write it to `pages`. A group must save
// worth_keys for each kRowsWorthAsMuch of its rows.
template <class Team>
FI_TEAM_FUNCTION void group_units(const Team& team, const SharedPrefixParams& p,
                                  PrefixGroups& groups, int32_t n, int64_t worth_keys,
                                  int32_t* pages) {
  team.for_each(n, [&](int32_t u) {
    groups.order[u] = unit_key(groups.units[u], u);
    groups.best[u] = 0;
    groups.sums[u] = 0;
    pages[u] = 0;
  });
  team.sort(groups.order, n);
  const auto match_at = [&](int32_t place) {
    const uint64_t key = place < n ? groups.order[place] : kNoUnit;
    return key == kNoUnit ? PrefixMatch{-1, 0} : groups.units[unit_of_key(key)];
  };
  team.for_each(n, [&](int32_t i) {
    const int32_t leader = match_at(i).leader;
    if (leader >= 0 && (i == 0 || match_at(i - 1).leader != leader)) groups.first[leader] = i;
  });
  // The length that saves most: some units have little in common with their leader.
  team.for_each(n, [&](int32_t i) {
    const PrefixMatch match = match_at(i), next = match_at(i + 1);
    if (match.leader < 0) return;
    if (next.leader == match.leader && next.num_pages == match.num_pages) return;
    const int64_t saved = int64_t{i - groups.first[match.leader]} * match.num_pages;
    if (saved == 0) return;
    team.max_into(groups.best[match.leader],
                  uint64_t(saved) << kPagesBits | uint32_t(match.num_pages));
  });
  const auto best_pages = [&](int32_t leader) {
    return static_cast<int32_t>(groups.best[leader] & kMostPages);
  };
  team.for_each(n, [&](int32_t u) {
    const PrefixMatch match = groups.units[u];
    if (match.leader < 0) return;
    const int32_t shared = best_pages(match.leader);
    if (shared == 0 || match.num_pages < shared) return;
    const int32_t rows = groups.unit_rows[u];
    team.add_into(groups.sums[match.leader], rows + (num_readings(p, rows) << kSumBits));
  });
  team.for_each(n, [&](int32_t leader) {
    const int32_t sums = groups.sums[leader], shared = best_pages(leader);
    if (sums == 0) return;
    const int64_t saved = keys_saved(p, sums, shared);
    if (saved <= 0 || saved * kRowsWorthAsMuch < worth_keys * (sums & kSumMask)) return;
    pages[leader] = shared;
    team.add_into(groups.saved_keys, saved);
  });
}

// Make each request a unit. One that leads others has its own group before it joins another's.
template <class Team>
FI_TEAM_FUNCTION void make_units(const Team& team, const SharedPrefixParams& p,
                                 PrefixGroups& groups, int32_t n) {
  team.for_each(n, [&](int32_t r) {
    groups.units[r] = p.matches[r];
    groups.first[r] = 0;  // 1 = leads others
    groups.outer_pages[r] = 0;
  });
  team.for_each(n, [&](int32_t r) {
    const int32_t leader = groups.units[r].leader;
    groups.unit_rows[r] = leader < 0 ? 0 : request_lens(p.qo_indptr, p.kv_lens, r).qo_len;
    if (leader < 0 || leader == r) return;
    groups.has_units = true;
    groups.first[leader] = 1;
  });
  team.for_each(n, [&](int32_t r) {
    const bool leads = groups.first[r] != 0;
    if (leads && groups.units[r].leader != r) groups.units[r] = {r, sharable_pages(p, r)};
  });
}

// Make units of the groups that there are: what each has in common with its leader's leader.
template <class Team>
FI_TEAM_FUNCTION void make_outer_units(const Team& team, const SharedPrefixParams& p,
                                       PrefixGroups& groups, int32_t n) {
  team.for_each(n, [&](int32_t r) {
    const PrefixMatch match = groups.units[r];
    const int32_t shared = match.leader < 0 ? 0 : groups.inner_pages[match.leader];
    const bool is_member = shared > 0 && match.num_pages >= shared;
    groups.unit_of[r] = static_cast<int16_t>(is_member ? match.leader : r);
    if (is_member && match.leader != r) {
      groups.units[r] = {-1, 0};
      return;
    }
    const PrefixMatch top = match.leader < 0 ? match : p.matches[match.leader];
    const int32_t pages = is_member ? shared : match.num_pages;
    groups.units[r] = {top.leader, pages < top.num_pages ? pages : top.num_pages};
    if (groups.inner_pages[r] > 0) groups.unit_rows[r] = groups.sums[r] & kSumMask;
    if (top.leader >= 0 && top.leader != r) groups.has_outer_units = true;
  });
}

// Where a request's shared pages are, in pages of its table: [0, outer_end) in a group of the first
// level, [outer_end, inner_end) in one of the second.
struct PrefixPlace {
  int32_t unit;
  int32_t leader;  // of the first group
  int32_t outer_end;
  int32_t inner_end;
  bool nests;

  FI_HOST_DEVICE bool is_member() const { return outer_end > 0; }
  FI_HOST_DEVICE bool has_second() const { return inner_end > outer_end; }
  FI_HOST_DEVICE bool same_first(const PrefixPlace& other) const {
    return leader == other.leader && nests == other.nests && is_member() == other.is_member();
  }
  // Requests without a second group are in one without keys, which ends where there is another.
  FI_HOST_DEVICE bool same_second(const PrefixPlace& other) const {
    return has_second() == other.has_second() && (!has_second() || unit == other.unit);
  }
  FI_HOST_DEVICE uint64_t order_key(int32_t request) const {
    if (!is_member()) return kNoUnit;
    const uint64_t first = uint64_t(leader) << 2 | uint64_t(nests) << 1 | uint64_t(!has_second());
    return (first << kUnitBits | uint32_t(unit)) << kUnitBits | uint32_t(request);
  }
};

FI_HOST_DEVICE PrefixPlace find_place(const SharedPrefixParams& p, const PrefixGroups& groups,
                                      int32_t request) {
  const int32_t unit = groups.unit_of[request];
  const PrefixMatch match = groups.units[unit];
  const int32_t inner = groups.inner_pages[unit];
  const int32_t outer = match.leader < 0 ? 0 : groups.outer_pages[match.leader];
  if (outer == 0 || match.num_pages < outer) return {unit, unit, inner, inner, false};
  // A second group must be worth one.
  return {unit, match.leader, outer, inner - outer < p.min_pages ? outer : inner, true};
}

// What comes before a place in the order: rows, and groups of each level.
struct PlaceSums {
  uint64_t packed;

  FI_HOST_DEVICE static uint64_t pack(int32_t rows, bool begins_first, bool begins_second) {
    return uint32_t(rows) | uint64_t(begins_first) << kSumBits |
           uint64_t(begins_second) << 2 * kSumBits;
  }
  FI_HOST_DEVICE int32_t rows() const { return static_cast<int32_t>(packed & kSumMask); }
  FI_HOST_DEVICE int32_t groups(int level) const {
    return static_cast<int32_t>(packed >> (level + 1) * kSumBits & kSumMask);
  }
};

// Write the groups that begin at a place of the order, and its request.
FI_HOST_DEVICE void write_place(const SharedPrefixParams& p, const PrefixGroups& groups,
                                int32_t place, int32_t num_levels) {
  const PlaceSums before = {groups.best[place]}, behind = {groups.best[place + 1]};
  const int32_t row = before.rows();
  if (behind.rows() == row || row >= groups.end_row) return;
  const int32_t request = unit_of_key(groups.order[place]);
  const PrefixPlace at = find_place(p, groups, request);
  const int32_t page_size = p.pages.page_size;
  const int32_t end_first = num_first_groups(max_groups(p.geometry.num_reqs));
  for (int level = 0; level < num_levels; ++level) {
    if (behind.groups(level) == before.groups(level)) continue;
    const int32_t first = level == 0 ? end_first - groups.num_groups[0] : end_first;
    const int32_t group = first + before.groups(level);
    const int32_t num_pages = level == 0 ? at.outer_end : at.inner_end - at.outer_end;
    p.group_indptr[group] = level * groups.end_row + row;
    p.group_lens[group] = num_pages * page_size;
    p.group_tables[group] = static_cast<int32_t>(
        level == 0 ? p.pages.first_page_of(at.leader)
                   : p.pages.first_page_of(at.unit) + (num_pages > 0 ? at.outer_end : 0));
  }
  const RequestLens lens = request_lens(p.qo_indptr, p.kv_lens, request);
  p.own_lens[request] = lens.kv_len - at.inner_end * page_size;
  p.first_pages[request] = at.inner_end;
  p.first_rows[request] = row;
  for (int level = 0; level < num_levels; ++level) {
    for (int32_t i = 0; i < lens.qo_len; ++i) {
      p.q_rows[level * groups.end_row + row + i] = p.qo_indptr[request] + i;
    }
  }
}

// Put the members of groups in order, and find out what is before each.
template <class Team>
FI_TEAM_FUNCTION void place_members(const Team& team, const SharedPrefixParams& p,
                                    PrefixGroups& groups, int32_t n, bool is_ordered) {
  if (!is_ordered) {
    team.for_each(n, [&](int32_t r) { groups.order[r] = find_place(p, groups, r).order_key(r); });
    team.sort(groups.order, n);
  }
  const auto place_at = [&](int32_t i) {
    if (i < 0 || groups.order[i] == kNoUnit) return PrefixPlace{-1, -1, 0, 0, false};
    return find_place(p, groups, unit_of_key(groups.order[i]));
  };
  team.for_each(n, [&](int32_t i) {
    const PrefixPlace at = place_at(i), before = place_at(i - 1);
    groups.best[i] = 0;
    if (!at.is_member()) return;
    const int32_t request = unit_of_key(groups.order[i]);
    const int32_t rows = request_lens(p.qo_indptr, p.kv_lens, request).qo_len;
    const bool begins_second = !before.is_member() || !at.same_second(before);
    groups.best[i] = PlaceSums::pack(rows, !at.same_first(before), begins_second);
  });
  team.sums_before(groups.best, n);
  // Where there is no room for a group, there is none for those after it.
  team.for_each(n, [&](int32_t i) {
    const PlaceSums before = {groups.best[i]}, behind = {groups.best[i + 1]};
    const bool begins = behind.groups(0) > before.groups(0);
    if (begins && before.rows() <= p.max_rows) team.max_into(groups.end_row, before.rows());
    if (i == n - 1 && behind.rows() <= p.max_rows) team.max_into(groups.end_row, behind.rows());
  });
  team.for_each(n, [&](int32_t i) {
    if (PlaceSums{groups.best[i]}.rows() >= groups.end_row) return;
    if (place_at(i).has_second()) groups.has_second = true;
    const PlaceSums behind = {groups.best[i + 1]};
    for (int level = 0; level < 2; ++level) {
      team.max_into(groups.num_groups[level], behind.groups(level));
    }
  });
}

// Form groups from p.matches, and write them. All threads of the team call this. Returns where the
// groups end in their batch, see end_behind_groups(); 0 if there are none.
template <class Team>
FI_TEAM_FUNCTION int32_t form_groups(const Team& team, const SharedPrefixParams& p,
                                     PrefixGroups& groups) {
  const int32_t n = num_searched(p.geometry.num_reqs);
  team.for_each(1, [&](int32_t) {
    groups.has_units = groups.has_outer_units = groups.has_second = false;
    groups.saved_keys = 0;
    groups.end_row = groups.num_groups[0] = groups.num_groups[1] = 0;
  });
  make_units(team, p, groups, n);
  if (groups.has_units) {
    group_units(team, p, groups, n, 0, groups.inner_pages);
    make_outer_units(team, p, groups, n);
    const bool may_nest = groups.has_outer_units;
    if (may_nest) group_units(team, p, groups, n, p.worth_keys, groups.outer_pages);
    // Else requests are in the order of leaders already.
    place_members(team, p, groups, n, !may_nest);
  }
  const int32_t num_levels = groups.has_second ? 2 : 1;
  const int32_t num_rows = num_levels * groups.end_row;
  const int64_t of_rows = divide_index(p.worth_keys * num_rows, kRowsWorthAsMuch).quot;
  const bool shares = groups.end_row > 0 && groups.saved_keys >= p.worth_keys + of_rows;
  // Groups that do not exist are before and behind the others.
  const int32_t most = max_groups(p.geometry.num_reqs);
  const int32_t end_first = num_first_groups(most);
  const int32_t begin = end_first - groups.num_groups[0];
  const int32_t end = end_first + (num_levels == 1 ? 0 : groups.num_groups[1]);
  team.for_each(most + 1, [&](int32_t i) {
    if (shares && i >= begin && i < end) return;
    p.group_indptr[i] = shares && i >= end ? num_rows : 0;
    p.group_tables[i] = 0;
    if (i < most) p.group_lens[i] = 0;
  });
  if (!shares) return 0;
  team.for_each(n, [&](int32_t i) { write_place(p, groups, i, num_levels); });
  return end;
}

}  // namespace fi
