// Attention of requests with few query rows: bound by reading K and V once.
//
// A CTA fills an SM, with one team of warps or several that work each for itself: were they CTAs,
// as they are before Hopper, some SMs would have more of those with work than others. All teams
// share the workers of the plan, mostly one each, and compute the units of theirs one after the
// other. One warp or two copy, through rings of stages; the tiles of a stage are dealt to the other
// warps, each of which keeps its own softmax state. At the end of a unit the states of the warps
// are merged in their order: the bits of a unit depend on nothing but the unit.
#pragma once

#include <fi_backend/attention/few_rows_copies.cuh>
#include <fi_backend/attention/few_rows_queries.cuh>
#include <fi_backend/attention/few_rows_softmax.cuh>
#include <fi_backend/attention/partials.cuh>
#include <fi_backend/common/fresh_registers.cuh>
#include <fi_backend/ptx/atomic.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/load_global.cuh>
#include <fi_backend/ptx/named_barrier.cuh>

namespace fi {

// The warps that compute.
template <class Traits>
class FewRowsCompute {
  using Shared = FewRowsShared<Traits>;
  using Variant = typename Traits::Variant;
  using Products = FewRowsProducts<Traits>;
  static constexpr int kAccesses = Traits::kVo / kValuesPerAccess;  // of a row of values
  static constexpr bool kSkips = kSkipsStages<Traits>;

 public:
  // `rings`: shared address of the first stage of K.
  __device__ __forceinline__ FewRowsCompute(const FewRowsParams& p, Shared& shared, uint32_t rings)
      : p_(p), shared_(shared), rings_(rings) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (UnitPlace<Traits> place;; ++place.n) {
      SlotBarriers& barriers = shared_.unit_barriers[place.index()];
      ptx::mbarrier_wait(ptx::shared_address(&barriers.full), place.parity());
      const FewRowsUnit& unit = shared_.units[place.index()];
      if (!unit.exists) return;
      uint8_t* q = shared_.q[place.index()];
      if (!unit.is_whole_item && threadIdx.x == 0) {
        ptx::prefetch_to_l2(p_.finished + unit.partials.first_holder);
      }
      LogitRow* rows = shared_.rows[place.n % 2];
      prepare_queries<Traits>(p_.attention, shared_.geometry, unit, warp(), q, rows);
      rows_ = rows;
      compute_sync<Traits>();
      const int blocks = (unit.num_rows + kRowBlock - 1) / kRowBlock;
      if (Traits::kBlocksPerWarp == 1 || blocks <= Traits::kRowGroups + row_group()) {
        compute<1>(unit, q);
      } else {
        compute<Traits::kBlocksPerWarp>(unit, q);
      }
      compute_sync<Traits>();
      write_block(unit, blocks - 1);
      end_stage(kKeys, scratch_);
      if (!unit.is_whole_item && unit.ends_piece) finish_piece(unit);
      arrive_as_warp(barriers.empty);
    }
  }

 private:
  // Found anew: what follows from it would take registers all through the kernel.
  __device__ __forceinline__ static int warp() { return fresh_thread() / kWarpSize; }
  // Among those that tiles are dealt to.
  __device__ __forceinline__ static int token_warp() { return warp() % kTokenWarps; }
  __device__ __forceinline__ static int row_group() { return warp() / kTokenWarps; }

  // All lanes are done with a slot.
  __device__ __forceinline__ static void arrive_as_warp(uint64_t& empty) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(ptx::shared_address(&empty));
  }

  __device__ __forceinline__ RingPlace take_stage(RingSide side) {
    RingPlace& next = side == kKeys ? keys_ : values_;
    const RingPlace place = next;
    next.advance(p_.ring_slots[side]);
    return place;
  }
  // Wait until a stage is full; return where it begins, from the first stage of K on.
  __device__ __forceinline__ uint32_t begin_stage(RingSide side, const RingPlace& place) const {
    const SlotBarriers& barriers = shared_.stage_barriers[side][place.slot];
    ptx::mbarrier_wait(ptx::shared_address(&barriers.full), place.parity);
    return stage_offset<Traits>(p_.ring_slots, side, place);
  }
  __device__ __forceinline__ void end_stage(RingSide side, const RingPlace& place) const {
    arrive_as_warp(shared_.stage_barriers[side][place.slot].empty);
  }

  // Where warps bring a block of rows together: [kTokenWarps, kRowBlock, kVo], swizzled.
  __device__ __forceinline__ float* scratch_values(int token_warp) const {
    auto* rings = reinterpret_cast<uint8_t*>(&shared_ + 1);
    const uint32_t offset = stage_offset<Traits>(p_.ring_slots, kKeys, scratch_);
    return reinterpret_cast<float*>(rings + offset) + token_warp * kRowBlock * Traits::kVo;
  }

  // Compute a unit, up to kBlocks blocks of rows of which are this warp's. All but the unit's last
  // block is written, the last is in shared memory, before a barrier.
  template <int kBlocks>
  __device__ __forceinline__ void compute(const FewRowsUnit& unit, const uint8_t* q) {
    const int first_row = row_group() * kRowBlock;
    KvRange unmasked = keys_all_see(p_.attention, shared_.geometry, unit.piece);
    unmasked.end = min(unmasked.end, unit.tokens.end);
    FewRowsSoftmax<Traits, kBlocks> softmax(
        ptx::shared_address(q) + first_row * Traits::QRows::kRowBytes, rows_ + first_row,
        p_.attention, unit.piece, unmasked);
    const int32_t end = unit.tokens.end;
    const bool has_rows = first_row < unit.num_rows;
    const int first_tile = token_warp() * Traits::kTokensAtOnce;
    uint32_t key_place = rings_ + first_tile * Traits::KRows::kRowBytes + Products::first_key();
    uint32_t value_place = rings_ + first_tile * Traits::VRows::kRowBytes + Products::first_value();
    if constexpr (Traits::kKeepsPlaces) {
      key_place = keep_in_register(key_place);
      value_place = keep_in_register(value_place);
    }
#pragma unroll 1
    for (int32_t token = unit.tokens.begin; kSkips || token < end; token += Traits::kStageTokens) {
      const RingPlace keys = take_stage(kKeys);
      if constexpr (kSkips) {
        begin_stage(kKeys, keys);
        token = shared_.stage_tokens.first[keys.slot];
        scratch_ = keys;
        if (token == StageTokens<true>::kNone) break;
      }
      const RingPlace values = take_stage(kValues);
      const uint32_t keys_at = key_place + begin_stage(kKeys, keys);
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerWarp; i += Traits::kTilesAtOnce) {
        const int row = i * kTokenWarps * kTileTokens;  // from the warp's first one
        const bool is_last = i + Traits::kTilesAtOnce == Traits::kTilesPerWarp;
        const auto begin_values = [&] {
          if (is_last) end_stage(kKeys, keys);
          return value_place + begin_stage(kValues, values) + row * Traits::VRows::kRowBytes;
        };
        const int32_t first = token + first_tile + row;
        if (has_rows && first < end) {
          softmax.attend(keys_at + row * Traits::KRows::kRowBytes, first, end, begin_values);
        } else if (is_last) {
          begin_values();  // a slot may only be given back that was filled
        }
      }
      end_stage(kValues, values);
    }
    softmax.finish();
    if constexpr (!kSkips) {
      scratch_ = take_stage(kKeys);
      begin_stage(kKeys, scratch_);
    }
    for (int block = 0;; ++block) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n * Traits::kRowGroups + row_group() != block) continue;
        softmax.store(n, shared_.states[token_warp()], scratch_values(token_warp()));
      }
      if ((block + 1) * kRowBlock >= unit.num_rows) return;
      compute_sync<Traits>();
      write_block(unit, block);
      compute_sync<Traits>();
    }
  }

  // Merge what the warps have of a block of rows, and write it.
  __device__ __forceinline__ void write_block(const FewRowsUnit& unit, int block) const {
    const int first = block * kRowBlock;
    const int num_rows = min(kRowBlock, unit.num_rows - first);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_rows * kAccesses; i += Traits::kComputeThreads) {
      const int row = i / kAccesses;
      const int column = i % kAccesses * kValuesPerAccess;
      RowPart merged = empty_part();
      if (unit.prior_parts > 0) merged = merge_prior(unit, rows_[first + row], column);
      RowPart parts[kTokenWarps];
#pragma unroll
      for (int w = 0; w < kTokenWarps; ++w) {
        const SoftmaxState state = shared_.states[w][row];
        const float* values = scratch_values(w) + scratch_offset<Traits>(row, column);
        parts[w] = {state.max, state.sum, *reinterpret_cast<const float4*>(values)};
      }
      merge_parts(merged, parts);
      if (unit.is_whole_item) {
        write_output(unit.piece, rows_[first + row], column, merged);
      } else {
        PartialSlot<Traits>(p_.attention.partials + unit.slot)
            .store(unit.first_row + first + row, column, merged);
      }
    }
  }

  // A row's states over the keys that come before the unit's (PriorStates), merged.
  __device__ __forceinline__ RowPart merge_prior(const FewRowsUnit& unit, const LogitRow& row,
                                                 int column) const {
    constexpr int kInFlight = 4;  // loads that cover each other's latency
    const AttentionParams& a = p_.attention;
    const int count = unit.prior_parts;
    RowPart merged = empty_part();
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kInFlight) {
      RowPart parts[kInFlight];
      int64_t at =
          (int64_t{unit.prior_row + row.qo_idx} * count + begin) * a.num_qo_heads + row.head;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i, at += a.num_qo_heads) {
        parts[i] = empty_part();
        if (begin + i >= count) continue;
        const float* values = a.prior.out + at * Traits::kVo + column;
        parts[i] = {__ldcg(a.prior.lse + at), 1.f, __ldcg(reinterpret_cast<const float4*>(values))};
      }
      merge_parts(merged, parts);
    }
    return merged;
  }

  __device__ __forceinline__ bool wants_lse() const { return p_.attention.lse != nullptr; }
  __device__ __forceinline__ void write_output(const WorkPiece& piece, const LogitRow& logit_row,
                                               int column, const RowPart& part) const {
    const RowResult result =
        finish_row<Variant>(p_.attention, piece, logit_row, part.max, part.sum, wants_lse());
    const PieceVariant<Variant> variant(p_.attention, piece);
    const variants::Row row = variant.row(logit_row.qo_idx, logit_row.head);
    const float4& x = part.values;
    const float f = result.factor;
    write_values(variant, row, column, {x.x * f, x.y * f, x.z * f, x.w * f});
    if (column == 0) write_lse(row, result.lse);
  }
  __device__ __forceinline__ void write_values(const PieceVariant<Variant>& variant,
                                               const variants::Row& row, int column,
                                               const float4& values) const {
    using Out = typename Traits::Out;
    const AttentionParams& a = p_.attention;
    float x[kValuesPerAccess] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < kValuesPerAccess; ++i) x[i] = variant.output(x[i], row, column + i);
    Out* out =
        static_cast<Out*>(a.out) + row.qo_row * a.out_row_stride + row.qo_head * a.out_head_stride;
    Vec<Out, kValuesPerAccess>::from_floats(x).store(out + column);
  }
  __device__ __forceinline__ void write_lse(const variants::Row& row, float lse) const {
    const AttentionParams& a = p_.attention;
    if (a.lse == nullptr) return;
    a.lse[row.qo_row * a.lse_row_stride + row.qo_head * a.lse_head_stride] = lse;
  }

  // The last worker to finish its piece of an item merges them all.
  __device__ __forceinline__ void finish_piece(const FewRowsUnit& unit) const {
    const ItemPartials& item = unit.partials;
    compute_sync<Traits>();
    if (threadIdx.x == 0) {
      // Between two barriers, this orders all partials of the item before the merge, across CTAs.
      // The last count leaves 0 for the next launch.
      const uint32_t last = item.num_holders - 1;
      int32_t* finished = p_.finished + item.first_holder;
      shared_.is_last = last == 0 || ptx::atomic_count_acq_rel(finished, last) == last;
    }
    compute_sync<Traits>();
    if (!shared_.is_last) return;
#pragma unroll 1
    for (int row = warp(); row < unit.piece.num_rows; row += 2 * Traits::kComputeWarps) {
      merge_rows(unit, row, row + Traits::kComputeWarps);
    }
  }

  // Merge two rows of an item, the second of which may not exist.
  __device__ __forceinline__ void merge_rows(const FewRowsUnit& unit, int first, int second) const {
    const WorkPiece& piece = unit.piece;
    const PieceVariant<Variant> variant(p_.attention, piece);
    PairMerge<Traits> merge(p_.attention.partials, unit.partials, first, second,
                            second < piece.num_rows);
    LogitRow logit_row;
    merge.run(
        [&] {
          const int row = merge.row();
          logit_row = row >= unit.first_row ? rows_[row - unit.first_row]
                                            : item_row(p_.attention, shared_.geometry, piece, row);
        },
        [&](float max, float sum) {
          const RowResult result =
              finish_row<Variant>(p_.attention, piece, logit_row, max, sum, wants_lse());
          if (merge.lane() % PairMerge<Traits>::kHalf == 0) {
            write_lse(variant.row(logit_row.qo_idx, logit_row.head), result.lse);
          }
          return result.factor;
        },
        [&](int half, int column, const float4& values) {
          const int lane = half * PairMerge<Traits>::kHalf;
          const variants::Row at = variant.row(__shfl_sync(kFullWarp, logit_row.qo_idx, lane),
                                               __shfl_sync(kFullWarp, logit_row.head, lane));
          if (column < Traits::kVo) write_values(variant, at, column, values);
        });
  }

  const FewRowsParams& p_;
  Shared& shared_;
  uint32_t rings_;
  const LogitRow* rows_ = nullptr;
  RingPlace keys_ = {};
  RingPlace values_ = {};
  RingPlace scratch_ = {};
};

// Set up slots, one after the other: lanes of a warp would take turns anyway.
__device__ __forceinline__ void init_slots(SlotBarriers* slots, int count, int full_arrivals,
                                           int empty_arrivals) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    ptx::mbarrier_init(ptx::shared_address(&slots[i].full), full_arrivals);
    ptx::mbarrier_init(ptx::shared_address(&slots[i].empty), empty_arrivals);
  }
}

// The work of team `index` of `count` in the grid, done by the first Traits::kThreads threads in x.
template <class Traits>
__device__ __forceinline__ void run_few_rows(const FewRowsParams& p, uint8_t* shared_memory,
                                             int32_t index, int32_t count) {
  auto& shared = *reinterpret_cast<FewRowsShared<Traits>*>(shared_memory);
  const uint32_t rings = ptx::shared_address(&shared + 1);
  if (threadIdx.x == 0) {
    init_slots(shared.stage_barriers[kKeys], p.ring_slots[kKeys], kKeyStageArrivals<Traits>,
               Traits::kComputeWarps);
  } else if (threadIdx.x == 2 * kWarpSize) {
    init_slots(shared.stage_barriers[kValues], p.ring_slots[kValues], kStageArrivals<Traits>,
               Traits::kComputeWarps);
  } else if (threadIdx.x == kWarpSize) {
    init_slots(shared.unit_barriers, Traits::kUnitSlots, kUnitArrivals, Traits::kComputeWarps);
  }
  ptx::grid_dependency_wait();
  if (threadIdx.x < Traits::kComputeThreads) {
    team_sync<Traits>();  // the other warps begin with loads
    FewRowsCompute<Traits>(p, shared, rings).run();
  } else {
    FewRowsCopies<Traits>(p, shared, rings).run(index, count);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads*(kTeamsAreOneCta ? Traits::kTeams : 1),
                                  kTeamsAreOneCta ? 1 : Traits::kTeams)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const int num_stages = p.ring_slots[kKeys] + p.ring_slots[kValues];
  const int team_bytes = int(sizeof(FewRowsShared<Traits>)) + num_stages * Traits::kStageBytes;
  // Teams of an SM are far apart in the line of work: the first workers have an SM each.
  run_few_rows<Traits>(p, shared_memory + team<Traits>() * team_bytes,
                       int32_t(blockIdx.x + team<Traits>() * gridDim.x),
                       int32_t(gridDim.x * blockDim.y));
}

}  // namespace fi
