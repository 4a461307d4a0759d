// The warps of the few-row kernel that copy: they walk over the worker's units and keep queries, K
// and V ahead of the warps that compute, across the borders of work items.
//
// After the K of a unit, one stage of that ring stays empty: there the other warps bring their
// accumulators together.
#pragma once

#include <fi_backend/attention/few_rows_params.cuh>
#include <fi_backend/attention/few_rows_seen.cuh>
#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/common/fresh_registers.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/cp_async.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>
#include <fi_backend/ptx/load_global.cuh>
#include <fi_backend/ptx/mbarrier.cuh>

namespace fi {

// Arrivals that fill a slot: the lanes' copies, and for a unit also what lane 0 writes; so it does
// for a stage of K where some are left out.
template <class Traits>
inline constexpr int kStageArrivals = Traits::kRingWarps * kWarpSize;
template <class Traits>
inline constexpr int kKeyStageArrivals = kStageArrivals<Traits> + (kSkipsStages<Traits> ? 1 : 0);
inline constexpr int kUnitArrivals = kWarpSize + 1;

template <class Traits>
class FewRowsCopies {
  using Shared = FewRowsShared<Traits>;
  using Q = typename Traits::Q;
  using Kv = typename Traits::Kv;
  static constexpr bool kSkips = kSkipsStages<Traits>;
  // Of a token for each lane, of those of a stage that a warp copies.
  static constexpr int kGroups = Traits::kCopiedTokens / kWarpSize;

 public:
  // `rings`: shared address of the first stage of K.
  __device__ __forceinline__ FewRowsCopies(const FewRowsParams& p, Shared& shared, uint32_t rings)
      : p_(p), a_(p.attention), shared_(shared), rings_(rings) {}

  // Team `index` of the `count` that share the workers.
  __device__ __forceinline__ void run(int32_t index, int32_t count) {
    constexpr int kGeometryInts = sizeof(WorkGeometry) / sizeof(int32_t);
    if (copies_units() && lane() < kGeometryInts) {
      reinterpret_cast<int32_t*>(&shared_.geometry)[lane()] =
          reinterpret_cast<const int32_t*>(p_.geometry)[lane()];
    }
    const WorkGeometry g = *p_.geometry;
    int32_t worker = index;
    WorkerRange range = load_worker_range(p_.starts, p_.cuts, p_.spans, worker);
    team_sync<Traits>();  // behind the barriers' set-up, which need not be done before
    if (g.split > 0 && p_.partials.chunks < kMaxChunks) __trap();
#pragma unroll 1
    while (true) {
      WorkUnits units(g, range, worker, Traits::kUnitRows, a_.qo_indptr, a_.kv_lens,
                      a_.first_pages);
#pragma unroll 1
      while (units.next()) {
        if constexpr (kSkips) {
          copy_seen(g, units);
        } else {
          copy_unit(g, units);
        }
      }
      worker += count;
      if (worker >= p_.num_workers) break;
      range = load_worker_range(p_.starts, p_.cuts, p_.spans, worker);
    }
    if (copies_units()) publish_end();
    // Not before: thread blocks of the next kernel would take the places of those that have nothing
    // to do, and so share fewer SMs among them.
    ptx::grid_dependency_launch();
  }

 private:
  // Where the pages of a piece's request are listed; table == nullptr: they are those from `first`
  // on.
  struct PageRow {
    const int32_t* table;
    int32_t first;
  };
  // Of the lane's token in each group of a stage.
  struct TokenPlaces {
    int32_t page_id[kGroups];
    int32_t offset[kGroups];  // in the page
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  // The share of this warp: first those that fill the ring of K, the first of which hands over the
  // units, then those that fill that of V.
  __device__ __forceinline__ static int copy_warp() {
    if constexpr (Traits::kCopyWarps == 1) return 0;
    return int((uint32_t(fresh_thread()) - Traits::kComputeThreads) / kWarpSize);
  }
  __device__ __forceinline__ static bool copies_units() { return copy_warp() == 0; }
  __device__ __forceinline__ static bool copies_keys() { return copy_warp() < Traits::kRingWarps; }
  __device__ __forceinline__ static bool copies_values() {
    return copy_warp() >= Traits::kCopyWarps - Traits::kRingWarps;
  }
  // Of a stage, the first token that this warp copies.
  __device__ __forceinline__ static int first_token() {
    return copy_warp() % Traits::kRingWarps * Traits::kCopiedTokens;
  }

  __device__ __forceinline__ PageRow pages_of(const WorkPiece& piece) const {
    const int32_t* table = a_.pages.pages_of(piece.request);
    if (table == nullptr) return {nullptr, a_.pages.indptr[piece.request]};
    return {table + piece.first_page, 0};
  }

  // Page ids, then queries, then tiles: in the order in which something waits for them.
  __device__ __forceinline__ void copy_unit(const WorkGeometry& g, const WorkUnits& units) {
    const int32_t begin = units.tokens().begin;
    const int32_t end = units.tokens().end;
    const PageRow pages = pages_of(units.piece());
    load_page_ids(pages, begin, end);
    if (copies_units()) copy_queries(g, units);
    const int head = units.piece().kv_head;
    int32_t token = begin;
    do {
      const TokenPlaces places = places_;
      load_page_ids(pages, token + Traits::kStageTokens, end);
      if (copies_keys() && token < end) {
        copy_stage<typename Traits::KRows>(keys_, kKeys, a_.k_cache, p_.k_strides, head, places,
                                           end - token);
      }
      if (copies_units() && token == begin) publish(units);
      if (copies_values() && token < end) {
        copy_stage<typename Traits::VRows>(values_, kValues, a_.v_cache, p_.v_strides, head, places,
                                           end - token);
      }
      token += Traits::kStageTokens;
    } while (token < end);
    if (copies_keys()) {
      begin_stage(keys_, kKeys);
      end_stage(keys_, kKeys, [](uint32_t barrier) { ptx::mbarrier_arrive(barrier); });
    }
  }

  // The same as copy_unit(), of the stages that some row of the unit sees.
  __device__ __forceinline__ void copy_seen(const WorkGeometry& g, const WorkUnits& units) {
    const int32_t end = units.tokens().end;
    const PageRow pages = pages_of(units.piece());
    const int head = units.piece().kv_head;
    SeenStages<Traits> stages(a_, g, units);
    SeenStage next = stages.take();
    load_seen_ids(pages, next, end);
    if (copies_units()) copy_queries(g, units);
    bool is_published = false;
    do {
      const SeenStage stage = next;
      const TokenPlaces places = places_;
      const bool exists = stage.token != SeenStage::kNone;
      if (exists) {
        next = stages.take();
        load_seen_ids(pages, next, end);
        if (copies_keys()) {
          tell_token(stage.token);
          copy_stage<typename Traits::KRows>(keys_, kKeys, a_.k_cache, p_.k_strides, head, places,
                                             end - stage.token);
        }
      }
      if (copies_units() && !is_published) publish(units);
      is_published = true;
      if (exists && copies_values()) {
        copy_stage<typename Traits::VRows>(values_, kValues, a_.v_cache, p_.v_strides, head, places,
                                           end - stage.token);
      }
    } while (next.token != SeenStage::kNone);
    if (copies_keys()) {
      tell_token(SeenStage::kNone);
      begin_stage(keys_, kKeys);
      end_stage(keys_, kKeys, [](uint32_t barrier) { ptx::mbarrier_arrive(barrier); });
    }
  }

  // Say what the next stage of K holds, as soon as it is free.
  __device__ __forceinline__ void tell_token(int32_t token) const {
    if (!copies_units() || lane() != 0) return;
    begin_stage(keys_, kKeys);
    shared_.stage_tokens.first[keys_.slot] = token;
    ptx::mbarrier_arrive(ptx::shared_address(&shared_.stage_barriers[kKeys][keys_.slot].full));
  }

  __device__ __forceinline__ void load_seen_ids(const PageRow& pages, const SeenStage& stage,
                                                int32_t end) {
    if (stage.token == SeenStage::kNone) return;
    load_page_ids(pages, stage.token, end, [&](int32_t mine) { return stage.stand_in(mine, end); });
  }

  // Find the places of a stage's tokens. Those past the unit's last token are where that one is:
  // copies are rounded up, and 0 times what has no weight is then as harmless as the last token
  // itself. (One row of zeros, which all would read, is as slow as the one slice of the L2 cache
  // that has it.)
  __device__ __forceinline__ void load_page_ids(const PageRow& pages, int32_t token, int32_t end) {
    load_page_ids(pages, token, end, [](int32_t mine) { return mine; });
  }
  template <class StandIn>
  __device__ __forceinline__ void load_page_ids(const PageRow& pages, int32_t token, int32_t end,
                                                const StandIn& stand_in) {
    if (token >= end) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int32_t mine = stand_in(min(token + first_token() + g * kWarpSize + lane(), end - 1));
      const int32_t page = p_.page_size(mine);
      places_.offset[g] = mine - page * a_.pages.page_size;
      places_.page_id[g] = pages.first + page;
      ptx::load_global_if(pages.table != nullptr, pages.table + page, places_.page_id[g]);
    }
  }

  // Start copying a unit's queries, when its slot is free.
  __device__ __forceinline__ void copy_queries(const WorkGeometry& g, const WorkUnits& units) {
    begin_unit();
    // Of the lane's row: there are no more than lanes. Blocks are filled up with the last row.
    const WorkPiece& piece = units.piece();
    const int lane = fresh_thread() % kWarpSize;  // what follows from it is for this unit alone
    const uint32_t packed = units.first_row() + min(lane, units.num_rows() - 1);
    const uint32_t row = packed / static_cast<uint32_t>(g.group_size);
    const uint32_t head = piece.kv_head * g.group_size + packed - row * g.group_size;
    const Q* q = static_cast<const Q*>(a_.q) + (int64_t{piece.qo_begin} + row) * a_.q_row_stride +
                 head * a_.q_head_stride;
    set_row<typename Traits::QRows, kRowBlock>(lane, reinterpret_cast<uint64_t>(q));
    const uint32_t to = ptx::shared_address(shared_.q[unit_.index()]);
    copy_rows<typename Traits::QRows, kRowBlock>(to, units.num_rows());
    ptx::mbarrier_arrive_after_copies(unit_full());
  }
  // Hand a unit to the other warps.
  __device__ __forceinline__ void publish(const WorkUnits& units) {
    if (lane() == 0) {
      units.describe(p_.partials, a_.prior, shared_.units[unit_.index()]);
      ptx::mbarrier_arrive(unit_full());
    }
    ++unit_.n;
  }
  __device__ __forceinline__ void publish_end() {
    begin_unit();
    if (lane() == 0) {
      shared_.units[unit_.index()].exists = false;
      ptx::mbarrier_arrive(unit_full());
    }
    ptx::mbarrier_arrive(unit_full());
  }
  __device__ __forceinline__ void begin_unit() const {
    const SlotBarriers& barriers = shared_.unit_barriers[unit_.index()];
    ptx::mbarrier_wait(ptx::shared_address(&barriers.empty), unit_.empty_parity());
  }
  __device__ __forceinline__ uint32_t unit_full() const {
    return ptx::shared_address(&shared_.unit_barriers[unit_.index()].full);
  }

  // Wait until the next stage of a ring is free; return its shared address.
  __device__ __forceinline__ uint32_t begin_stage(const RingPlace& place, RingSide side) const {
    const SlotBarriers& barriers = shared_.stage_barriers[side][place.slot];
    ptx::mbarrier_wait(ptx::shared_address(&barriers.empty), place.parity ^ 1);
    return rings_ + stage_offset<Traits>(p_.ring_slots, side, place);
  }
  template <class Arrive>
  __device__ __forceinline__ void end_stage(RingPlace& place, RingSide side, const Arrive& arrive) {
    arrive(ptx::shared_address(&shared_.stage_barriers[side][place.slot].full));
    place.advance(p_.ring_slots[side]);
  }

  // Copy this warp's share of `count` or all tokens of a stage, which may be none.
  template <class Rows>
  __device__ __forceinline__ void copy_stage(RingPlace& place, RingSide side, const void* cache,
                                             const ChunkStrides& strides, uint32_t head,
                                             const TokenPlaces& places, int32_t count) {
    constexpr int kBlock = kWarpSize % Rows::kChunks == 0 ? kWarpSize : kTileTokens;
    static_assert(kBlock % Traits::kTokensAtOnce == 0, "what a warp reads at once is all copied");
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint64_t chunk = uint64_t{head} * strides.head +
                             uint64_t{uint32_t(places.page_id[g])} * strides.page +
                             uint64_t{uint32_t(places.offset[g])} * strides.token;
      set_row<Rows, kBlock>(g * kWarpSize + lane(),
                            reinterpret_cast<uint64_t>(cache) + chunk * kChunkBytes);
    }
    count = min(count - first_token(), Traits::kCopiedTokens);
    copy_rows<Rows, kBlock>(begin_stage(place, side) + first_token() * Rows::kRowBytes, count);
    end_stage(place, side, [](uint32_t barrier) { ptx::mbarrier_arrive_after_copies(barrier); });
  }

  // How the chunks of a block of rows are dealt to copies of a chunk by each lane.
  template <class Rows, int kBlock>
  struct Copies {
    static constexpr int kCount = kBlock * Rows::kChunks / kWarpSize;
    static constexpr int kStep = kWarpSize / Rows::kChunks;  // rows from one to the next
    static constexpr bool kAreOfWholeRows = kStep * Rows::kChunks == kWarpSize;
    // Two addresses are one load: those of a lane stand side by side. Not of more than 8 copies:
    // groups of four registers are harder to find than pairs.
    static constexpr bool kLoadsPairs = kAreOfWholeRows && kCount % 2 == 0 && kCount <= 8;
    // Addresses are loaded so many at a time: a copy after each load would wait for it.
    static constexpr int kInFlight = kAreOfWholeRows || kCount < 4 ? kCount : 4;

    // Where the address of a row stands.
    __device__ __forceinline__ static int index(int row) {
      if constexpr (!kLoadsPairs) return row;
      const int in_block = row % kBlock;
      return row - in_block + in_block % kStep * kCount + in_block / kStep;
    }
  };

  // Say where a row begins that is to be copied.
  template <class Rows, int kBlock>
  __device__ __forceinline__ void set_row(int row, uint64_t from) const {
    shared_.copied_rows[copy_warp()][Copies<Rows, kBlock>::index(row)] = from;
  }

  // Copy the rows that were set, rounded up to blocks of kBlock. Lanes know different rows than
  // they copy; through shared memory that takes fewer instructions than with shuffles.
  template <class Rows, int kBlock>
  __device__ __forceinline__ void copy_rows(uint32_t to, int32_t count) const {
    using Shape = Copies<Rows, kBlock>;
    constexpr int kInFlight = Shape::kInFlight;
    constexpr int kBytes = Rows::kRowBytes;
    const uint64_t* rows = shared_.copied_rows[copy_warp()];
    __syncwarp();
#pragma unroll 1
    for (; count > 0; count -= kBlock) {
#pragma unroll
      for (int first = 0; first < Shape::kCount; first += kInFlight) {
        // The lane. Where each copy has rows and chunks of its own, they would all be kept in
        // registers if the compiler could know that the lane is always the same.
        int lane = FewRowsCopies::lane();
        if constexpr (!Shape::kAreOfWholeRows) asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        const auto row_of = [&](int copy) { return (copy * kWarpSize + lane) / Rows::kChunks; };
        const auto chunk_of = [&](int copy) { return (copy * kWarpSize + lane) % Rows::kChunks; };
        uint64_t from[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight && first + i < Shape::kCount; ++i) {
          if constexpr (Shape::kLoadsPairs) {
            if (i % 2 != 0) continue;
            const auto* pairs =
                reinterpret_cast<const ulonglong2*>(rows + row_of(0) * Shape::kCount);
            const ulonglong2 pair = pairs[i / 2];
            from[i] = pair.x;
            from[i + 1] = pair.y;
          } else {
            from[i] =
                rows[Shape::kAreOfWholeRows ? row_of(0) + i * Shape::kStep : row_of(first + i)];
          }
        }
#pragma unroll
        for (int i = 0; i < kInFlight && first + i < Shape::kCount; ++i) {
          const int copy = first + i;
          uint32_t at = to + Rows::offset(row_of(copy), chunk_of(copy));
          if constexpr (Shape::kAreOfWholeRows) {
            at = Rows::skip_rows(to + Rows::offset(row_of(0), chunk_of(0)), i * Shape::kStep);
          }
          const uint64_t address = from[i] + chunk_of(copy) * kChunkBytes;
          if constexpr (Traits::kEvictsFirst) {
            ptx::cp_async_16_by<kBytes>(policy_, at, reinterpret_cast<const void*>(address));
          } else {
            ptx::cp_async_16_of<kBytes>(at, reinterpret_cast<const void*>(address));
          }
        }
      }
      to += kBlock * Rows::kRowBytes;
      rows += kBlock;
    }
    __syncwarp();
  }

  const FewRowsParams& p_;
  const AttentionParams& a_;
  Shared& shared_;
  uint32_t rings_;
  UnitPlace<Traits> unit_;
  RingPlace keys_ = {};
  RingPlace values_ = {};
  TokenPlaces places_ = {};
  uint64_t policy_ = Traits::kEvictsFirst ? ptx::evict_first_policy() : 0;
};

}  // namespace fi
