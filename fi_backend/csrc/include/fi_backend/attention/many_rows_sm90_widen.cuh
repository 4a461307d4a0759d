// The warpgroup that widens tiles of an fp8 cache: from where they are loaded to where the products
// read them.
//
// Each warp widens its share of every tile. Products keep shared memory busy, and who reads it
// waits long: rows are read well before they are widened.
#pragma once

#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_sm90_shape.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/tma.cuh>

namespace fi {

template <class Traits>
class Sm90Widener {
  using Memory = Sm90Memory<Traits>;
  using Kv = typename Traits::Kv;
  static constexpr int kWarpRows = Traits::kTokens / (kGroupThreads / kWarpSize);  // of a tile
  static constexpr int kRowLanes = kPartColumns / kChunkBytes;  // that read 64 columns of a row

 public:
  __device__ __forceinline__ explicit Sm90Widener(Memory& memory) : memory_(memory) {}

  __device__ __forceinline__ void run() {
    for (FixedRingPlace<Traits::kUnits> place;; ++place.n) {
      ptx::mbarrier_wait(address(memory_.unit_found[place.index()]), place.parity());
      const Sm90Unit<Traits>& unit = memory_.units[place.index()];
      if (!unit.exists) return;
#pragma unroll 1
      for (const uint32_t end = tiles_ + unit.num_tiles; tiles_ != end; ++tiles_) {
        widen_tile<typename Traits::Q>(memory_.loaded_k(), memory_.k_ring());
        widen_tile<typename Traits::Weight>(memory_.loaded_v(), memory_.v_ring());
      }
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(address(memory_.unit_empty[place.index()]));
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }
  // Unsigned, which takes an instruction where a sign takes four.
  __device__ __forceinline__ static uint32_t thread() { return fresh_thread(); }
  __device__ __forceinline__ static uint32_t lane() { return thread() % kWarpSize; }
  __device__ __forceinline__ static uint32_t warp() { return thread() % kGroupThreads / kWarpSize; }

  // This lane's row of 8 and its chunk of the 64 columns of a part. The two rows that eight lanes
  // have differ in bits 0 and 2: no two of them meet in a bank, neither in narrow rows of 64 or 128
  // bytes nor in wide ones.
  __device__ __forceinline__ static uint32_t lane_row() {
    return lane() / (2 * kRowLanes) ^ lane() / kRowLanes % 2 * 5;
  }
  __device__ __forceinline__ static uint32_t lane_chunk() { return lane() % kRowLanes; }

  // Widen this warp's rows of the next tile: to Wide, 8 rows of 64 columns at a time.
  template <class Wide, class NarrowRing, class WideRing>
  __device__ __forceinline__ void widen_tile(const NarrowRing& narrow, const WideRing& wide) const {
    using Narrow = typename NarrowRing::Tile;
    using From = typename Narrow::Blocks;
    using To = typename WideRing::Tile::Blocks;
    constexpr int kParts = WideRing::Tile::kParts;
    constexpr int kCount = kWarpRows / kBlockRows * kParts;
    // Blocks that are read before they are widened. Of two sides that are widened alike the
    // assembler makes what takes more registers.
    constexpr int kAhead = kIsSame<typename Traits::Q, __half> ? 1 : 2;
    constexpr int kParity = Narrow::kColumns / kPartColumns;  // parts of a narrow one
    const FixedRingPlace<NarrowRing::kStages> from_place = {tiles_};
    const FixedRingPlace<WideRing::kStages> to_place = {tiles_};
    const uint8_t* narrow_tile = narrow.tiles[from_place.index()];
    uint8_t* wide_tile = wide.tiles[to_place.index()];
    const uint8_t* even = narrow_tile + From::offset(warp() * kWarpRows + lane_row(), lane_chunk());
    const uint8_t* odd = even;
    if constexpr (kParity == 2) {
      odd = narrow_tile + From::offset(warp() * kWarpRows + lane_row(), lane_chunk() + kRowLanes);
    }
    const uint32_t low = To::offset(warp() * kWarpRows + lane_row(), 2 * lane_chunk());
    uint8_t* low_chunks = wide_tile + low;
    uint8_t* high_chunks = wide_tile + (low ^ kChunkBytes);
    uint4 rows[kAhead];
    const auto read = [&](int i) {
      const int block = i / kParts, part = i % kParts;
      rows[i % kAhead] = *reinterpret_cast<const uint4*>((part % kParity == 0 ? even : odd) +
                                                         block * From::kNextRows +
                                                         part / kParity * From::kNextColumns);
    };
    ptx::mbarrier_wait(address(narrow.full[from_place.index()]), from_place.parity());
#pragma unroll
    for (int i = 0; i < kAhead; ++i) read(i);
    ptx::mbarrier_wait(address(wide.empty[to_place.index()]), to_place.empty_parity());
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4 x = rows[i % kAhead];
      if (i + kAhead < kCount) read(i + kAhead);
      const int to = i / kParts * To::kNextRows + i % kParts * To::kNextColumns;
      uint4 wide_row;
      widen<Wide>(x.x, wide_row.x, wide_row.y);
      widen<Wide>(x.y, wide_row.z, wide_row.w);
      *reinterpret_cast<uint4*>(low_chunks + to) = wide_row;
      widen<Wide>(x.z, wide_row.x, wide_row.y);
      widen<Wide>(x.w, wide_row.z, wide_row.w);
      *reinterpret_cast<uint4*>(high_chunks + to) = wide_row;
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane() == 0) {
      ptx::mbarrier_arrive(address(narrow.empty[from_place.index()]));
      ptx::mbarrier_arrive(address(wide.full[to_place.index()]));
    }
  }

  // Four values.
  template <class Wide>
  __device__ __forceinline__ static void widen(uint32_t word, uint32_t& low, uint32_t& high) {
    if constexpr (kIsSame<Wide, __nv_bfloat16> && kIsSame<Kv, __nv_fp8_e4m3>) {
      ptx::widen_e4m3x4_to_bf16(word, low, high);
    } else {
      widen_word<Wide, Kv>(word, low, high);
    }
  }

  Memory& memory_;
  uint32_t tiles_ = 0;  // that have been widened
};

}  // namespace fi
