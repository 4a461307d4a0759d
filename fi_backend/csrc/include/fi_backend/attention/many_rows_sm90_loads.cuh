// The warpgroup that loads: it finds units of work, copies their query rows, and keeps the rings of
// K and V tiles full.
//
// Tiles of a unit are computed from the last one to the first. The copy engine brings them box by
// box where pages are multiples of its boxes; elsewhere all warps copy them row by row.
#pragma once

#include <fi_backend/attention/many_rows_sm90_units.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/cp_async.cuh>
#include <fi_backend/ptx/named_barrier.cuh>
#include <fi_backend/ptx/tma.cuh>

namespace fi {

template <class Traits>
class Sm90Loader {
  using Memory = Sm90Memory<Traits>;
  using Unit = Sm90Unit<Traits>;
  using Place = FixedRingPlace<Traits::kUnits>;
  using TilePlace = FixedRingPlace<Traits::kLoadedStages>;
  using Q = typename Traits::Q;
  using Kv = typename Traits::Kv;
  static constexpr bool kSkips = kSkipsTiles<typename Traits::Variant>;
  static constexpr int kWarps = kGroupThreads / kWarpSize;
  static constexpr int kBoxWarps = 2;  // one starts copies of K, the other of V
  static constexpr int kFindingWarp = kBoxWarps;
  static constexpr int kTilesAhead = 2;  // that remain to be loaded when the next unit is wanted
  static constexpr int kLookedAtMeanwhile = 32;  // tiles, by a warp, while one is computed
  static constexpr int kGatherRows = Traits::kTokens / kWarps;  // of a warp
  // The last tiles of a unit, if it has more, are gathered when the next one has been found. There
  // are no registers for that beside warps that widen, nor beside a third group to skip tiles.
  static constexpr bool kHasRegisters = !Traits::kIsFp8Cache && !(kSkips && Traits::kGroups == 3);
  static constexpr int kLastTiles = Traits::kUnits > 1 && kHasRegisters ? kTilesAhead : 0;

 public:
  static_assert(Traits::kIsFp8Cache || Traits::kLoadedStages == Traits::kStages,
                "tiles are computed where they are loaded");

  __device__ __forceinline__ Sm90Loader(const ManyRowsSm90Params& params, Memory& memory)
      : params_(params),
        p_(params.attention),
        g_(memory.geometry()),
        units_(params, memory),
        memory_(memory) {}

  // Arrivals that fill a tile: of the warp that starts the copy engine, or of all that copy.
  __device__ __forceinline__ static int tile_arrivals(const ManyRowsSm90Params& params) {
    return params.has_maps() ? 1 : kGroupThreads;
  }
  // And of those that copy query rows, and of the warp that describes the unit.
  __device__ __forceinline__ static int unit_arrivals(const ManyRowsSm90Params& params) {
    return (params.has_maps() ? kWarps - kBoxWarps : kWarps) * kWarpSize + 1;
  }

  // Each warp goes through the units at its own pace. Where all warps gather tiles, the one that
  // finds units does so before it gathers the last tiles of the unit before.
  __device__ __forceinline__ void run() {
    for (Place place;; ++place.n) {
      if (is_finding()) {
        // A search takes all registers that small heads leave: keep the place in shared memory.
        memory_.found_units = place.n;
        if constexpr (kSkips) put_aside();
        find_unit(place);
        asm volatile("" ::: "memory");
        place.n = memory_.found_units;
        if constexpr (kSkips) take_back();
      }
      if (!params_.has_maps()) {
        if (!gather_unit(place)) return;
        continue;
      }
      ptx::mbarrier_wait(address(memory_.unit_found[place.index()]), place.parity());
      Unit& unit = memory_.units[place.index()];
      if (warp() >= kBoxWarps) {
        copy_queries(unit, place, warp() - kBoxWarps, kWarps - kBoxWarps);
        describe_groups(unit, place);
      } else if (warp() == 0) {
        load_boxes(unit, params_.k, memory_.loaded_k(), address(memory_.unit_wanted));
      } else {
        load_boxes(unit, params_.v, memory_.loaded_v(), 0);
      }
      if (!unit.exists) return;
      leave_unit(place);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }
  // Unsigned before it is divided: that takes fewer instructions.
  __device__ __forceinline__ static uint32_t thread() {
    return fresh_thread() - Traits::kComputeThreads;
  }
  __device__ __forceinline__ static int warp() { return thread() / kWarpSize; }
  __device__ __forceinline__ static int lane() { return uint32_t(fresh_thread()) % kWarpSize; }
  __device__ __forceinline__ static bool is_finding() { return warp() == kFindingWarp; }
  __device__ __forceinline__ bool is_ragged() const { return p_.pages.is_ragged(); }

  __device__ __forceinline__ void leave_unit(const Place& place) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_empty[place.index()]));
  }

  // Gather the last tiles of the unit before the one in a place, then that one's query rows and
  // other tiles. False if there is none in the place.
  __device__ __forceinline__ bool gather_unit(const Place& place) {
#pragma unroll 1
    for (int is_this = !has_last_tiles_; is_this < 2; ++is_this) {
      // Found from the place in each turn: left to itself the compiler keeps both units' places.
      Place at = place;
      if constexpr (kLastTiles > 0) asm volatile("" : "+r"(at.n));
      if (!is_this) --at.n;
      Unit& unit = memory_.units[at.index()];
      int first = kLastTiles, last = 0;
      if (is_this) {
        ptx::mbarrier_wait(address(memory_.unit_found[at.index()]), at.parity());
        copy_queries(unit, at, warp(), kWarps);
        describe_groups(unit, at);
        if (!unit.exists) return false;
        first = unit.num_tiles;
        has_last_tiles_ = kLastTiles > 0 && first > kLastTiles;
        if (has_last_tiles_) last = kLastTiles + 1;
      }
      gather_tiles(unit, first, last);
      if (last == 0) leave_unit(at);
    }
    return true;
  }

  // What a warp knows of the line of tiles, where it tells itself of rows to copy.
  __device__ __forceinline__ uint64_t& aside() const {
    return memory_.copied_rows[warp()][0][lane()];
  }
  __device__ __forceinline__ void put_aside() const {
    __syncwarp();
    aside() = uint64_t{tile_.n} << 1 | uint64_t{has_last_tiles_};
  }
  __device__ __forceinline__ void take_back() {
    const uint64_t known = aside();
    tile_.n = static_cast<uint32_t>(known >> 1);
    has_last_tiles_ = kLastTiles > 0 && known & 1;
  }

  // Find the unit for a place as soon as that is free and, so that it goes to the block that needs
  // it first, not long before the one at hand ends.
  __device__ __forceinline__ void find_unit(const Place& place) const {
    if (lane() == 0) {
      if (params_.has_maps() && place.n > 0) {
        ptx::mbarrier_wait(address(memory_.unit_wanted), (place.n - 1) % 2);
      }
      ptx::mbarrier_wait(address(memory_.unit_empty[place.index()]), place.empty_parity());
      units_.next();
      if constexpr (!kSkips) ptx::mbarrier_arrive(address(memory_.unit_found[place.index()]));
    }
    __syncwarp();
    if constexpr (kSkips) {
      units_.list_seen_tiles(memory_.units[place.index()]);
      if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_found[place.index()]));
      __syncwarp();
    }
  }

  // While the query rows are on their way.
  __device__ __forceinline__ void describe_groups(Unit& unit, const Place& place) const {
    if (!is_finding()) return;
    if (lane() < Traits::kGroups && unit.exists) units_.describe_group(unit, lane());
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_full[place.index()]));
  }

  // Start copying query rows of a unit, as warp `rank` of `num_warps` that do so.
  __device__ __forceinline__ void copy_queries(const Unit& unit, const Place& place, int rank,
                                               int num_warps) {
    if (unit.exists) {
      const Q* q = static_cast<const Q*>(p_.q);
#pragma unroll 1
      for (int i = rank * kWarpSize; i < Traits::kUnitRows; i += num_warps * kWarpSize) {
        // Rows past the last one may be any: nobody writes what comes of them.
        const int in_tile = min(unit.first_row + i + lane(), unit.item.piece.num_rows - 1);
        const int qo_idx = tile_token(unit.item, in_tile);
        const int head = unit.item.piece.kv_head * g_.group_size + unit.item.first_head + in_tile -
                         (qo_idx - unit.item.first_token) * g_.group_size;
        share_rows(0, q + query_row(p_, unit.item.piece, qo_idx) * p_.q_row_stride +
                          head * p_.q_head_stride);
        copy_rows<typename Traits::QueryBlocks, Traits::kQk* int(sizeof(Q)), kWarpSize>(
            0, ptx::shared_address(memory_.q[place.index()][i / kGroupRows]) +
                   Traits::QueryBlocks::offset(i % kGroupRows, 0));
      }
    }
    ptx::mbarrier_arrive_after_copies(address(memory_.unit_full[place.index()]));
  }

  // The id of the page that holds a token, which is one of the unit. pages: of its request.
  __device__ __forceinline__ int find_page(const Unit& unit, const int32_t* pages,
                                           int token) const {
    const int page = params_.page_size(token);
    return pages != nullptr ? pages[page] : p_.pages.indptr[unit.item.piece.request] + page;
  }
  __device__ __forceinline__ int token_in_page(int token) const {
    return token - static_cast<int>(params_.page_size(token)) * p_.pages.page_size;
  }

  // Tiles that remain besides where tiles are left out: stages that small ones have more, and what
  // is computed while a warp looks at as many tiles as the unit has.
  __device__ __forceinline__ static int more_tiles_ahead(const Unit& unit) {
    if constexpr (!kSkips) return 0;
    const int num_tokens = unit.tokens.end - unit.first_token;
    return Traits::kStages - kTilesAhead + num_tokens / (Traits::kTokens * kLookedAtMeanwhile);
  }
  __device__ __forceinline__ static void want_unit(uint32_t wanted) {
    if (wanted != 0 && lane() == 0) ptx::mbarrier_arrive(wanted);
  }

  // A warp loads the tiles of K or V, each lane at most one box of a tile; page ids are read a tile
  // ahead. The one of K arrives at the barrier `wanted`, if there is one, when the next unit is.
  //
  // All blocks begin at once, and what they ask for at once arrives at once. So the block's first
  // tile of K, which is needed first, comes before all others.
  template <class Ring>
  __device__ __forceinline__ void load_boxes(const Unit& unit, const Sm90Cache& cache,
                                             const Ring& ring, uint32_t wanted) {
    using Tile = typename Ring::Tile;
    if (!unit.exists) return;
    constexpr bool kHasAllParts = Tile::kBoxParts > 1;
    // Boxes count tokens part by part, or of all parts at once.
    const uint32_t tokens_before = lane() * cache.box_tokens;
    const int part = tokens_before / Traits::kTokens * Tile::kBoxParts;
    const int first = tokens_before % Traits::kTokens;
    const int head = unit.item.piece.kv_head;
    const uint32_t offset = Tile::Blocks::offset(first, part * Tile::Blocks::Rows::kChunks);
    const int32_t* pages = p_.pages.pages_of(unit.item.piece.request);
    // Boxes past the last token or before the first, and those that nobody sees, are outside of the
    // map, which makes them zeros.
    const auto page_of = [&](int tile) {
      const int token = unit.tile_token(tile) + first;
      if (token >= unit.tokens.end || token + cache.box_tokens <= unit.tokens.begin) return -1;
      if (!unit.seen_tile(tile).has(first, cache.box_tokens)) return -1;
      return is_ragged() ? 0 : find_page(unit, pages, token);
    };
    int n = unit.num_tiles - 1;
    const int tiles_ahead = min(n, kTilesAhead + more_tiles_ahead(unit));
    if (n < 0) want_unit(wanted);
    int next_page = n < 0 ? 0 : page_of(n);
#pragma unroll 1
    for (; n >= 0; --n) {
      const int page = next_page;
      if (n == tiles_ahead) want_unit(wanted);
      if (n > 0) next_page = page_of(n - 1);
      const int token = unit.tile_token(n) + first;
      const int row =
          is_ragged() ? p_.pages.indptr[unit.item.piece.request] + token : token_in_page(token);
      ptx::BoxPlace at = {part * Tile::kColumns, row, 0, head, page};
      if constexpr (kHasAllParts) {
        at = {0, is_ragged() ? row : 0, head * cache.head_parts, is_ragged() ? 0 : row / kBlockRows,
              page};
      }
      const int stage = tile_.index();
      const uint32_t barrier = address(ring.full[stage]);
      const bool is_first_key = wanted != 0 && tile_.n == 0;
      if (wanted == 0 && tile_.n == 0) {
        ptx::named_barrier_sync<2 * kWarpSize>(kFirstKeysBarrier);
      }
      ptx::mbarrier_wait(address(ring.empty[stage]), tile_.empty_parity());
      if (lane() == 0) ptx::mbarrier_arrive_expect_bytes(barrier, Tile::kBytes);
      if (part < Tile::kParts) {
        ptx::tma_load_5d(ptx::shared_address(ring.tiles[stage]) + offset, cache.map, barrier, at);
      }
      __syncwarp();
      if (is_first_key) {
        ptx::mbarrier_wait(barrier, tile_.parity());
        ptx::named_barrier_arrive<2 * kWarpSize>(kFirstKeysBarrier);
      }
      ++tile_.n;
    }
  }

  // All warps copy tiles row by row, each its own rows, in the steps `first` to `last`, from
  // num_tiles down to 0 in all. Where rows of K and V lie is found out at once, and page ids are
  // read a tile before that. K is kKeysAhead tiles ahead of V: it is wanted a step earlier, and its
  // place is free a step earlier, but where both are to be widened.
  __device__ __forceinline__ void gather_tiles(const Unit& unit, int first, int last) {
    const int32_t* pages = p_.pages.pages_of(unit.item.piece.request);
    int page = first > 0 ? find_page(unit, pages, gathered_token(unit, first - 1)) : 0;
#pragma unroll 1
    for (int n = first; n >= last; --n) {
      if (n > 0) {
        share_token(unit, n - 1, page);
        if (n > 1) page = find_page(unit, pages, gathered_token(unit, n - 2));
        const TilePlace key_tile = {tile_.n + (n < unit.num_tiles ? Traits::kKeysAhead : 0)};
        gather_rows<Traits::kQk>(0, key_tile, memory_.loaded_k());
      }
      const int value_tile = n - 1 + Traits::kKeysAhead;
      if (value_tile >= 0 && value_tile < unit.num_tiles) {
        gather_rows<Traits::kVo>(value_set(value_tile), tile_, memory_.loaded_v());
        ++tile_.n;
      }
    }
  }

  // The set of copied_rows that a tile of V has.
  __device__ __forceinline__ static int value_set(int tile) {
    return 1 + tile % (1 + Traits::kKeysAhead);
  }
  // Tell the warp where K and V of this lane's token of a tile lie, on the page that holds it.
  __device__ __forceinline__ void share_token(const Unit& unit, int tile, int page) const {
    const int in_page = token_in_page(gathered_token(unit, tile));
    const auto row = [&](const void* cache, const KvStrides& strides) {
      return static_cast<const Kv*>(cache) + unit.item.piece.kv_head * strides.head +
             page * strides.page + in_page * strides.token;
    };
    share_rows(0, row(p_.k_cache, p_.k_strides));
    share_rows(value_set(tile), row(p_.v_cache, p_.v_strides));
  }

  // The token that this lane looks up for its warp: the unit's last one stands in for those past
  // its end, and one that is seen for those that nobody sees.
  __device__ __forceinline__ int gathered_token(const Unit& unit, int tile) const {
    const auto in_unit = [&](int token) {
      return max(min(token, unit.tokens.end - 1), unit.tokens.begin);
    };
    const auto seen = unit.seen_tile(tile);
    const int in_tile =
        seen.index() * Traits::kTokens + warp() * kGatherRows + lane() % kGatherRows;
    const int token = in_unit(unit.first_token + in_tile);
    if constexpr (kSkips) {
      const int begin = unit.first_token + seen.index() * Traits::kTokens;
      if (!seen.has(token - begin, kSeenChunk)) return in_unit(begin + seen.first_seen());
    }
    return token;
  }

  // Start copying this warp's rows of a tile once its place is empty.
  template <int kDim, class Ring>
  __device__ __forceinline__ void gather_rows(int set, const TilePlace& place, const Ring& ring) {
    using Blocks = typename Ring::Tile::Blocks;
    const int stage = place.index();
    ptx::mbarrier_wait(address(ring.empty[stage]), place.empty_parity());
    copy_rows<Blocks, kDim* int(sizeof(Kv)), kGatherRows>(
        set, ptx::shared_address(ring.tiles[stage]) + Blocks::offset(warp() * kGatherRows, 0));
    ptx::mbarrier_arrive_after_copies(address(ring.full[stage]));
  }

  // Tell the warp where row i lies, which lane i knows: lanes know other rows than they copy, and
  // through shared memory that takes fewer instructions than with shuffles.
  __device__ __forceinline__ void share_rows(int set, const void* row) const {
    __syncwarp();
    memory_.copied_rows[warp()][set][lane()] = reinterpret_cast<uint64_t>(row);
    __syncwarp();
  }

  // Start copying kRows rows of kBytes, a multiple of 8, of a set that share_rows() told of. Some
  // lanes copy a row, a part at a time; every kPlaces rows of a lane have the same place in a
  // block.
  template <class Blocks, int kBytes, int kRows>
  __device__ __forceinline__ void copy_rows(int set, uint32_t to) const {
    using Rows = typename Blocks::Rows;
    constexpr int kLanes = Rows::kChunks;
    constexpr int kRowsAtOnce = kWarpSize / kLanes;
    constexpr int kPlaces = kBlockRows / kRowsAtOnce;
    // Rows of a lane whose addresses are loaded at once.
    constexpr int kMost = Traits::kLoadRegisters >= 56 ? 8 : kBytes <= 384 ? 4 : 2;
    constexpr int kInFlight = kMost < kRows / kRowsAtOnce ? kMost : kRows / kRowsAtOnce;
    const uint32_t lane_row = lane() / kLanes, lane_chunk = lane() % kLanes;
    const uint64_t* rows = memory_.copied_rows[warp()][set] + lane_row;
    uint32_t places[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      places[i] = to + Rows::offset(lane_row + i * kRowsAtOnce, lane_chunk);
    }
#pragma unroll
    for (int first = 0; first < kRows / kRowsAtOnce; first += kInFlight) {
      uint64_t from[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) from[i] = rows[(first + i) * kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        from[i] += lane_chunk * kChunkBytes;
        const uint32_t row_place = places[i % kPlaces] + (first + i) / kPlaces * Blocks::kNextRows;
#pragma unroll
        for (int part = 0; part * Rows::kRowBytes < kBytes; ++part) {
          if (part * kLanes + int(lane_chunk) >= kBytes / kChunkBytes) continue;
          ptx::cp_async_16(row_place + part * Blocks::kNextColumns,
                           reinterpret_cast<const void*>(from[i] + part * Rows::kRowBytes));
        }
      }
    }
  }

  const ManyRowsSm90Params& params_;
  const AttentionParams& p_;
  const WorkGeometry& g_;
  const Sm90Units<Traits> units_;
  Memory& memory_;
  TilePlace tile_;
  bool has_last_tiles_ = false;  // of the unit before, which are still to be gathered
};

}  // namespace fi
