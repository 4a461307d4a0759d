// A warpgroup that computes: 64 query rows of each unit against its tiles, from the last tile to
// the first.
//
// Two things keep the tensor cores busy while weights are computed from scores: a group multiplies
// the weights of the tile before at the same time, and the two groups take turns, so that one
// multiplies while the other is at its weights.
#pragma once

#include <fi_backend/attention/many_rows_sm90_params.h>

#include <fi_backend/attention/many_rows_output.cuh>
#include <fi_backend/attention/many_rows_sm90_shape.cuh>
#include <fi_backend/ptx/named_barrier.cuh>
#include <fi_backend/ptx/tma.cuh>
#include <fi_backend/ptx/wgmma.cuh>

namespace fi {

// The weights of a tile as a wgmma takes them: 16 tokens at a time.
template <class Traits>
using WeightTile = uint32_t[Traits::kTokens / 16][4];

template <class Traits>
class Sm90Computer {
  using Memory = Sm90Memory<Traits>;
  using Q = typename Traits::Q;
  static constexpr int kTokens = Traits::kTokens;

 public:
  __device__ __forceinline__ Sm90Computer(const ManyRowsSm90Params& params, Memory& memory,
                                          int group)
      : p_(params.attention),
        g_(*reinterpret_cast<const WorkGeometry*>(params.attention.plan)),
        memory_(memory),
        group_(group) {}

  __device__ __forceinline__ void run() {
    if (group_ == 1) ptx::named_barrier_arrive<kComputeThreads>(kTurnBarrier);  // group 0 begins
    for (FixedRingPlace<Traits::kUnits> place;; ++place.n) {
      ptx::mbarrier_wait(address(memory_.unit_full[place.index()]), place.parity());
      const Sm90Unit& unit = memory_.units[place.index()];
      if (!unit.exists) return;
      uint8_t* queries = memory_.q[place.index()][group_];
      rows_.clear();
      if (unit.num_tiles > 0) attend(unit, ptx::shared_address(queries));
      end_unit(unit, queries);
      release(memory_.unit_empty[place.index()]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }
  // This warp is done with what the barrier guards.
  __device__ __forceinline__ static void release(const uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(address(barrier));
  }
  __device__ __forceinline__ void sync_group() const {
    ptx::named_barrier_sync<kGroupThreads>(kGroupBarrier + group_);
  }
  __device__ __forceinline__ void wait_for_turn() const {
    ptx::named_barrier_sync<kComputeThreads>(kTurnBarrier + group_);
  }
  __device__ __forceinline__ void give_turn() const {
    ptx::named_barrier_arrive<kComputeThreads>(kTurnBarrier + 1 - group_);
  }
  // This warp's first row in the item's tile.
  __device__ __forceinline__ static int first_row(const Sm90Unit& unit) {
    return unit.first_row + fresh_thread() / kWarpSize * Traits::kWarpRows;
  }

  // Issue S = Q K^T.
  __device__ __forceinline__ void multiply_keys(uint32_t queries, int stage,
                                                ScoreTile<Traits>& s) const {
    const uint64_t q = ptx::wgmma_descriptor(queries, 16);
    const uint64_t k = ptx::wgmma_descriptor(ptx::shared_address(memory_.k[stage]), 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < Traits::kQk; d += 16) {
      const int part = d / kPartColumns, within = d % kPartColumns * 2;
      ptx::wgmma_shared<Q, kTokens>(&s[0][0][0], q + (part * Traits::kGroupPartBytes + within) / 16,
                                    k + (part * Traits::kPartBytes + within) / 16, d > 0);
    }
    ptx::wgmma_commit();
  }

  // Issue O += P V.
  __device__ __forceinline__ void multiply_values(const WeightTile<Traits>& weights, int stage) {
    const uint64_t v =
        ptx::wgmma_descriptor(ptx::shared_address(memory_.v[stage]), Traits::kPartBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      ptx::wgmma_registers<Q, Traits::kVo>(&rows_.o[0][0][0], weights[t],
                                           v + t * 16 * PartRows::kRowBytes / 16);
    }
    ptx::wgmma_commit();
  }

  // Scores of a tile that needs more than the scale become logits.
  __device__ __forceinline__ void mask(const Sm90Unit& unit, int token,
                                       ScoreTile<Traits>& s) const {
    const int first = first_row(unit);
    if (!unit.item.is_scale_only) transform_logits<Traits>(p_, g_, unit.item, first, token, s);
    const KvRange unmasked = unit.unmasked[group_];
    if (token < unmasked.begin || token + kTokens > unmasked.end) {
      mask_logits<Traits>(p_, g_, unit.item, first, token, s);
    }
  }

  __device__ __forceinline__ static void pack_weights(const ScoreTile<Traits>& s,
                                                      WeightTile<Traits>& weights) {
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = s[0][2 * t + i / 2] + i % 2 * 2;
        weights[t][i] = ptx::pack_pair<Q>(pair[0], pair[1]);
      }
    }
  }

  // Rows of a tile of V whose weights are 0 must be zeros too: they may hold anything, and nothing
  // else times 0 is sure to be 0. Both groups do so, and neither waits for the other.
  __device__ __forceinline__ void clear_values(int begin, int end, int stage) const {
    constexpr int kChunks = Traits::kVoParts * PartRows::kChunks;
    for (int n = threadIdx.x % kGroupThreads; n < (end - begin) * kChunks; n += kGroupThreads) {
      const int row = begin + n / kChunks, chunk = n % kChunks;
      uint8_t* part = memory_.v[stage] + chunk / PartRows::kChunks * Traits::kPartBytes;
      *reinterpret_cast<uint4*>(part + PartRows::offset(row, chunk % PartRows::kChunks)) =
          make_uint4(0, 0, 0, 0);
    }
    ptx::fence_async_proxy();
    sync_group();
  }

  // Add the weighted values of the tile before while the weights of this one are computed. The
  // values of the current tile have arrived at the end of every step.
  template <bool kIsFree>
  __device__ __forceinline__ void step(const Sm90Unit& unit, uint32_t queries, int token,
                                       float scale, WeightTile<Traits>& weights) {
    const int stage = tile_.index();
    ++tile_.n;
    ScoreTile<Traits> s;
    float factors[2];
    ptx::mbarrier_wait(address(memory_.k_full[tile_.index()]), tile_.parity());
    wait_for_turn();
    multiply_keys(queries, tile_.index(), s);
    multiply_values(weights, stage);
    give_turn();
    ptx::wgmma_wait<1>();
    ptx::wgmma_finished<kTokens / 2>(&s[0][0][0]);
    release(memory_.k_empty[tile_.index()]);
    if constexpr (!kIsFree) mask(unit, token, s);
    const bool moved = move_maxima<Traits>(
        s, scale, rows_, [&](int /*m*/, int h, float factor) { factors[h] = factor; });
    add_weights<Traits>(s, scale, rows_);
    // Without this loop in between, the assembler moves the wait below up before the weights.
    ptx::mbarrier_wait(address(memory_.v_full[tile_.index()]), tile_.parity());
    ptx::wgmma_wait<0>();
    ptx::wgmma_finished<Traits::kVo / 2>(&rows_.o[0][0][0]);
    release(memory_.v_empty[stage]);
    if (moved) {
      scale_output<Traits>(rows_.o, 0, 0, factors[0]);
      scale_output<Traits>(rows_.o, 0, 1, factors[1]);
    }
    pack_weights(s, weights);
  }

  __device__ __forceinline__ void first_step(const Sm90Unit& unit, uint32_t queries, int token,
                                             float scale, WeightTile<Traits>& weights) {
    const int stage = tile_.index();
    ScoreTile<Traits> s;
    ptx::mbarrier_wait(address(memory_.k_full[stage]), tile_.parity());
    multiply_keys(queries, stage, s);
    ptx::wgmma_wait<0>();
    ptx::wgmma_finished<kTokens / 2>(&s[0][0][0]);
    release(memory_.k_empty[stage]);
    mask(unit, token, s);
    move_maxima<Traits>(s, scale, rows_, [](int, int, float) {});  // there is no output yet
    add_weights<Traits>(s, scale, rows_);
    pack_weights(s, weights);
    ptx::mbarrier_wait(address(memory_.v_full[stage]), tile_.parity());
    const int past_end = unit.tokens.end - token;
    if (past_end < kTokens) clear_values(past_end, kTokens, stage);
  }

  // Add the weighted values of the unit's first tokens, which were computed last.
  __device__ __forceinline__ void last_step(const Sm90Unit& unit,
                                            const WeightTile<Traits>& weights) {
    const int stage = tile_.index();
    const int before_begin = unit.tokens.begin - unit.first_token;
    if (before_begin > 0) clear_values(0, before_begin, stage);
    multiply_values(weights, stage);
    ptx::wgmma_wait<0>();
    ptx::wgmma_finished<Traits::kVo / 2>(&rows_.o[0][0][0]);
    release(memory_.v_empty[stage]);
    ++tile_.n;
  }

  __device__ __forceinline__ void attend(const Sm90Unit& unit, uint32_t queries) {
    const float scale = unit.item.is_scale_only ? unit.item.scale : 1.f;
    const KvRange free = unit.free[group_];
    const int first_token = unit.first_token;
    int token = first_token + (unit.num_tiles - 1) * kTokens;
    WeightTile<Traits> weights;
    first_step(unit, queries, token, scale, weights);
#pragma unroll 1
    for (token -= kTokens; token >= first_token; token -= kTokens) {
      if (token >= free.begin && token + kTokens <= free.end) {
        step<true>(unit, queries, token, scale, weights);
      } else {
        step<false>(unit, queries, token, scale, weights);
      }
    }
    last_step(unit, weights);
  }

  __device__ __forceinline__ void end_unit(const Sm90Unit& unit, uint8_t* queries) {
    const WorkPiece& piece = unit.item.piece;
    const int first = first_row(unit);
    rows_.sum_rows();
    if (piece.whole()) {
      sync_group();  // other warps' products have read the queries, whose place the output takes
      const int warp = threadIdx.x % kGroupThreads / kWarpSize;
      uint8_t* buffer = queries + warp * Traits::kWarpRows * Traits::OutRows::kRowBytes;
      write_output<Traits>(p_, g_, unit.item, first, rows_, buffer);
      return;
    }
    const ItemHolders& holders = unit.item.holders;
    write_partial<Traits>(PartialItem<Traits>(p_, holders, holders.rank), piece.num_rows, first,
                          rows_);
    if (!unit.is_last) return;
    end_part<Traits>(p_, g_, unit.item, &memory_.is_last_holder,
                     [] { ptx::named_barrier_sync<kComputeThreads>(kComputeBarrier); });
  }

  const AttentionParams& p_;
  const WorkGeometry& g_;
  Memory& memory_;
  int group_;
  FixedRingPlace<Traits::kStages> tile_;
  RowStates<Traits> rows_;
};

}  // namespace fi
