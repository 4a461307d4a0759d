// The warpgroup that loads: it finds units of work, copies their query rows, and keeps the rings of
// K and V tiles full.
//
// Tiles of a unit are computed from the last one to the first. The copy engine brings them box by
// box where pages are multiples of its boxes; elsewhere all warps copy them row by row.
#pragma once

#include <fi_backend/attention/many_rows_sm90_units.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/cp_async.cuh>
#include <fi_backend/ptx/tma.cuh>

namespace fi {

template <class Traits>
class Sm90Loader {
  using Memory = Sm90Memory<Traits>;
  using Place = FixedRingPlace<Traits::kUnits>;
  using Q = typename Traits::Q;
  static constexpr int kWarps = kGroupThreads / kWarpSize;
  static constexpr int kBoxWarps = 2;  // one starts copies of K, the other of V
  static constexpr int kFindingWarp = kBoxWarps;
  static constexpr int kTilesAhead = 2;  // that remain to be loaded when the next unit is wanted
  static constexpr int kGatherRows = Traits::kTokens / kWarps;  // of a warp

 public:
  __device__ __forceinline__ Sm90Loader(const ManyRowsSm90Params& params, Memory& memory)
      : params_(params),
        p_(params.attention),
        g_(memory.geometry()),
        units_(params, memory),
        memory_(memory) {}

  // Arrivals that fill a tile: of the warp that starts the copy engine, or of all that copy.
  __device__ __forceinline__ static int tile_arrivals(const ManyRowsSm90Params& params) {
    return params.has_maps() ? 1 : kWarps;
  }
  // And of those that copy query rows.
  __device__ __forceinline__ static int unit_arrivals(const ManyRowsSm90Params& params) {
    return params.has_maps() ? kWarps - kBoxWarps : kWarps;
  }

  // Each warp goes through the units at its own pace.
  __device__ __forceinline__ void run() {
    for (Place place;; ++place.n) {
      if (is_finding()) {
        // A search takes all registers that small heads leave: keep the place in shared memory.
        memory_.found_units = place.n;
        find_unit(place);
        asm volatile("" ::: "memory");
        place.n = memory_.found_units;
      }
      ptx::mbarrier_wait(address(memory_.unit_found[place.index()]), place.parity());
      Sm90Unit& unit = memory_.units[place.index()];
      if (!params_.has_maps()) {
        copy_queries(unit, place, warp(), kWarps);
        describe_groups(unit);
        gather_tiles(unit);
      } else if (warp() >= kBoxWarps) {
        copy_queries(unit, place, warp() - kBoxWarps, kWarps - kBoxWarps);
        describe_groups(unit);
        announce<0>();
      } else if (warp() == 0) {
        load_boxes<typename Traits::KTile>(unit, params_.k, memory_.k, memory_.k_full,
                                           memory_.k_empty, address(memory_.unit_wanted));
      } else {
        load_boxes<typename Traits::VTile>(unit, params_.v, memory_.v, memory_.v_full,
                                           memory_.v_empty, 0);
      }
      if (!unit.exists) return;
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_empty[place.index()]));
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }
  __device__ __forceinline__ static int thread() {
    return fresh_thread() - Traits::kComputeThreads;
  }
  __device__ __forceinline__ static int warp() { return thread() / kWarpSize; }
  __device__ __forceinline__ static int lane() { return fresh_thread() % kWarpSize; }
  __device__ __forceinline__ static bool is_finding() { return warp() == kFindingWarp; }
  __device__ __forceinline__ bool is_ragged() const {
    return p_.pages.indices == nullptr && p_.pages.block_table == nullptr;
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
      ptx::mbarrier_arrive(address(memory_.unit_found[place.index()]));
    }
    __syncwarp();
  }

  // While the query rows are on their way, with which this is announced.
  __device__ __forceinline__ void describe_groups(Sm90Unit& unit) const {
    if (is_finding() && lane() < Traits::kGroups && unit.exists) {
      units_.describe_group(unit, lane());
    }
  }

  // Start copying query rows of a unit, as warp `rank` of `num_warps` that do so.
  __device__ __forceinline__ void copy_queries(const Sm90Unit& unit, const Place& place, int rank,
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
        copy_rows<typename Traits::QueryBlocks, Traits::kQk, kWarpSize>(
            q + query_row(p_, unit.item.piece, qo_idx) * p_.q_row_stride + head * p_.q_head_stride,
            memory_.q[place.index()][i / kGroupRows], i % kGroupRows);
      }
    }
    end_copies(memory_.unit_full[place.index()]);
  }

  // This warp has started the last of its copies to what `full` guards.
  __device__ __forceinline__ void end_copies(const uint64_t& full) {
    ptx::cp_async_commit();
    announce<1>();
    copied_ = address(full);
  }
  // Wait for the copies that end_copies() ended last, after which kLater others were ended, make
  // them known to wgmma and arrive. Callers do so before they wait for anybody else.
  template <int kLater>
  __device__ __forceinline__ void announce() {
    if (copied_ == 0) return;
    ptx::cp_async_wait<kLater>();
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(copied_);
    copied_ = 0;
  }

  // The id of the page that holds a token, which is one of the unit.
  __device__ __forceinline__ int find_page(const Sm90Unit& unit, int token) const {
    const int page = params_.page_size(token);
    const int32_t request = unit.item.piece.request;
    const int32_t* pages = p_.pages.pages_of(request);
    return pages != nullptr ? pages[page] : p_.pages.indptr[request] + page;
  }
  __device__ __forceinline__ int token_in_page(int token) const {
    return token - static_cast<int>(params_.page_size(token)) * p_.pages.page_size;
  }

  __device__ __forceinline__ static void want_unit(uint32_t wanted) {
    if (wanted != 0 && lane() == 0) ptx::mbarrier_arrive(wanted);
  }

  // A warp loads the tiles of K or V, each lane at most one box of a tile; page ids are read a tile
  // ahead. One arrives at the barrier `wanted`, if there is one, when the next unit is.
  template <class Tile>
  __device__ __forceinline__ void load_boxes(const Sm90Unit& unit, const Sm90Cache& cache,
                                             uint8_t (&tiles)[Traits::kStages][Tile::kBytes],
                                             uint64_t (&full)[Traits::kStages],
                                             uint64_t (&empty)[Traits::kStages], uint32_t wanted) {
    if (!unit.exists) return;
    constexpr bool kHasAllParts = Tile::kBoxParts > 1;
    const int num_boxes = Traits::kTokens / cache.box_tokens;  // of a part, or of all parts
    const int part = lane() / num_boxes * Tile::kBoxParts;
    const int first = lane() % num_boxes * cache.box_tokens;  // token of the box in its tile
    const int head = unit.item.piece.kv_head;
    const uint32_t offset = Tile::Blocks::offset(first, part * PartRows::kChunks);
    // Boxes past the last token are outside of the map, which makes them zeros.
    const auto page_of = [&](int tile) {
      const int token = unit.first_token + tile * Traits::kTokens + first;
      if (token >= unit.tokens.end) return -1;
      return is_ragged() ? 0 : find_page(unit, token);
    };
    int n = unit.num_tiles - 1;
    const int tiles_ahead = min(n, kTilesAhead);
    if (n < 0) want_unit(wanted);
    int next_page = n < 0 ? 0 : page_of(n);
#pragma unroll 1
    for (; n >= 0; --n) {
      const int page = next_page;
      if (n == tiles_ahead) want_unit(wanted);
      if (n > 0) next_page = page_of(n - 1);
      const int token = unit.first_token + n * Traits::kTokens + first;
      const int row =
          is_ragged() ? p_.pages.indptr[unit.item.piece.request] + token : token_in_page(token);
      ptx::BoxPlace at = {part * kPartColumns, row, 0, head, page};
      if constexpr (kHasAllParts) {
        at = {0, is_ragged() ? row : 0, head * cache.head_parts, is_ragged() ? 0 : row / kBlockRows,
              page};
      }
      const int stage = tile_.index();
      const uint32_t barrier = address(full[stage]);
      ptx::mbarrier_wait(address(empty[stage]), tile_.empty_parity());
      if (lane() == 0) ptx::mbarrier_arrive_expect_bytes(barrier, Tile::kBytes);
      if (part < Tile::kParts) {
        ptx::tma_load_5d(ptx::shared_address(tiles[stage]) + offset, cache.map, barrier, at);
      }
      __syncwarp();
      ++tile_.n;
    }
  }

  // All warps copy the tiles row by row, each its own rows: lane l looks token l of them up. The
  // unit's last tokens stand in for those past its end. K is a tile ahead of V: it is wanted a step
  // earlier, and its place is free a step earlier.
  __device__ __forceinline__ void gather_tiles(const Sm90Unit& unit) {
    int n = unit.exists ? unit.num_tiles - 1 : -1;
    int page = n < 0 ? 0 : find_page(unit, gathered_token(unit, n));  // of this lane's token
    int next_page = n < 1 ? 0 : find_page(unit, gathered_token(unit, n - 1));
    if (n >= 0) gather_keys(unit, n, page, tile_);
#pragma unroll 1
    for (; n >= 0; --n) {
      const int this_page = page;
      page = next_page;
      if (n > 1) next_page = find_page(unit, gathered_token(unit, n - 2));
      if (n > 0) gather_keys(unit, n - 1, page, {tile_.n + 1});
      const int stage = tile_.index();
      gather_rows<typename Traits::VTile, Traits::kVo>(
          unit, n, this_page, p_.v_cache, p_.v_strides, tile_, memory_.v[stage],
          memory_.v_full[stage], memory_.v_empty[stage]);
      ++tile_.n;
    }
    announce<0>();
  }

  __device__ __forceinline__ int gathered_token(const Sm90Unit& unit, int tile) const {
    const int in_tile = tile * Traits::kTokens + warp() * kGatherRows + lane() % kGatherRows;
    return min(unit.first_token + in_tile, unit.tokens.end - 1);
  }

  __device__ __forceinline__ void gather_keys(const Sm90Unit& unit, int n, int page,
                                              const FixedRingPlace<Traits::kStages>& place) {
    const int stage = place.index();
    gather_rows<typename Traits::KTile, Traits::kQk>(unit, n, page, p_.k_cache, p_.k_strides, place,
                                                     memory_.k[stage], memory_.k_full[stage],
                                                     memory_.k_empty[stage]);
  }

  // Start copying this warp's rows of tile n once its place is empty.
  template <class Tile, int kDim>
  __device__ __forceinline__ void gather_rows(const Sm90Unit& unit, int n, int page,
                                              const void* rows, const KvStrides& strides,
                                              const FixedRingPlace<Traits::kStages>& place,
                                              uint8_t* to, const uint64_t& full,
                                              const uint64_t& empty) {
    if (!__all_sync(kFullWarp, ptx::mbarrier_is_over(address(empty), place.empty_parity()))) {
      announce<0>();
      ptx::mbarrier_wait(address(empty), place.empty_parity());
    }
    const Q* row = static_cast<const Q*>(rows) + unit.item.piece.kv_head * strides.head +
                   page * strides.page + token_in_page(gathered_token(unit, n)) * strides.token;
    copy_rows<typename Tile::Blocks, kDim, kGatherRows>(row, to, warp() * kGatherRows);
    end_copies(full);
  }

  // Start copying kRows rows to those from first_row on, a multiple of 8; row i lies where lane i
  // says. Lanes know other rows than they copy: through shared memory that takes fewer instructions
  // than with shuffles. Eight lanes copy a row, 64 columns at a time.
  template <class Blocks, int kDim, int kRows>
  __device__ __forceinline__ void copy_rows(const Q* row, uint8_t* to, int first_row) const {
    constexpr int kChunks = kDim / 8;
    constexpr int kLanes = PartRows::kChunks;
    constexpr int kRowsAtOnce = kWarpSize / kLanes;
    constexpr int kInFlight =
        kDim <= 192 ? 4 : 2;  // rows of a lane whose addresses are loaded at once
    static_assert(kRows % (kRowsAtOnce * kInFlight) == 0, "none is left");
    uint64_t* rows = memory_.copied_rows[warp()];
    __syncwarp();
    rows[lane()] = reinterpret_cast<uint64_t>(row);
    __syncwarp();
    const uint32_t tile = ptx::shared_address(to) + Blocks::offset(first_row, 0);
    const int lane_row = lane() / kLanes, lane_chunk = lane() % kLanes;
#pragma unroll 1
    for (int first = lane_row; first < kRows; first += kRowsAtOnce * kInFlight) {
      uint64_t from[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) from[i] = rows[first + i * kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
        for (int part = 0; part < kChunks; part += kLanes) {
          const int chunk = part + lane_chunk;
          if (part + kLanes > kChunks && chunk >= kChunks) continue;
          ptx::cp_async_16(tile + Blocks::offset(first + i * kRowsAtOnce, chunk),
                           reinterpret_cast<const void*>(from[i] + chunk * kChunkBytes));
        }
      }
    }
  }

  const ManyRowsSm90Params& params_;
  const AttentionParams& p_;
  const WorkGeometry& g_;
  const Sm90Units<Traits> units_;
  Memory& memory_;
  FixedRingPlace<Traits::kStages> tile_;
  uint32_t copied_ = 0;  // the barrier of copies that have not been announced
};

}  // namespace fi
