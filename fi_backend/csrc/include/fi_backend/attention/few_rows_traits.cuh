// Compile-time shapes of the few-row kernel, and its shared memory.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>

#include <fi_backend/attention/logits.cuh>
#include <fi_backend/attention/ring_place.cuh>
#include <fi_backend/attention/swizzled_rows.cuh>
#include <fi_backend/attention/work_units.cuh>
#include <fi_backend/common/dtypes.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/named_barrier.cuh>

namespace fi {

inline constexpr int kTileTokens = 16;  // rows of an mma
inline constexpr int kTokenWarps = 4;   // that tiles are dealt to
inline constexpr int kRowBlock = 8;     // columns of an mma: packed query rows
static_assert(kRowBlock == kSmallItemRows, "the planner knows the kernel for one block of rows");
inline constexpr int kMaxRowGroups = 3;

inline constexpr int kFewRowsMinStages = 3;
inline constexpr int kFewRowsMaxStages = 10;
// What one block an SM has on its way from memory, where all SMs read: with 160 KB they read slower
// by 5 %.
inline constexpr int kBytesInFlight = 96 * 1024;

// Q: __half or __nv_bfloat16; Kv: Q or an fp8 type; Out: a float type. A unit has up to kUnitBlocks
// blocks of rows: with one of them, more teams fit an SM and hide each other's latencies.
template <class Q_, class Kv_, class Out_, int kHeadDimQk, int kHeadDimVo, int kUnitBlocks,
          class Variant_ = NoVariant>
struct FewRowsTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
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
  // A group of warps for each block of rows, as long as a warp then has the 128 registers that it
  // takes. Two groups share more rows: each computes every other block.
  static constexpr int kRowGroups = kUnitBlocks > kMaxRowGroups ? 2 : kUnitBlocks;
  static constexpr int kBlocksPerWarp = kUnitBlocks / kRowGroups;
  static constexpr int kComputeWarps = kTokenWarps * kRowGroups;
  static constexpr int kComputeThreads = kComputeWarps * kWarpSize;
  // One block an SM needs two warps to fill each ring: one takes longer over the addresses of a
  // stage than memory takes to deliver it. Where there are more blocks, one fills both.
  static constexpr int kRingWarps = kRowGroups > 1 ? 2 : 1;
  static constexpr int kCopyWarps = kRowGroups > 1 ? 2 * kRingWarps : 1;
  static constexpr int kThreads = kComputeThreads + kCopyWarps * kWarpSize;  // of a team
  static constexpr int kTeams = kRowGroups > 1 ? 1 : few_rows_teams_per_sm(kQk, kVo);

  // Whether K and V leave the L2 cache to what other blocks of the kernel have there.
  static constexpr bool kEvictsFirst = false;

  using QRows = SwizzledRows<kQk * 2>;
  using KRows = SwizzledRows<kQk* int(sizeof(Kv))>;
  using VRows = SwizzledRows<kVo* int(sizeof(Kv))>;
  // Rows of a stage that is as large as one of wider heads are twice as many.
  static constexpr bool kIsNarrow = kQk <= 64 && kVo <= 64;
  // A stage of a ring is one tile or more of K, or of V, for each of kTokenWarps. It has room for
  // what they have accumulated of a block of rows.
  static constexpr int kTilesPerWarp = kIsNarrow ? 2 : 2 / int(sizeof(Kv));
  // Tiles of a warp, one after the other in a stage, that are computed side by side: they wait for
  // memory and for the tensor cores at the same time, and share all that is not arithmetic.
  static constexpr int kTilesAtOnce = kIsNarrow ? 2 : 1;
  static constexpr int kTokensAtOnce = kTilesAtOnce * kTileTokens;
  static_assert(kTilesPerWarp % kTilesAtOnce == 0);
  // Whether there are registers for where a lane reads K and V.
  static constexpr bool kKeepsPlaces = kIsNarrow;
  static constexpr int kStageTokens = kTilesPerWarp * kTokenWarps * kTileTokens;
  static constexpr int kStageBytes = kStageTokens * int(sizeof(Kv)) * (kQk > kVo ? kQk : kVo);
  static_assert(kStageBytes >= kTokenWarps * kRowBlock * kVo * int(sizeof(float)));
  static constexpr int kCopiedTokens = kStageTokens / kRingWarps;  // of a stage, by each warp
  // Of both rings; at least three each, one of which may be where warps bring rows together.
  static constexpr int kWantedStages =
      kStageBytes * 6 > kBytesInFlight ? 6 : kBytesInFlight / kStageBytes;
  static constexpr int kMaxStages =
      kRowGroups == 1 || kWantedStages > kFewRowsMaxStages ? kFewRowsMaxStages : kWantedStages;
  // Units that are known, and their queries copied, before they are computed.
  static constexpr int kUnitSlots = kUnitBlocks == 1 ? 4 : 2;
};

// Whether the teams of an SM are one CTA. Before Hopper, where a team's shared memory begins takes
// registers that the kernel does not have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kTeamsAreOneCta = false;
#else
inline constexpr bool kTeamsAreOneCta = true;
#endif

// Whether stages that no row of a unit sees are left out. Before Hopper the warps that copy have no
// registers for that.
template <class Traits>
inline constexpr bool kSkipsStages = kTeamsAreOneCta && kSkipsTiles<typename Traits::Variant>;

// The thread's team, among those of its CTA.
template <class Traits>
__device__ __forceinline__ int team() {
  return Traits::kTeams > 1 && kTeamsAreOneCta ? int(threadIdx.y) : 0;
}

// Named barriers of a team, for the threads that compute and for all; 0 is __syncthreads().
template <class Traits>
__device__ __forceinline__ void compute_sync() {
  ptx::named_barrier_sync<Traits::kComputeThreads>(1 + team<Traits>());
}
template <class Traits>
__device__ __forceinline__ void team_sync() {
  ptx::named_barrier_sync<Traits::kThreads>(1 + Traits::kTeams + team<Traits>());
}

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

// Barriers of a slot that is filled and emptied in turn.
struct SlotBarriers {
  uint64_t full;
  uint64_t empty;
};

// K and V have rings of their own, so that different warps may fill them.
enum RingSide { kKeys = 0, kValues = 1 };

FI_HOST_DEVICE constexpr int ring_slots(int num_stages, int side) {
  return (num_stages + 1 - side) / 2;
}

// Where some stages of a unit are left out: the first token of what is in a slot of the ring of K.
template <bool kSkips>
struct StageTokens {};
template <>
struct StageTokens<true> {
  static constexpr int32_t kNone = -1;  // past the unit's last stage

  int32_t first[ring_slots(kFewRowsMaxStages, kKeys)];
};

// A team's shared memory begins with this; the rings of K and of V [num_stages, kStageBytes]
// follow.
template <class Traits>
struct alignas(128) FewRowsShared {
  uint8_t q[Traits::kUnitSlots][Traits::kUnitRows * Traits::QRows::kRowBytes];  // swizzled
  FewRowsUnit units[Traits::kUnitSlots];
  LogitRow rows[2][Traits::kUnitRows];          // of a unit and the next, in turn
  SoftmaxState states[kTokenWarps][kRowBlock];  // of a block
  alignas(16) uint64_t copied_rows[Traits::kCopyWarps][Traits::kCopiedTokens];  // addresses
  SlotBarriers unit_barriers[Traits::kUnitSlots];
  SlotBarriers stage_barriers[2][ring_slots(kFewRowsMaxStages, kKeys)];
  WorkGeometry geometry;
  bool is_last;  // to finish a piece of an item
  StageTokens<kSkipsTiles<typename Traits::Variant>> stage_tokens;
};

template <class Traits>
using UnitPlace = FixedRingPlace<Traits::kUnitSlots>;

// Where a stage begins, from the first stage of K on.
template <class Traits>
__device__ __forceinline__ uint32_t stage_offset(const int32_t (&ring_slots)[2], RingSide side,
                                                 const RingPlace& place) {
  const uint32_t first = side == kValues ? ring_slots[kKeys] : 0;
  return (first + place.slot) * Traits::kStageBytes;
}

// What fits an SM: teams, stages of the rings of each, and the shared memory of each.
struct FewRowsShape {
  int teams;
  int num_stages;
  int shared_bytes;
};

// As many teams an SM as their registers allow, but for an SM with little shared memory, and what
// they leave of it in stages.
template <class Traits>
constexpr FewRowsShape few_rows_shape(int sm_bytes, int reserved_bytes_per_cta) {
  constexpr int kFixed = int(sizeof(FewRowsShared<Traits>));
  FewRowsShape shape = {};
  for (int teams = Traits::kTeams; teams > 0; --teams) {
    shape.teams = teams;
    const int stages = (sm_bytes / teams - reserved_bytes_per_cta - kFixed) / Traits::kStageBytes;
    shape.num_stages = stages > Traits::kMaxStages ? Traits::kMaxStages : stages;
    shape.shared_bytes = kFixed + shape.num_stages * Traits::kStageBytes;
    if (shape.num_stages >= kFewRowsMinStages) break;
  }
  return shape;
}

}  // namespace fi
