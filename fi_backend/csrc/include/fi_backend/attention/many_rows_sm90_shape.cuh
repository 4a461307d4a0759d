// Compile-time shapes of the many-row kernel for sm_90a, and its shared memory.
//
// Two warpgroups compute, or three where heads are small, each on 64 query rows, and another one
// brings what they need: units of work with their query rows, and tiles of K and V in rings.
// Barriers in shared memory tell both sides what is full and what is free, so that nobody waits for
// what he does not need. Of an fp8 cache, tiles pass through another ring and a group that widens
// them.
#pragma once

#include <fi_backend/attention/many_rows_shape.h>
#include <fi_backend/attention/seen_blocks.h>

#include <fi_backend/attention/many_rows_shape.cuh>
#include <fi_backend/attention/ring_place.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>
#include <fi_backend/ptx/mbarrier.cuh>

namespace fi {

inline constexpr int kGroupThreads = 128;  // a warpgroup
inline constexpr int kGroupRows = 64;      // rows of a wgmma
inline constexpr int kMaxGroups = 3;       // that compute

// Shared memory is filled in blocks of 8 rows by 64 columns, as WgmmaMatrix (ptx/wgmma.cuh) wants
// them.
inline constexpr int kPartColumns = 64;
using PartRows = SwizzledRows<kPartColumns * 2>;
inline constexpr int kBlockRows = 8;
inline constexpr int kBlockBytes = kBlockRows * PartRows::kRowBytes;

// How blocks follow each other: bytes from a block to that of the next 8 rows, and to that of the
// next columns that Rows hold, which is 64 of 16 bits.
template <int kNextRows_, int kNextColumns_, class Rows_ = PartRows>
struct BlockLayout {
  using Rows = Rows_;
  static constexpr int kNextRows = kNextRows_;
  static constexpr int kNextColumns = kNextColumns_;

  // Of a 16-byte chunk.
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row / kBlockRows * kNextRows + chunk / Rows::kChunks * kNextColumns +
           Rows::offset(row % kBlockRows, chunk % Rows::kChunks);
  }
};

// A tile of K or V lies in shared memory as boxes of the copy engine write it: a box has one part
// of 64 columns or, of wide heads, whose tiles have many boxes, all columns of its tokens.
template <int kDim, int kTokens>
struct Sm90Tile {
  static constexpr int kColumns = kPartColumns;  // of a part
  static constexpr int kParts = (kDim + kPartColumns - 1) / kPartColumns;
  static constexpr int kBoxParts = kDim > 128 && kDim % kPartColumns == 0 ? kParts : 1;
  using Blocks = BlockLayout<kBoxParts * kBlockBytes,
                             kBoxParts == 1 ? kTokens * PartRows::kRowBytes : kBlockBytes>;
  static constexpr int kBytes = kParts * kTokens * PartRows::kRowBytes;
};

// A tile of an fp8 cache before it is widened. Parts of 128 columns are swizzled as those of 64 are
// in 16 bits, and parts of 64 by half of that.
template <int kDim, int kTokens>
struct Sm90NarrowTile {
  static constexpr int kColumns = kDim > 64 ? 128 : 64;
  static constexpr int kParts = (kDim + kColumns - 1) / kColumns;
  static constexpr int kBoxParts = 1;
  using Blocks = BlockLayout<kBlockRows * kColumns, kTokens * kColumns, SwizzledRows<kColumns>>;
  static constexpr int kBytes = kParts * kTokens * kColumns;
};

// What depends on the cache's type. Weight: of weights and of what they multiply. LoadedTile: what
// the group that loads writes.
template <class Q, class Kv>
struct Sm90CacheTraits {
  using Weight = Q;
  template <int kDim, int kTokens>
  using LoadedTile = Sm90Tile<kDim, kTokens>;
  static constexpr int kKeysAhead = 1;  // tiles that K is loaded ahead of V
  static constexpr int kLoadGroups = 1;
};
struct Sm90Fp8Traits {
  using Weight = __half;  // fp8 is exact in fp16, and one instruction away from it
  template <int kDim, int kTokens>
  using LoadedTile = Sm90NarrowTile<kDim, kTokens>;
  static constexpr int kKeysAhead = 0;
  static constexpr int kLoadGroups = 2;  // the other one widens
};
template <class Q>
struct Sm90CacheTraits<Q, __nv_fp8_e4m3> : Sm90Fp8Traits {};
template <class Q>
struct Sm90CacheTraits<Q, __nv_fp8_e5m2> : Sm90Fp8Traits {};

// Q: __half or __nv_bfloat16; Out: a float type; Kv: Q or an fp8 type.
template <class Q_, class Out_, int kHeadDimQk, int kHeadDimVo, class Variant_ = NoVariant,
          class Kv_ = Q_>
struct Sm90Traits : Sm90CacheTraits<Q_, Kv_> {
  using Cache = Sm90CacheTraits<Q_, Kv_>;
  using Q = Q_;
  using Kv = Kv_;
  static constexpr bool kIsFp8Cache = kIsFp8<Kv>;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kQk = kHeadDimQk;
  static constexpr int kVo = kHeadDimVo;
  static constexpr int kWidest = kQk > kVo ? kQk : kVo;
  // Wide heads take more shared memory for a token, and more registers for outputs. Tiles of which
  // some are left out are as small as what is seen together, or most would be seen in part; but not
  // beside the one narrow tile of an fp8 cache, which each of them would wait for.
  static constexpr bool kHasSmallTiles =
      kSkipsTiles<Variant> && kSeenTogether<Variant> % 128 != 0 && !kIsFp8Cache;
  static constexpr int kTokens = kWidest <= 128 && !kHasSmallTiles ? 128 : 64;
  static constexpr int kStages = kWidest <= 128 ? 256 / kTokens : 2;
  static constexpr int kLoadedStages = kIsFp8Cache ? 1 : kStages;
  // Units that are known ahead, with query rows. Beside narrow tiles, the place of one is taken by
  // the list of seen tiles.
  static constexpr bool kHasRoom = !(kIsFp8Cache && kWidest > 64 && kSkipsTiles<Variant>);
  static constexpr int kUnits = kWidest <= 192 && kHasRoom ? 2 : 1;
  static constexpr int kGroups = sm90_tile_rows(kQk, kVo, sizeof(Kv)) / kGroupRows;  // that compute
  static constexpr int kUnitRows = kGroups * kGroupRows;
  static constexpr int kComputeThreads = kGroups * kGroupThreads;
  static constexpr int kThreads = kComputeThreads + Cache::kLoadGroups * kGroupThreads;
  // A thread's registers: outputs, scores and weights leave little of what every thread gets to
  // begin with.
  static constexpr int kComputeRegisters = kGroups == 3 ? 160 : kVo <= 192 ? 224 : 232;
  static constexpr int kLoadRegisters = kGroups == 3 || kIsFp8Cache ? 32 : kVo <= 192 ? 56 : 40;
  static_assert(kGroups * kComputeRegisters + Cache::kLoadGroups * kLoadRegisters ==
                (65536 / kThreads & ~7) * (kGroups + Cache::kLoadGroups));
  static constexpr int kTileRows = many_row_tile(kQk, kVo);
  static constexpr int kWarpRows = 16;
  static constexpr int kRowBlocks = 1;
  static constexpr bool kTilesBeginEarly = true;  // where boxes of the copy engine do
  static constexpr bool kTilesAreAligned = kSkipsTiles<Variant>;  // to their size
  static_assert(kTileRows >= kUnitRows, "there is room for the parts of a tile");
  static_assert(kQk % 16 == 0 && kVo % 16 == 0, "a wgmma has 16 inputs");

  using KTile = Sm90Tile<kQk, kTokens>;
  using VTile = Sm90Tile<kVo, kTokens>;
  using LoadedK = typename Cache::template LoadedTile<kQk, kTokens>;
  using LoadedV = typename Cache::template LoadedTile<kVo, kTokens>;
  using QueryBlocks = BlockLayout<kBlockBytes, kGroupRows * PartRows::kRowBytes>;
  static constexpr int kGroupQueryBytes = KTile::kParts * kGroupRows * PartRows::kRowBytes;
};

// A tile of a unit, as its rows see it: in chunks of kSeenChunk tokens.
struct SeenTile {
  static constexpr int kMaxChunks = 8;

  uint32_t word;  // of chunks that some row sees, a bit each; whether all rows see all; the index

  __device__ __forceinline__ static SeenTile make(int index, uint32_t chunks, bool is_free) {
    return {uint32_t(index) << (kMaxChunks + 1) | uint32_t{is_free} << kMaxChunks | chunks};
  }
  // Not looked at.
  __device__ __forceinline__ static SeenTile unknown(int index) {
    return make(index, (1u << kMaxChunks) - 1, false);
  }
  __device__ __forceinline__ int index() const { return word >> (kMaxChunks + 1); }
  // Whether the variant hides nothing.
  __device__ __forceinline__ bool is_free() const { return word >> kMaxChunks & 1; }
  // Whether some row sees some of the `count` tokens from `first` on, both multiples of a chunk.
  __device__ __forceinline__ bool has(int first, int count) const {
    return (word >> first / kSeenChunk & ((1u << count / kSeenChunk) - 1)) != 0;
  }
  __device__ __forceinline__ int first_seen() const { return (__ffs(word) - 1) * kSeenChunk; }
};

// Tile n of those of a unit that are computed: any, of most variants.
template <bool kSkips>
struct SeenTiles {
  struct Tile {
    int n;
    __device__ __forceinline__ int index() const { return n; }
    __device__ __forceinline__ bool has(int, int) const { return true; }
  };
  __device__ __forceinline__ static Tile tile(int n, int /*num_tiles*/) { return {n}; }
};
// Those that some row sees, as far as the list goes, from the last one on; before them all.
template <>
struct SeenTiles<true> {
  static constexpr int kMaxListed = 2048;

  SeenTile listed[kMaxListed];
  int32_t num_listed;
  SeeingRows rows;  // of the unit

  __device__ __forceinline__ SeenTile tile(int n, int num_tiles) const {
    const int place = num_tiles - 1 - n;
    return place < num_listed ? listed[place] : SeenTile::unknown(n);
  }
};

// Work of a CTA at a time: some rows of an item and the tokens of its piece that they see.
template <class Traits>
struct Sm90Unit : SeenTiles<kSkipsTiles<typename Traits::Variant>> {
  ManyRowsItem item;
  int32_t first_row;    // of the item's tile
  int32_t first_token;  // of the first of the tiles; what is before tokens.begin is masked
  int32_t num_tiles;    // that are computed
  KvRange tokens;
  KvRange free[kMaxGroups];      // tokens whose scores need but the scale, for each group's rows
  KvRange unmasked[kMaxGroups];  // and those that all of its rows see
  bool is_last;                  // of its item
  bool exists;

  // Tile n of those that are computed, and where it begins.
  __device__ __forceinline__ auto seen_tile(int n) const { return this->tile(n, num_tiles); }
  __device__ __forceinline__ int tile_token(int n) const {
    return first_token + seen_tile(n).index() * Traits::kTokens;
  }
};

// Where the search for units stands.
struct Sm90Search {
  ManyRowsItem item;
  ManyRowsWalk walk;
  int32_t next_row;
};

// A ring of tiles in shared memory.
template <class Tile_, int kStages_>
struct TileRing {
  using Tile = Tile_;
  static constexpr int kStages = kStages_;

  uint8_t (&tiles)[kStages][Tile::kBytes];
  uint64_t (&full)[kStages];
  uint64_t (&empty)[kStages];
};

// What is loaded of an fp8 cache, before it is widened.
template <class Traits, bool kIsFp8Cache = Traits::kIsFp8Cache>
struct NarrowTiles {};
template <class Traits>
struct alignas(1024) NarrowTiles<Traits, true> {
  uint8_t k[Traits::kLoadedStages][Traits::LoadedK::kBytes];
  uint8_t v[Traits::kLoadedStages][Traits::LoadedV::kBytes];
};

template <class Traits>
struct alignas(1024) Sm90Memory {
  uint8_t q[Traits::kUnits][Traits::kGroups][Traits::kGroupQueryBytes];
  uint8_t k[Traits::kStages][Traits::KTile::kBytes];
  uint8_t v[Traits::kStages][Traits::VTile::kBytes];
  NarrowTiles<Traits> narrow;
  Sm90Unit<Traits> units[Traits::kUnits];
  // Where rows lie that are copied one by one, by each warp that does so: query rows or those of K,
  // and of each tile of V from which K is loaded on.
  uint64_t copied_rows[kGroupThreads / kWarpSize][2 + Traits::kKeysAhead][kWarpSize];
  alignas(16) int32_t plan_header[kPlanHeaderInts];
  Sm90Search search;
  uint32_t found_units;  // number of units found before the one at hand
  bool is_last_holder;
  uint64_t unit_wanted;
  uint64_t unit_found[Traits::kUnits];
  uint64_t unit_full[Traits::kUnits];  // its query rows too
  uint64_t unit_empty[Traits::kUnits];
  uint64_t k_full[Traits::kStages];
  uint64_t k_empty[Traits::kStages];
  uint64_t v_full[Traits::kStages];
  uint64_t v_empty[Traits::kStages];
  uint64_t narrow_full[2][Traits::kLoadedStages];  // of K and of V, where they are loaded as fp8
  uint64_t narrow_empty[2][Traits::kLoadedStages];

  __device__ __forceinline__ TileRing<typename Traits::KTile, Traits::kStages> k_ring() {
    return {k, k_full, k_empty};
  }
  __device__ __forceinline__ TileRing<typename Traits::VTile, Traits::kStages> v_ring() {
    return {v, v_full, v_empty};
  }
  // What the group that loads fills.
  __device__ __forceinline__ auto loaded_k() {
    if constexpr (Traits::kIsFp8Cache) {
      return TileRing<typename Traits::LoadedK, Traits::kLoadedStages>{narrow.k, narrow_full[0],
                                                                       narrow_empty[0]};
    } else {
      return k_ring();
    }
  }
  __device__ __forceinline__ auto loaded_v() {
    if constexpr (Traits::kIsFp8Cache) {
      return TileRing<typename Traits::LoadedV, Traits::kLoadedStages>{narrow.v, narrow_full[1],
                                                                       narrow_empty[1]};
    } else {
      return v_ring();
    }
  }

  __device__ __forceinline__ const WorkGeometry& geometry() const {
    return *reinterpret_cast<const WorkGeometry*>(plan_header);
  }
};

// Named barriers; 0 is __syncthreads().
inline constexpr int kComputeBarrier = 1;
inline constexpr int kGroupBarrier = 2;                          // and the next ones: of each group
inline constexpr int kTurnBarrier = kGroupBarrier + kMaxGroups;  // each group's turn to multiply
inline constexpr int kFirstKeysBarrier = kTurnBarrier + kMaxGroups;  // the first tile of K is here

}  // namespace fi
