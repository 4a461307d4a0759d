// Levels of keys that a caller gives: groups of query rows, each with a page table of its own,
// whose keys come before those of each request.
//
// Of one or two such levels, this makes the batch that is made of groups which are found
// (group_rows.h), without a search: what runs it, and merges its states, is the same. Rows are in
// the order of the step in each level.
#pragma once

#include <fi_backend/plan/group_rows.h>

namespace fi {

constexpr int kMaxOuterLevels = 2;

struct OuterLevel {
  const int32_t* qo_indptr;    // [num_groups + 1], first row of each group
  const int32_t* kv_lens;      // [num_groups]
  const int32_t* page_indptr;  // [num_groups + 1], counted in the level's page list
  int32_t num_groups;
  int32_t first_page;  // place of that list in the one of all levels
};

struct OuterLevels {
  OuterLevel levels[kMaxOuterLevels];
  int32_t num_levels;
  int32_t max_rows;         // of a level
  const int32_t* num_rows;  // [1], of the step: each level has all of them
  // Written.
  int32_t* group_indptr;  // [num_group_places() + 1]
  int32_t* group_lens;    // [num_group_places()], keys
  int32_t* group_tables;  // [num_group_places() + 1], place of the first page
  int32_t* q_rows;        // [num_levels * max_rows], row of q of each row
};

// Places for groups, of which group_rows.h gives each level a share.
FI_HOST_DEVICE int64_t num_group_places(int64_t num_first, int64_t num_second) {
  return kGroupLevelsShare * max64(num_first, (num_second + 1) / 2);
}
FI_HOST_DEVICE int32_t num_group_places(const OuterLevels& p) {
  const int32_t num_second = p.num_levels > 1 ? p.levels[1].num_groups : 0;
  return static_cast<int32_t>(num_group_places(p.levels[0].num_groups, num_second));
}

FI_HOST_DEVICE int32_t clamp_row(int32_t row, int32_t num_rows) {
  return row < 0 ? 0 : row > num_rows ? num_rows : row;
}

// Write place `place` of the batch, its end included. The first and the last group of a level take
// rows that no other has: all rows have states, whatever a level's offsets are.
FI_HOST_DEVICE void write_group_place(const OuterLevels& p, int32_t place) {
  const int32_t num_places = num_group_places(p);
  const int32_t num_rows = clamp_row(*p.num_rows, p.max_rows);
  const int32_t end_first = num_first_groups(num_places);
  const int level = place < end_first ? 0 : 1;
  const OuterLevel& at = p.levels[level];
  const int32_t group = place - (level == 0 ? end_first - at.num_groups : end_first);
  const bool exists = level < p.num_levels && group >= 0 && group < at.num_groups;
  int32_t row = level * num_rows;
  if (exists && group > 0) row += clamp_row(at.qo_indptr[group], num_rows);
  if (level == 1 && !exists) row = p.num_levels * num_rows;
  p.group_indptr[place] = row;
  p.group_tables[place] = exists ? at.first_page + at.page_indptr[group] : 0;
  if (place < num_places) p.group_lens[place] = exists ? at.kv_lens[group] : 0;
}

// Write row `row` of q_rows, below num_levels * max_rows.
FI_HOST_DEVICE void write_q_row(const OuterLevels& p, int32_t row) {
  const int32_t num_rows = clamp_row(*p.num_rows, p.max_rows);
  p.q_rows[row] = row < num_rows ? row : row < 2 * num_rows ? row - num_rows : 0;
}

}  // namespace fi
