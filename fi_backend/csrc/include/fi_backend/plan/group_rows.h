// The batch that groups of requests make (shared_prefix.h), and where its states go.
//
// A third of the batch has room for groups of the first level, which are at its end, and the rest
// for those of the second, at its beginning: between the groups that there are is none that does
// not exist, over which a walk along the line would stumble one by one. Each level has all rows in
// the same order: a row is in one group of each, which may have no keys. The states of a row, over
// the parts of the keys of both groups, lie beside each other.
#pragma once

#include <fi_backend/plan/work_line.h>

namespace fi {

constexpr int kGroupLevelsShare = 3;

FI_HOST_DEVICE int32_t num_first_groups(int32_t num_groups) {
  return int32_t(uint32_t(num_groups) / kGroupLevelsShare);
}

struct GroupRows {
  int32_t num_rows;    // of each level
  int32_t num_levels;  // 1 or 2
};

// indptr: [num_groups + 1], first row of each group.
FI_HOST_DEVICE GroupRows group_rows(const int32_t* indptr, int32_t num_groups) {
  const int32_t num_rows = indptr[num_first_groups(num_groups)];
  return {num_rows, indptr[num_groups] > num_rows ? 2 : 1};
}

// Of a line that is cut, move the start of worker w, if it is the line's end, to where the groups
// that exist end.
FI_HOST_DEVICE void end_behind_groups(const WorkGeometry& g, int32_t end_group, int32_t w,
                                      const PlanView& plan) {
  LinePosition& start = plan.starts[kManyRows][w];
  if (start.request == g.num_reqs) start.request = end_group;
}

// Where the states of a row over the parts of a group's keys begin, and how many there is room for.
struct StateRange {
  int64_t begin;
  int32_t count;
};

// Of row `row` of the planned batch.
FI_HOST_DEVICE StateRange state_range(const int32_t* plan, const int32_t* indptr, int32_t row) {
  const auto& geometry = *reinterpret_cast<const WorkGeometry*>(plan);
  const GroupRows rows = group_rows(indptr, geometry.num_reqs);
  const int32_t num_states = plan[kNumPartsInt];  // of a row
  if (rows.num_levels == 1) return {int64_t{row} * num_states, num_states};
  const int32_t half = num_states / 2;
  const bool is_second = row >= rows.num_rows;
  const int64_t first = int64_t{row - (is_second ? rows.num_rows : 0)} * num_states;
  return {first + (is_second ? half : 0), half};
}

}  // namespace fi
