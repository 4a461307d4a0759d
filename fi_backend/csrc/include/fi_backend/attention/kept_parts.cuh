// Parts of items that are kept (plan/kept_parts.h): a row has a state for each, one after the other
// in out and lse (plan/group_rows.h).
#pragma once

#include <fi_backend/attention/variant.h>
#include <fi_backend/plan/group_rows.h>

#include <fi_backend/attention/logits.cuh>
#include <fi_backend/attention/many_rows_shape.cuh>

namespace fi {

// Where a row of an item's tile goes in out and lse.
template <class Variant>
__device__ __forceinline__ int64_t output_index(const AttentionParams& p, const ManyRowsItem& item,
                                                const LogitRow& row) {
  const int64_t index = int64_t{item.piece.qo_begin} + row.qo_idx;
  if constexpr (!kKeepsParts<Variant>) return index;
  const StateRange states = state_range(p.plan, p.qo_indptr, static_cast<int32_t>(index));
  return states.begin + (item.piece.whole() ? 0 : item.holders.rank);
}

// Say that there are no parts after an item's last one. lse: that of a row of the part at hand.
template <class Variant>
__device__ __forceinline__ void clear_missing_parts(const AttentionParams& p,
                                                    const ManyRowsItem& item, float* lse) {
  if constexpr (!kKeepsParts<Variant>) return;
  const int rank = item.piece.whole() ? 0 : item.holders.rank;
  const int count = item.piece.whole() ? 1 : item.holders.count;
  if (rank + 1 < count) return;
  const int most = state_range(p.plan, p.qo_indptr, item.piece.qo_begin).count;
  for (int part = count; part < most; ++part) {
    lse[(part - rank) * p.lse_row_stride] = minus_infinity();
  }
}

}  // namespace fi
