// A warp's own ring of K and V tiles in shared memory, filled by asynchronous copies that run ahead
// of the arithmetic, across the borders of work items.
//
// Tiles take slots in the order K, V, K, V, .. The number of slots is odd: the copy that may start
// when a tile of K arrives, into the slot read last, is then a tile of K too.
#pragma once

#include <fi_backend/attention/params.h>

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/attention/work_units.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/cp_async.cuh>

namespace fi {

template <class Traits>
class KvRing {
  using Kv = typename Traits::Kv;

 public:
  // `units` is a walk of the ring's own, at the first unit; `pages` is room for its use, `ring` the
  // shared address of the warp's slots.
  __device__ __forceinline__ KvRing(const AttentionParams& p, const WorkGeometry& g,
                                    const PageStep& step, WorkUnits& units, RingPages& pages,
                                    uint32_t ring, int num_slots)
      : p_(p),
        g_(g),
        step_(step),
        units_(units),
        pages_(pages),
        ring_begin_(ring),
        ring_end_(ring + num_slots * Traits::kSlotBytes),
        read_(ring_end_ - Traits::kSlotBytes),
        write_(ring),
        num_slots_(num_slots) {
    token_ = first_token();
    has_tile_ = token_ < units_.tokens.end;
    if (has_tile_) {
      enter_unit();
    } else {
      enter_next_unit();
    }
    load_page_id();
  }

  // Start the copies that fit the ring. In between, what was loaded before may arrive.
  __device__ __forceinline__ void fill() {
    for (int i = 0; i < num_slots_ / 2; ++i) {
      issue_keys();
      issue_values();
    }
  }

  // Wait for the next tile of K or V; return its address, which holds until the next call.
  // Meanwhile the slot returned by the previous call is filled again.
  __device__ __forceinline__ uint32_t next_keys() {
    wait();
    issue_keys();
    return read_;
  }
  __device__ __forceinline__ uint32_t next_values() {
    wait();
    issue_values();
    return read_;
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  __device__ __forceinline__ void wait() {
    // Every call starts one group of copies: that many later ones may be pending.
    if (num_slots_ == 5) {
      ptx::cp_async_wait<3>();
    } else if (num_slots_ == 3) {
      ptx::cp_async_wait<1>();
    } else if (num_slots_ == 7) {
      ptx::cp_async_wait<5>();
    } else if (num_slots_ == 9) {
      ptx::cp_async_wait<7>();
    } else {
      ptx::cp_async_wait<kFewRowsMaxSlots - 2>();
    }
    __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the slot before
    read_ = next_slot(read_);
  }

  __device__ __forceinline__ uint32_t next_slot(uint32_t slot) const {
    slot += Traits::kSlotBytes;
    return slot == ring_end_ ? ring_begin_ : slot;
  }

  // Start copying a tile of K.
  __device__ __forceinline__ void issue_keys() {
    if (has_tile_) copy<typename Traits::KRows>(p_.k_cache, p_.k_strides);
    ptx::cp_async_commit();
    write_ = next_slot(write_);
  }

  // Start copying the same tile of V, and find the warp's next tile: where its rows are is known by
  // the time its turn comes.
  __device__ __forceinline__ void issue_values() {
    if (has_tile_) {
      copy<typename Traits::VRows>(p_.v_cache, p_.v_strides);
      advance();
    }
    ptx::cp_async_commit();
    write_ = next_slot(write_);
  }

  template <class Rows>
  __device__ __forceinline__ void copy(const void* cache, const KvStrides& strides) {
    // The row of the lane's token.
    const Kv* row = static_cast<const Kv*>(cache) + page_id_ * strides.page +
                    page_offset_ * strides.token + units_.piece.kv_head * strides.head;
    const int count = units_.tokens.end - token_;
    if (pages_.hold_tiles && count >= kTileTokens) {
      copy_rows<Rows>(row, strides.token * int(sizeof(Kv)));
    } else {
      gather_rows<Rows>(row, count);
    }
  }

  // A copy moves 32 chunks: whole rows, or what comes next.
  template <class Rows>
  static constexpr int kCopies = kTileTokens * Rows::kChunks / kWarpSize;
  template <class Rows>
  static constexpr bool kCopiesWholeRows = kWarpSize % Rows::kChunks == 0;

  // The lane. Where each copy has rows and chunks of its own, they would all be kept in registers
  // if the compiler could know that the lane is always the same.
  template <class Rows>
  __device__ __forceinline__ static int copy_lane() {
    if constexpr (kCopiesWholeRows<Rows>) return lane();
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  // Row and chunk of the lane in copy i, and where they go.
  template <class Rows>
  __device__ __forceinline__ int row_in_tile(int i) const {
    return (i * kWarpSize + copy_lane<Rows>()) / Rows::kChunks;
  }
  template <class Rows>
  __device__ __forceinline__ int chunk_in_row(int i) const {
    return (i * kWarpSize + copy_lane<Rows>()) % Rows::kChunks;
  }
  template <class Rows>
  __device__ __forceinline__ uint32_t destination(int i) const {
    if constexpr (kCopiesWholeRows<Rows>) {
      const uint32_t first = write_ + Rows::offset(row_in_tile<Rows>(0), chunk_in_row<Rows>(0));
      return Rows::skip_rows(first, i * (kWarpSize / Rows::kChunks));
    } else {
      return write_ + Rows::offset(row_in_tile<Rows>(i), chunk_in_row<Rows>(i));
    }
  }

  // Copy a whole tile whose rows are `stride` bytes apart; `row` is that of the lane's token.
  template <class Rows>
  __device__ __forceinline__ void copy_rows(const Kv* row, int64_t stride) {
    const auto* tile = reinterpret_cast<const uint8_t*>(row) - lane() % kTileTokens * stride;
    const uint8_t* first =
        tile + row_in_tile<Rows>(0) * stride + chunk_in_row<Rows>(0) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kCopies<Rows>; ++i) {
      const uint8_t* from =
          kCopiesWholeRows<Rows>
              ? first + i * (kWarpSize / Rows::kChunks) * stride
              : tile + row_in_tile<Rows>(i) * stride + chunk_in_row<Rows>(i) * kChunkBytes;
      ptx::cp_async_16(destination<Rows>(i), from);
    }
  }

  // Copy a tile whose row r begins at lane r's `row`. Rows past the unit become zeros: their
  // weights are 0, and nothing else times 0 is sure to be 0.
  template <class Rows>
  __device__ __forceinline__ void gather_rows(const Kv* row, int count) {
    const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll
    for (int i = 0; i < kCopies<Rows>; ++i) {
      const int r = row_in_tile<Rows>(i);
      const auto from = __shfl_sync(kFullWarp, address, r) + chunk_in_row<Rows>(i) * kChunkBytes;
      ptx::cp_async_16(destination<Rows>(i), reinterpret_cast<const void*>(from), r < count);
    }
  }

  __device__ __forceinline__ void advance() {
    constexpr int kStep = kFewRowsWarps * kTileTokens;
    token_ += kStep;
    page_ += step_.pages;
    page_offset_ += step_.tokens;
    if (page_offset_ >= p_.pages.page_size) {
      page_offset_ -= p_.pages.page_size;
      ++page_;
    }
    if (token_ >= units_.tokens.end) enter_next_unit();
    load_page_id();
  }

  // The warp's first token of the current unit.
  __device__ __forceinline__ int32_t first_token() const {
    return units_.tokens.begin + units_.first_tile() * kTileTokens;
  }

  // Go to the next unit that has a tile for this warp.
  __device__ __forceinline__ void enter_next_unit() {
    do {
      has_tile_ = units_.next(g_, p_.qo_indptr, p_.kv_lens);
      if (!has_tile_) return;
      token_ = first_token();
    } while (token_ >= units_.tokens.end);
    enter_unit();
  }

  // Pages past the unit's last token are not looked up: what follows does not read them.
  __device__ __forceinline__ void load_page_id() {
    if (has_tile_ && token_ + lane() % kTileTokens < units_.tokens.end) {
      page_id_ = pages_.table != nullptr ? pages_.table[page_] : pages_.first + page_;
    }
  }

  // Find the page of the lane's token, lane l having token l of the tile, and how it moves from
  // tile to tile.
  __device__ __forceinline__ void enter_unit() {
    const uint32_t page_size = p_.pages.page_size;
    const uint32_t token = token_ + lane() % kTileTokens;
    page_ = token / page_size;
    page_offset_ = token - page_ * page_size;
    if (lane() == 0) {
      const int32_t request = units_.piece.request;
      pages_.table = p_.pages.pages_of(request);
      pages_.first = pages_.table == nullptr ? p_.pages.indptr[request] : 0;
      pages_.hold_tiles = page_size % kTileTokens == 0 && units_.tokens.begin % kTileTokens == 0;
    }
    __syncwarp();
  }

  const AttentionParams& p_;
  const WorkGeometry& g_;
  const PageStep& step_;
  WorkUnits& units_;
  RingPages& pages_;
  uint32_t ring_begin_;
  uint32_t ring_end_;
  uint32_t read_;
  uint32_t write_;
  int num_slots_;

  // The tile that is issued next.
  bool has_tile_ = false;
  int32_t token_ = 0;
  int32_t page_id_ = 0;  // of the lane's token
  int32_t page_ = 0;     // its place in the page table
  int32_t page_offset_ = 0;
};

}  // namespace fi
