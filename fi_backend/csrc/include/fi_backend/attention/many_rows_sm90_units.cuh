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
      : p_(params.attention),
        g_(*reinterpret_cast<const WorkGeometry*>(params.attention.plan)),
        box_tokens_(params.box_tokens),
        memory_(memory) {}

  // One thread calls this, as all below.
  __device__ __forceinline__ void start() const {
    memory_.walk.begin(p_, g_);
    memory_.item.piece.num_rows = 0;
    memory_.next_row = 0;
  }

  __device__ __forceinline__ void next(Sm90Unit& unit) const {
    if (memory_.next_row >= memory_.item.piece.num_rows) {
      unit.exists = memory_.walk.next(p_, g_, memory_.item.piece, memory_.item.holders);
      if (!unit.exists) return;
      describe_item(p_, g_, memory_.item);
      memory_.next_row = 0;
    }
    unit.exists = true;
    unit.item = memory_.item;
    unit.first_row = memory_.next_row;
    memory_.next_row += kUnitRows;
    unit.is_last = memory_.next_row >= unit.item.piece.num_rows;
    set_tokens(unit);
  }

 private:
  __device__ __forceinline__ void set_tokens(Sm90Unit& unit) const {
    unit.tokens = rows_range(p_, g_, unit.item, unit.first_row, kUnitRows).some;
    // Boxes begin where a page is a multiple of them.
    const int begin = unit.tokens.begin;
    unit.first_token = box_tokens_ == 0 || p_.pages.page_size == 1
                           ? begin
                           : begin - begin % static_cast<uint32_t>(box_tokens_);
    const int num_tokens = unit.tokens.end - unit.first_token;
    unit.num_tiles =
        begin < unit.tokens.end ? (num_tokens + Traits::kTokens - 1) / Traits::kTokens : 0;
    for (int group = 0; group < kNumGroups; ++group) {
      const int row = unit.first_row + group * kGroupRows;
      const KvRange all = rows_range(p_, g_, unit.item, row, kGroupRows).all;
      unit.unmasked[group] = all;
      unit.free[group] = unit.item.is_scale_only ? all : KvRange{0, 0};
    }
  }

  const AttentionParams& p_;
  const WorkGeometry& g_;
  int32_t box_tokens_;
  Memory& memory_;
};

}  // namespace fi
