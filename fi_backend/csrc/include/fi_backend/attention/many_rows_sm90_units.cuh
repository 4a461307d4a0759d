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
  using Unit = Sm90Unit<Traits>;
  using Variant = typename Traits::Variant;

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
      if (item.exists) describe_item<Variant>(p_, g, item);
    }
    Unit& unit = memory_.units[memory_.found_units % Traits::kUnits];
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
  __device__ __forceinline__ void describe_group(Unit& unit, int group) const {
    const int row = unit.first_row + group * kGroupRows;
    KvRange all = rows_range(p_, memory_.geometry(), unit.item, row, kGroupRows).all;
    // Nobody writes what a group without rows computes, but all wait for it: no masks.
    const bool has_rows = row < unit.item.piece.num_rows;
    if (!kHasScores<Variant> && !has_rows) all = {0, INT32_MAX};
    unit.unmasked[group] = all;
    unit.free[group] = unit.item.is_scale_only ? all : KvRange{0, 0};
  }

  // Leave out the tiles that no row of a unit sees. A warp calls this, of which each lane looks at
  // a tile. Small heads leave it few registers: what it knows is in shared memory.
  __device__ __forceinline__ void list_seen_tiles(Unit& unit) const {
    if (lane() == 0) {
      const int last_row = min(unit.first_row + Traits::kUnitRows, unit.item.piece.num_rows) - 1;
      unit.rows = tile_rows(memory_.geometry(), unit.item, unit.first_row, last_row);
      unit.num_listed = 0;
    }
    __syncwarp();
    int left = unit.num_tiles;
#pragma unroll 1
    for (; left > 0 && unit.num_listed + kWarpSize <= Unit::kMaxListed; left -= kWarpSize) {
      const SeenTile tile = look_at(unit, left - 1 - lane());
      const uint32_t seen = __ballot_sync(kFullWarp, tile.word != 0);
      const int num_listed = unit.num_listed;
      if (tile.word != 0) unit.listed[num_listed + __popc(seen & low_bits(lane()))] = tile;
      __syncwarp();
      if (lane() == 0) unit.num_listed = num_listed + __popc(seen);
      __syncwarp();
    }
    if (lane() == 0) unit.num_tiles = unit.num_listed + max(left, 0);
    __syncwarp();
  }

 private:
  __device__ __forceinline__ static int lane() { return fresh_thread() % kWarpSize; }

  // What some rows of a unit see of a tile, which may be before its first one; 0 if that is
  // nothing.
  __device__ __forceinline__ SeenTile look_at(const Unit& unit, int index) const {
    constexpr int kBlock = kSeenTogether<Variant>;
    static_assert(Traits::kTokens <= SeenTile::kMaxChunks * kSeenChunk);
    const int begin = unit.first_token + index * Traits::kTokens;
    const int end = min(begin + Traits::kTokens, unit.tokens.end);
    uint32_t chunks = 0;
    bool is_free = true;
#pragma unroll 1
    for (int key = max(begin, unit.tokens.begin), next; key < end; key = next) {
      next = (key / kBlock + 1) * kBlock;
      asm volatile("" ::: "memory");  // small heads leave no registers to keep the rows in
      const Sight sight = sight_of(variant_of<Variant>(p_), unit.item.piece, unit.rows, key);
      is_free &= sight.all;
      if (!sight.some) continue;
      const int last = min(next, end) - 1;
      chunks |= low_bits((last - begin) / kSeenChunk + 1) & ~low_bits((key - begin) / kSeenChunk);
    }
    return chunks == 0 ? SeenTile{0} : SeenTile::make(index, chunks, is_free);
  }

  // Some words at a time: there are no registers for all of them.
  __device__ __forceinline__ static void copy_item(const ManyRowsItem& from, ManyRowsItem& to) {
    constexpr int kWords = sizeof(ManyRowsItem) / sizeof(int32_t);
#pragma unroll 8
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<int32_t*>(&to)[i] = reinterpret_cast<const int32_t*>(&from)[i];
    }
  }

  __device__ __forceinline__ Sm90Search& search() const { return memory_.search; }

  __device__ __forceinline__ void set_tokens(const WorkGeometry& g, Unit& unit) const {
    const KvRange tokens = rows_range(p_, g, unit.item, unit.first_row, Traits::kUnitRows).some;
    // Boxes begin where a page is a multiple of them. Where pieces are never cut, tiles begin at
    // multiples of their size, or those of a windowed row would lie where the rows beside it want
    // them; where some are left out, so that few blocks of keys that are seen together lie in one.
    const bool begins_with_tile = kSkipsTiles<Variant> || g.split < 0;
    const bool begins_with_box = params_.has_maps() && p_.pages.page_size > 1;
    const int step = begins_with_tile  ? Traits::kTokens
                     : begins_with_box ? params_.k.box_tokens
                                       : 1;
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
