// Compile-time shapes of the many-row kernel, and its shared memory.
#pragma once

#include <fi_backend/attention/many_rows_shape.h>
#include <fi_backend/attention/variant.h>

#include <fi_backend/attention/many_rows_walk.cuh>
#include <fi_backend/attention/swizzled_rows.cuh>
#include <fi_backend/common/dtypes.cuh>
#include <fi_backend/common/fresh_registers.cuh>

namespace fi {

inline constexpr int kManyRowsWarps = 8;
inline constexpr int kManyRowsThreads = kManyRowsWarps * 32;
inline constexpr int kTileStages = 2;  // one tile is computed on while the next one arrives

// Q: __half or __nv_bfloat16; Kv: Q or an fp8 type; Out: a float type. A CTA works on kTileRows
// query rows, each warp on its own share of them, and on kTokens tokens at a time.
//
// Its warps form kGroups groups, each with tiles and a barrier of its own. Groups cost shared
// memory and twice the traffic to it, but drift apart: one multiplies while the other is at its
// softmax.
template <class Q_, class Kv_, class Out_, int kHeadDimQk, int kHeadDimVo, int kTokens_,
          int kGroups_, class Variant_ = NoVariant>
struct ManyRowsTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kQk = kHeadDimQk;
  static constexpr int kVo = kHeadDimVo;
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kComputeThreads = kManyRowsThreads;
  static constexpr int kGroupThreads = kManyRowsThreads / kGroups;
  static constexpr int kTileRows = many_row_tile(kQk, kVo);
  static constexpr int kWarpRows = kTileRows / kManyRowsWarps;
  static constexpr int kRowBlocks = kWarpRows / 16;  // an mma has 16 rows
  static constexpr bool kIsFp8Cache = kIsFp8<Kv>;
  static constexpr bool kTilesBeginEarly = false;  // before the piece that they are of
  static constexpr bool kTilesAreAligned = false;
  // many_rows_sm90.cuh takes the place of this kernel on sm_90a.
  static constexpr bool kHasSm90 = has_sm90_head_dims(kQk, kVo, sizeof(Kv));
  static_assert(kWarpRows % 16 == 0 && kTokens % 16 == 0, "a warp computes in blocks of 16");
  static_assert(kQk % 16 == 0 && kVo % 16 == 0, "head dims must be multiples of 16");
  static_assert(kIsSame<Q, Kv> || kIsFp8Cache, "the cache has q's type or fp8");

  using QRows = SwizzledRows<kQk* int(sizeof(Q))>;
  using KRows = SwizzledRows<kQk* int(sizeof(Q))>;
  using VRows = SwizzledRows<kVo* int(sizeof(Q))>;
};

// A mask of so many bits, up to 32.
__device__ __forceinline__ uint32_t low_bits(int count) {
  return static_cast<uint32_t>((uint64_t{1} << count) - 1);
}

// Where a token's rows begin in the caches, in elements from its head's first row; k < 0: nowhere.
struct RowOffsets {
  int64_t k;
  int64_t v;
};

// The tokens of a piece that some of a set of rows see, and those that all of them do.
struct RowsRange {
  KvRange some;
  KvRange all;
};

// The piece a CTA works on.
struct ManyRowsItem {
  WorkPiece piece;
  FastDivider group_size;
  int32_t first_token;  // query token, within the request, of the tile's first packed row
  int32_t first_head;   // its head in the group
  float scale;          // from q . k to a logit in units of logit_unit()
  bool is_scale_only;   // which is all there is to it, and the scale is positive
  bool exists;
  ItemHolders holders;  // of the item, unless the piece is the whole item
};

template <class Traits>
struct alignas(128) ManyRowsMemory {
  static constexpr int kWideBytes = Traits::kTokens * int(sizeof(typename Traits::Q));
  static constexpr int kTileBytes = Traits::kTokens * int(sizeof(typename Traits::Kv));
  static constexpr int kWidest = Traits::kQk > Traits::kVo ? Traits::kQk : Traits::kVo;
  static constexpr int kWarpBytes = Traits::kWarpRows * kWidest * int(sizeof(typename Traits::Q));

  // Each warp's query rows, and in the end its rows of the output: no other warp touches them.
  uint8_t rows[kManyRowsWarps][kWarpBytes];
  struct alignas(128) Group {
    // Tiles as they are in the caches; of 16-bit types, swizzled.
    uint8_t k[kTileStages][kTileBytes * Traits::kQk];
    uint8_t v[kTileStages][kTileBytes * Traits::kVo];
    // The current tile of an fp8 cache in q's type, swizzled.
    uint8_t k_wide[Traits::kIsFp8Cache ? kWideBytes * Traits::kQk : kChunkBytes];
    uint8_t v_wide[Traits::kIsFp8Cache ? kWideBytes * Traits::kVo : kChunkBytes];
    RowOffsets offsets[kTileStages][Traits::kTokens];
    int32_t pages[Traits::kTokens];  // of the tile after the one that is being copied
  };
  Group groups[Traits::kGroups];
  // What describes the work lies here, because registers are full of scores and outputs.
  ManyRowsItem item;
  ManyRowsItem next_item;
  ManyRowsWalk walk;  // to the items after them
  FastDivider group_size;
  RowsRange ranges[kManyRowsWarps];
  bool is_last_holder;
};

}  // namespace fi
