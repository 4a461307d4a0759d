// Compile-time shapes of the few-row kernel, and its shared memory.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>

#include <fi_backend/attention/item_partials.cuh>
#include <fi_backend/attention/logits.cuh>
#include <fi_backend/attention/swizzled_rows.cuh>
#include <fi_backend/attention/work_units.cuh>
#include <fi_backend/common/dtypes.cuh>

namespace fi {

inline constexpr int kFewRowsThreads = kFewRowsWarps * 32;
inline constexpr int kRowBlock = 8;  // columns of an mma: packed query rows

// Q: __half or __nv_bfloat16; Kv: Q or an fp8 type; Out: a float type. A unit has up to kUnitBlocks
// blocks of rows: with few of them, more CTAs fit an SM and hide each other's latencies.
template <class Q_, class Kv_, class Out_, int kHeadDimQk, int kHeadDimVo, int kUnitBlocks>
struct FewRowsTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  static constexpr int kQk = kHeadDimQk;
  static constexpr int kVo = kHeadDimVo;
  static constexpr bool kIsFp8Cache = kIsFp8<Kv>;
  static_assert(kIsSame<Q, Kv> || kIsFp8Cache, "the cache has q's type or fp8");
  static_assert(kQk % 32 == 0 && kVo % 32 == 0 && kQk <= 256 && kVo <= 256,
                "head dims must be multiples of 32 up to 256");
  // What the tensor cores multiply. fp8 is exact in fp16, and one instruction away from it.
  static constexpr bool kComputesInHalf = kIsFp8Cache || kIsSame<Q, __half>;

  static constexpr int kItemRows = cuda_few_rows_limit(kQk, kVo);
  static constexpr int kUnitRows = kUnitBlocks * kRowBlock;
  // Blocks of rows that are computed for a unit: there is code for 1, for 2, and for all of them.
  __device__ static constexpr int num_blocks(int num_rows) {
    return num_rows <= kRowBlock ? 1 : num_rows <= 2 * kRowBlock ? 2 : kUnitBlocks;
  }
  static constexpr int kCtasPerSm = kUnitBlocks == 1 && kVo <= 128 ? 3 : 2;

  using QRows = SwizzledRows<kQk * 2>;
  using KRows = SwizzledRows<kQk* int(sizeof(Kv))>;
  using VRows = SwizzledRows<kVo* int(sizeof(Kv))>;
  static constexpr int kWidestRow =
      KRows::kRowBytes > VRows::kRowBytes ? KRows::kRowBytes : VRows::kRowBytes;
  static constexpr int kSlotBytes = kTileTokens * kWidestRow;  // of one tile of K, or of V

  // Floats of a row where warps leave their accumulators for each other. The padding puts rows that
  // the lanes of a warp write together in different banks.
  static constexpr int kStateRow = kVo + 4;
};

template <bool kIsHalf>
struct ComputeType {
  using type = __half;
};
template <>
struct ComputeType<false> {
  using type = __nv_bfloat16;
};

// A warp's softmax state of a row.
struct SoftmaxState {
  float max;  // reference of the weights, base 2; -inf before the first key
  float sum;
};

// The pages of the unit that a warp copies.
struct RingPages {
  const int32_t* table;  // of the request; nullptr = pages from `first` on
  int32_t first;
  bool hold_tiles;  // no tile lies in two pages
};

// From a warp's tile to its next.
struct PageStep {
  int32_t pages;
  int32_t tokens;
};

// Shared memory begins with this; the rings [kFewRowsWarps, num_slots, kSlotBytes] follow.
template <class Traits>
struct alignas(128) FewRowsShared {
  uint8_t q[Traits::kUnitRows * Traits::QRows::kRowBytes];  // swizzled
  LogitRow rows[2][Traits::kUnitRows];                      // of the current unit and of the next
  alignas(16) float values[kFewRowsWarps][kRowBlock][Traits::kStateRow];  // a block of each warp
  SoftmaxState states[kFewRowsWarps][kRowBlock];
  WorkUnits units[2][kFewRowsWarps];       // what warps compute, and compute next
  WorkUnits units_to_load[kFewRowsWarps];  // what they copy, well ahead of it
  int32_t turn[kFewRowsWarps];             // which of the two is the current one
  RingPages pages[kFewRowsWarps];
  WorkGeometry geometry;
  ItemPartials partials;  // of the item of a cut piece
  bool is_last;           // to finish a piece of that item
};

// Slots of a warp's ring, and the shared memory of a CTA.
struct FewRowsShape {
  int num_slots;
  int shared_bytes;
};

inline constexpr int kFewRowsMinSlots = 3;  // odd numbers, see kv_ring.cuh
inline constexpr int kFewRowsMaxSlots = 11;

// As many CTAs an SM as their registers allow, but for an SM with little shared memory, and what
// they leave of it in rings.
template <class Traits>
constexpr FewRowsShape few_rows_shape(int sm_bytes, int reserved_bytes_per_cta) {
  constexpr int kSlots = kFewRowsWarps * Traits::kSlotBytes;
  constexpr int kFixed = int(sizeof(FewRowsShared<Traits>));
  FewRowsShape shape = {};
  for (int ctas = Traits::kCtasPerSm; ctas > 0; --ctas) {
    int slots = (sm_bytes / ctas - reserved_bytes_per_cta - kFixed) / kSlots;
    if (slots > kFewRowsMaxSlots) slots = kFewRowsMaxSlots;
    shape.num_slots = slots % 2 == 1 ? slots : slots - 1;
    shape.shared_bytes = kFixed + shape.num_slots * kSlots;
    if (shape.num_slots >= kFewRowsMinSlots) break;
  }
  return shape;
}

}  // namespace fi
