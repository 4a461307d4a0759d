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
  using Q = typename Traits::Q;

 public:
  __device__ __forceinline__ Sm90Loader(const ManyRowsSm90Params& params, Memory& memory)
      : params_(params),
        p_(params.attention),
        g_(*reinterpret_cast<const WorkGeometry*>(params.attention.plan)),
        memory_(memory) {}

  // Arrivals that fill a tile: of the thread that starts the copy engine, or of all that copy.
  __device__ __forceinline__ static int tile_arrivals(const ManyRowsSm90Params& params) {
    return params.box_tokens > 0 ? 1 : kGroupThreads;
  }

  // Each warp goes through the units at its own pace.
  __device__ __forceinline__ void run() {
    const Sm90Units<Traits> units(params_, memory_);
    if (warp() == kFindingWarp && lane() == 0) units.start();
    for (FixedRingPlace<Traits::kUnits> place;; ++place.n) {
      Sm90Unit& unit = memory_.units[place.index()];
      if (warp() == kFindingWarp) find_unit(units, unit, place);
      ptx::mbarrier_wait(address(memory_.unit_found[place.index()]), place.parity());
      const uint32_t full = address(memory_.unit_full[place.index()]);
      if (!unit.exists) {
        ptx::mbarrier_arrive(full);
        return;
      }
      if (params_.box_tokens == 0) {
        copy_queries(unit, place.index(), warp() * kWarpSize, kWarpSize);
        gather_tiles(unit, full);
      } else if (warp() >= kBoxWarps) {
        copy_queries(unit, place.index(), (warp() - kBoxWarps) * kGroupRows, kGroupRows);
        finish_copies<0>(full);
      } else {
        ptx::mbarrier_arrive(full);
        if (warp() == 0) {
          load_boxes<Traits::kQkParts>(unit, params_.k_map, memory_.k, memory_.k_full,
                                       memory_.k_empty, address(memory_.unit_wanted));
        } else {
          load_boxes<Traits::kVoParts>(unit, params_.v_map, memory_.v, memory_.v_full,
                                       memory_.v_empty, 0);
        }
      }
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_empty[place.index()]));
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }
  __device__ __forceinline__ static int thread() { return fresh_thread() - kComputeThreads; }
  __device__ __forceinline__ static int warp() { return thread() / kWarpSize; }
  __device__ __forceinline__ static int lane() { return fresh_thread() % kWarpSize; }
  __device__ __forceinline__ bool is_ragged() const {
    return p_.pages.indices == nullptr && p_.pages.block_table == nullptr;
  }

  // Find the next unit as soon as there is a place for it and, so that it goes to the block that
  // needs it first, not long before the one at hand ends.
  __device__ __forceinline__ void find_unit(const Sm90Units<Traits>& units, Sm90Unit& unit,
                                            const FixedRingPlace<Traits::kUnits>& place) const {
    if (lane() == 0) {
      if (params_.box_tokens > 0 && place.n > 0) {
        ptx::mbarrier_wait(address(memory_.unit_wanted), (place.n - 1) % 2);
      }
      ptx::mbarrier_wait(address(memory_.unit_empty[place.index()]), place.empty_parity());
      units.next(unit);
      ptx::mbarrier_arrive(address(memory_.unit_found[place.index()]));
    }
    __syncwarp();
  }

  // Start copying query rows [first, first + count) of a unit, by this warp; those that do not
  // exist become zeros.
  __device__ __forceinline__ void copy_queries(const Sm90Unit& unit, int place, int first,
                                               int count) const {
    const Q* q = static_cast<const Q*>(p_.q) + unit.item.piece.qo_begin * p_.q_row_stride;
#pragma unroll 1
    for (int i = first; i < first + count; i += kWarpSize) {
      const int in_tile = unit.first_row + i + lane();
      const bool exists = in_tile < unit.item.piece.num_rows;
      const LogitRow row = tile_row(p_, g_, unit.item, exists ? in_tile : 0);
      const Q* from = q + row.qo_idx * p_.q_row_stride + row.head * p_.q_head_stride;
      copy_rows<Traits::kQk, kWarpSize>(exists ? from : nullptr, memory_.q[place][i / kGroupRows],
                                        i % kGroupRows, Traits::kGroupPartBytes);
    }
    ptx::cp_async_commit();
  }

  // The id of the page that holds a token; < 0 where the unit has no such token.
  __device__ __forceinline__ int find_page(const Sm90Unit& unit, int token) const {
    if (token >= unit.tokens.end) return -1;
    const int page = static_cast<uint32_t>(token) / static_cast<uint32_t>(p_.pages.page_size);
    const int32_t request = unit.item.piece.request;
    const int32_t* pages = p_.pages.pages_of(request);
    return pages != nullptr ? pages[page] : p_.pages.indptr[request] + page;
  }
  __device__ __forceinline__ int token_in_page(int token) const {
    return static_cast<uint32_t>(token) % static_cast<uint32_t>(p_.pages.page_size);
  }

  static constexpr int kBoxWarps = 2;  // one starts copies of K, the other of V
  static constexpr int kFindingWarp = kBoxWarps;
  static constexpr int kTilesAhead = 2;  // that remain to be loaded when the next unit is wanted

  __device__ __forceinline__ static void want_unit(uint32_t wanted) {
    if (wanted != 0 && lane() == 0) ptx::mbarrier_arrive(wanted);
  }

  // A warp loads the tiles of K or V, each lane at most one box of a tile; page ids are read a tile
  // ahead. One arrives at the barrier `wanted`, if there is one, when the next unit is.
  template <int kParts, int kTileBytes>
  __device__ __forceinline__ void load_boxes(const Sm90Unit& unit, const TensorMap& map,
                                             uint8_t (&tiles)[Traits::kStages][kTileBytes],
                                             uint64_t (&full)[Traits::kStages],
                                             uint64_t (&empty)[Traits::kStages], uint32_t wanted) {
    const int num_boxes = Traits::kTokens / params_.box_tokens;  // in a part
    const int part = lane() / num_boxes;
    const int first = lane() % num_boxes * params_.box_tokens;  // token of the box in its tile
    const auto token_of = [&](int tile) {
      return unit.first_token + tile * Traits::kTokens + first;
    };
    int n = unit.num_tiles - 1;
    const int tiles_ahead = min(n, kTilesAhead);
    if (n < 0) want_unit(wanted);
    int next_page = n < 0 || is_ragged() ? 0 : find_page(unit, token_of(n));
#pragma unroll 1
    for (; n >= 0; --n) {
      const int page = next_page;
      if (n == tiles_ahead) want_unit(wanted);
      if (n > 0 && !is_ragged()) next_page = find_page(unit, token_of(n - 1));
      const int row = is_ragged() ? p_.pages.indptr[unit.item.piece.request] + token_of(n)
                                  : token_in_page(token_of(n));
      const int stage = tile_.index();
      const uint32_t barrier = address(full[stage]);
      ptx::mbarrier_wait(address(empty[stage]), tile_.empty_parity());
      if (lane() == 0) ptx::mbarrier_arrive_expect_bytes(barrier, kTileBytes);
      if (part < kParts) {
        const uint32_t offset = part * Traits::kPartBytes + first * PartRows::kRowBytes;
        ptx::tma_load_4d(ptx::shared_address(tiles[stage]) + offset, map, barrier,
                         part * kPartColumns, row, unit.item.piece.kv_head, page);
      }
      __syncwarp();
      ++tile_.n;
    }
  }

  // All warps copy the tiles row by row, each its own rows: lane l looks token l of them up. What a
  // barrier in `pending` waits for is copied before; it arrives once the copies after it are under
  // way.
  __device__ __forceinline__ void gather_tiles(const Sm90Unit& unit, uint32_t pending) {
    int n = unit.num_tiles - 1;
    const auto token_of = [&](int tile) {
      return unit.first_token + tile * Traits::kTokens + warp() * kGatherRows +
             lane() % kGatherRows;
    };
    int next_page = n < 0 ? 0 : find_page(unit, token_of(n));
#pragma unroll 1
    for (; n >= 0; --n) {
      const int page = next_page;
      if (n > 0) next_page = find_page(unit, token_of(n - 1));
      const int in_page = token_in_page(token_of(n));
      const int stage = tile_.index();
      const int head = unit.item.piece.kv_head;
      ptx::mbarrier_wait(address(memory_.k_empty[stage]), tile_.empty_parity());
      gather_rows<Traits::kQk>(p_.k_cache, p_.k_strides, head, page, in_page, memory_.k[stage]);
      ptx::cp_async_commit();
      finish_copies<1>(pending);
      pending = address(memory_.k_full[stage]);
      ptx::mbarrier_wait(address(memory_.v_empty[stage]), tile_.empty_parity());
      gather_rows<Traits::kVo>(p_.v_cache, p_.v_strides, head, page, in_page, memory_.v[stage]);
      ptx::cp_async_commit();
      finish_copies<1>(pending);
      pending = address(memory_.v_full[stage]);
      ++tile_.n;
    }
    finish_copies<0>(pending);
  }

  // Wait for all but the latest kPending groups of copies and tell who needs them.
  template <int kPending>
  __device__ __forceinline__ static void finish_copies(uint32_t barrier) {
    ptx::cp_async_wait<kPending>();
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(barrier);
  }

  static constexpr int kGatherRows = Traits::kTokens / (kGroupThreads / kWarpSize);  // of a warp

  // Start copying this warp's rows of a tile; rows without a page become zeros.
  template <int kDim>
  __device__ __forceinline__ void gather_rows(const void* cache, const KvStrides& strides, int head,
                                              int page, int in_page, uint8_t* to) const {
    const Q* row = static_cast<const Q*>(cache) + head * strides.head + page * strides.page +
                   in_page * strides.token;
    copy_rows<kDim, kGatherRows>(page < 0 ? nullptr : row, to, warp() * kGatherRows,
                                 Traits::kPartBytes);
  }

  // Start copying kRows rows to those from first_row on, row i from the address that lane i has;
  // where that is nullptr the row becomes zeros.
  template <int kDim, int kRows>
  __device__ __forceinline__ static void copy_rows(const Q* row, uint8_t* to, int first_row,
                                                   int part_bytes) {
    constexpr int kChunks = kDim / 8;
    const auto row_address = reinterpret_cast<unsigned long long>(row);
    const uint32_t tile = ptx::shared_address(to);
#pragma unroll 4
    for (int n = lane(); n < kRows * kChunks; n += kWarpSize) {
      const int r = n / kChunks, chunk = n % kChunks;
      const auto from = __shfl_sync(kFullWarp, row_address, r);
      ptx::cp_async_16(tile + chunk / PartRows::kChunks * part_bytes +
                           PartRows::offset(first_row + r, chunk % PartRows::kChunks),
                       reinterpret_cast<const void*>(from + chunk * kChunkBytes), from != 0);
    }
  }

  const ManyRowsSm90Params& params_;
  const AttentionParams& p_;
  const WorkGeometry& g_;
  Memory& memory_;
  FixedRingPlace<Traits::kStages> tile_;
};

}  // namespace fi
