// The search for shared prefixes on the host, one thread.
#pragma once

#include <fi_backend/plan/prefix_groups.h>

#include <algorithm>
#include <memory>
#include <numeric>

namespace fi {

// A team of one (form_groups).
struct OneThread {
  template <class Fn>
  void for_each(int32_t count, const Fn& fn) const {
    for (int32_t i = 0; i < count; ++i) fn(i);
  }
  void sort(uint64_t* keys, int32_t count) const { std::sort(keys, keys + count); }
  void sums_before(uint64_t* values, int32_t count) const {
    values[count] = 0;
    std::exclusive_scan(values, values + count + 1, values, uint64_t{0});
  }
  template <class T>
  void add_into(T& sum, T x) const {
    sum += x;
  }
  template <class T>
  void max_into(T& largest, T x) const {
    if (x > largest) largest = x;
  }
};

inline PrefixMatch find_match(const SharedPrefixParams& p, int32_t request) {
  const int32_t mine = request < kMaxSharing ? sharable_pages(p, request) : 0;
  if (mine == 0) return {-1, 0};
  KeyCounts counts = {};
  for (int32_t r = num_searched(p.geometry.num_reqs) - 1; r >= 0; --r) {
    const int depths = num_like_keys(p, p.pages.pages_of(request), mine, r);
    for (int depth = 0; depth < depths; ++depth) {
      ++counts.count[depth];
      counts.first[depth] = r;
    }
  }
  const int32_t leader = choose_leader(p, counts, request);
  if (leader == request) return {request, mine};
  const int32_t theirs = sharable_pages(p, leader);
  const int32_t end = theirs < mine ? theirs : mine;
  const int32_t* a = p.pages.pages_of(leader);
  const int32_t* b = p.pages.pages_of(request);
  int32_t common = 0;
  while (common < end && a[common] == b[common]) ++common;
  return common < p.min_pages ? PrefixMatch{request, mine} : PrefixMatch{leader, common};
}

inline void find_shared_prefixes(const SharedPrefixParams& p) {
  for (int32_t r = 0; r < p.geometry.num_reqs; ++r) {
    p.own_lens[r] = p.kv_lens[r];
    p.first_pages[r] = 0;
    p.first_rows[r] = 0;
    p.matches[r] = find_match(p, r);
  }
  const auto groups = std::make_unique<PrefixGroups>();
  form_groups(OneThread(), p, *groups);
}

}  // namespace fi
