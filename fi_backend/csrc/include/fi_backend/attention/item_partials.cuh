// Which workers hold keys of an item, and where their partial states lie in the workspace.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>
#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

// Places of the line are 16 bytes each and aligned: one load.
__device__ __forceinline__ LinePosition load_position(const LinePosition* place) {
  const int4 p = *reinterpret_cast<const int4*>(place);
  return {p.x, p.y, p.z, p.w};
}

// The partial states of an item that several workers or units compute.
struct ItemPartials {
  int32_t first_holder;  // the worker that holds the item's first keys
  int32_t num_holders;
  int32_t rank;   // of this worker among the holders
  int32_t count;  // of partials: holders, or chunks
  bool is_chunked;

  // First float of a partial. A worker shares at most two items, so each slot has one owner:
  // partials of holders are packed behind the first holder's, which has the item at its tail, and
  // chunks lie with the first holder, those of an item that nobody shares at its head.
  __device__ __forceinline__ int64_t slot(const PartialArea& area, int32_t index) const {
    return index == 0 ? first_slot(area) : later_slots(area) + int64_t{index} * slot_step(area);
  }
  __device__ __forceinline__ int64_t first_slot(const PartialArea& area) const {
    return area.slot(first_holder, is_chunked && num_holders == 1 ? 0 : 1, 0);
  }
  // Slots but the first are one step apart: index times the step, from here on.
  __device__ __forceinline__ int64_t later_slots(const PartialArea& area) const {
    return is_chunked ? first_slot(area) : area.slot(first_holder, 0, 0);
  }
  __device__ __forceinline__ int32_t slot_step(const PartialArea& area) const {
    return static_cast<int32_t>(is_chunked ? area.slot_floats() : area.slot(1, 0, 0));
  }
};

// Find the holders of the piece's item, by a whole warp of `worker`, which is one of them.
// Workers whose range is empty lie among them. chunk: tokens per chunk, 0 = a piece is one chunk.
__device__ __forceinline__ ItemPartials find_partials(const WorkPiece& piece, int32_t chunk,
                                                      const LinePosition* starts,
                                                      int32_t num_workers, int32_t worker) {
  // Inside of the item, starts are cuts; equal ones are one cut.
  const LinePosition item = {piece.request, piece.kv_head, piece.q_tile, 0};
  const auto is_cut = [&](const LinePosition& start) {
    return same_item(start, item) && start.kv_offset > 0;
  };
  int32_t num_before = 0;  // starts that are cuts, this worker's and before
  int32_t rank = 0;        // cuts among them
  int32_t num_after = 0;   // cuts after it
  bool has_more = true;
  for (int32_t step = threadIdx.x % kWarpSize; has_more; step += kWarpSize) {
    const int32_t before = worker - step;
    const int32_t after = worker + 1 + step;
    bool cuts_before = false, cuts_after = false, is_new_before = false, is_new_after = false;
    if (before > 0) {
      const LinePosition start = load_position(starts + before);
      cuts_before = is_cut(start);
      is_new_before = cuts_before && comes_before(load_position(starts + before - 1), start);
    }
    if (after < num_workers) {
      const LinePosition start = load_position(starts + after);
      cuts_after = is_cut(start);
      is_new_after = cuts_after && comes_before(load_position(starts + after - 1), start);
    }
    const unsigned mask_before = __ballot_sync(kFullWarp, cuts_before);
    num_before += __popc(mask_before);
    rank += __popc(__ballot_sync(kFullWarp, is_new_before));
    num_after += __popc(__ballot_sync(kFullWarp, is_new_after));
    has_more = mask_before == kFullWarp || __all_sync(kFullWarp, cuts_after);
  }
  const int32_t num_tokens = piece.item.end - piece.item.begin;
  const int32_t num_holders = 1 + rank + num_after;
  const int32_t count = chunk == 0 ? num_holders : (num_tokens + chunk - 1) / chunk;
  return {worker - num_before, num_holders, rank, count, chunk != 0};
}

}  // namespace fi
