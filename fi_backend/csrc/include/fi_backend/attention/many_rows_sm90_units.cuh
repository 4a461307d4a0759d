// The units of work of a CTA, in the order in which it computes them.
//
// A CTA does all of its work one after the other: no pipeline drains in between.
#pragma once

#include <fi_backend/attention/many_rows_sm90_params.h>

#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_sm90_shape.cuh>

namespace fi {

template <class Traits>
class Sm90Units {
  using Memory = Sm90Memory<Traits>;

 public:
  __device__ __forceinline__ Sm90Units(const ManyRowsSm90Params& params, Memory& memory)
      : params_(params), p_(params.attention), memory_(memory) {}

  // One thread calls this, as all below; the plan's header need not be in shared memory yet.
  __device__ __forceinline__ void start(const PlanView& plan, int32_t first_worker,
                                        uint32_t num_dealt) const {
    search().walk.begin(p_, plan, params_.num_reqs, first_worker, num_dealt);
    search().item.group_size = params_.group_size;
    search().item.piece.num_rows = 0;
    search().next_row = 0;
  }

  // Find the unit for the next place, which is free.
  __device__ __forceinline__ void next() const {
    const WorkGeometry& g = memory_.geometry();
    ManyRowsItem& item = search().item;
    if (search().next_row >= item.piece.num_rows) {
      search().next_row = 0;
      item.exists = search().walk.next(p_, g, item.group_size, item.piece, item.holders);
      if (item.exists) describe_item<typename Traits::Variant>(p_, g, item);
    }
    Sm90Unit& unit = memory_.units[memory_.found_units % Traits::kUnits];
    unit.num_tiles = 0;
    unit.exists = item.exists;
    if (!item.exists) return;
    copy_item(item, unit.item);
    unit.first_row = search().next_row;
    search().next_row += Traits::kUnitRows;
    unit.is_last = search().next_row >= unit.item.piece.num_rows;
    set_tokens(g, unit);
  }

  // What a group needs to know, beside that which copies wait for.
  __device__ __forceinline__ void describe_group(Sm90Unit& unit, int group) const {
    const int row = unit.first_row + group * kGroupRows;
    KvRange all = rows_range(p_, memory_.geometry(), unit.item, row, kGroupRows).all;
    // Nobody writes what a group without rows computes, but all wait for it: no masks.
    const bool has_rows = row < unit.item.piece.num_rows;
    if (!kHasScores<typename Traits::Variant> && !has_rows) all = {0, INT32_MAX};
    unit.unmasked[group] = all;
    unit.free[group] = unit.item.is_scale_only ? all : KvRange{0, 0};
  }

 private:
  // Some words at a time: there are no registers for all of them.
  __device__ __forceinline__ static void copy_item(const ManyRowsItem& from, ManyRowsItem& to) {
    constexpr int kWords = sizeof(ManyRowsItem) / sizeof(int32_t);
#pragma unroll 8
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<int32_t*>(&to)[i] = reinterpret_cast<const int32_t*>(&from)[i];
    }
  }

  __device__ __forceinline__ Sm90Search& search() const { return memory_.search; }

  __device__ __forceinline__ void set_tokens(const WorkGeometry& g, Sm90Unit& unit) const {
    const KvRange tokens = rows_range(p_, g, unit.item, unit.first_row, Traits::kUnitRows).some;
    // Boxes begin where a page is a multiple of them. Where pieces are never cut, tiles begin at
    // multiples of their size, or those of a windowed row would lie where the rows beside it want
    // them.
    const bool begins_with_box = params_.has_maps() && p_.pages.page_size > 1;
    const int step = g.split < 0 ? Traits::kTokens : begins_with_box ? params_.k.box_tokens : 1;
    const int early = tokens.begin & (step - 1);  // a power of two
    const int first_token = tokens.begin - early;
    unit.tokens = tokens;
    unit.first_token = first_token;
    const int num_tokens = tokens.end - first_token;
    unit.num_tiles =
        tokens.begin < tokens.end ? (num_tokens + Traits::kTokens - 1) / Traits::kTokens : 0;
  }

  const ManyRowsSm90Params& params_;
  const AttentionParams& p_;
  Memory& memory_;
};

}  // namespace fi
