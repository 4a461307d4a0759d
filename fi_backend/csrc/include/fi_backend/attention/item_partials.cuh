// Where the partial states of an item lie in the workspace.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>

namespace fi {

// The partial states of an item that several workers or units compute: slots of the workspace, as
// offsets of their first floats.
struct ItemPartials {
  int64_t first_slot;
  int64_t later_slots;  // slot i > 0 lies i steps behind this
  int32_t step;
  int32_t count;         // of partials: holders, or chunks
  int32_t first_holder;  // the worker that holds the item's first keys
  int32_t num_holders;

  __device__ __forceinline__ int64_t slot(int32_t index) const {
    return index == 0 ? first_slot : later_slots + int64_t{index} * step;
  }
};

// A worker shares at most two items, so each slot has one owner: partials of holders are packed
// behind the first holder's, which has the item at its tail, and chunks lie with the first holder,
// those of an item that nobody shares at its head.
__device__ __forceinline__ ItemPartials make_item_partials(const PartialArea& area,
                                                           int32_t first_holder,
                                                           int32_t num_holders,
                                                           int32_t num_chunks) {
  const bool is_chunked = num_chunks > 0;
  const int64_t head = area.slot(first_holder, 0, 0);
  const int64_t tail = area.slot(first_holder, 1, 0);
  const int64_t first = is_chunked && num_holders == 1 ? head : tail;
  return {first,
          is_chunked ? first : head,
          static_cast<int32_t>(is_chunked ? area.slot_floats() : area.slot(1, 0, 0)),
          is_chunked ? num_chunks : num_holders,
          first_holder,
          num_holders};
}

}  // namespace fi
