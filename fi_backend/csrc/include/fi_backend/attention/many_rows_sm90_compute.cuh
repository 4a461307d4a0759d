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
#include <fi_backend/attention/many_rows_sm90_softmax.cuh>
#include <fi_backend/ptx/named_barrier.cuh>
#include <fi_backend/ptx/tma.cuh>
#include <fi_backend/ptx/wgmma.cuh>

namespace fi {

template <class Traits>
class Sm90Computer {
  using Memory = Sm90Memory<Traits>;
  using Unit = Sm90Unit<Traits>;
  using Variant = typename Traits::Variant;
  using Q = typename Traits::Q;
  static constexpr int kTokens = Traits::kTokens;

 public:
  __device__ __forceinline__ Sm90Computer(const ManyRowsSm90Params& params, Memory& memory,
                                          int group)
      : params_(params),
        p_(params.attention),
        // Not the copy in shared memory: the compiler takes only what lies here to be the same in
        // all lanes, and without that leaves the tensor cores waiting for descriptors.
        g_(*reinterpret_cast<const WorkGeometry*>(params.attention.plan)),
        memory_(memory),
        group_(group) {}

  __device__ __forceinline__ void run() {
    if (group_ == Traits::kGroups - 1) give_turn();  // group 0 begins
    for (FixedRingPlace<Traits::kUnits> place;; ++place.n) {
      ptx::mbarrier_wait(address(memory_.unit_full[place.index()]), place.parity());
      ptx::fence_async_proxy();  // of the query rows, which threads have copied
      const Unit& unit = memory_.units[place.index()];
      if (!unit.exists) return;
      rows_.clear();
      if (unit.num_tiles > 0) attend(unit, place.index());
      end_unit(unit);
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
    ptx::named_barrier_sync<2 * kGroupThreads>(kTurnBarrier + group_);
  }
  __device__ __forceinline__ void give_turn() const {
    const int next = group_ == Traits::kGroups - 1 ? 0 : group_ + 1;
    ptx::named_barrier_arrive<2 * kGroupThreads>(kTurnBarrier + next);
  }
  // This warp's first row in the item's tile.
  __device__ __forceinline__ static int first_row(const Unit& unit) {
    return unit.first_row + fresh_thread() / kWarpSize * Traits::kWarpRows;
  }

  // What is left to do to scores when they have been made.
  __device__ __forceinline__ static float score_scale(const Unit& unit) {
    return unit.item.is_scale_only ? unit.item.scale : score_unit<Variant>();
  }

  // Wait for a tile of K or V.
  __device__ __forceinline__ void wait_for_tile(const uint64_t& full,
                                                const FixedRingPlace<Traits::kStages>& tile) const {
    ptx::mbarrier_wait(address(full), tile.parity());
    if (!params_.has_maps()) ptx::fence_async_proxy();  // threads have copied it
  }

  // Issue S = Q K^T.
  __device__ __forceinline__ void multiply_keys(int queries, int stage,
                                                ScoreTile<Traits>& s) const {
    using QBlocks = typename Traits::QueryBlocks;
    using KBlocks = typename Traits::KTile::Blocks;
    uint32_t rows = ptx::shared_address(memory_.q[queries][group_]);
    // Where there is but one place for queries, its descriptors would be kept for all units, in
    // registers that wide heads do not leave.
    if constexpr (Traits::kUnits == 1) asm volatile("" : "+r"(rows));
    const ptx::WgmmaMatrix q(rows, QBlocks::kNextRows, 0);
    const ptx::WgmmaMatrix k(ptx::shared_address(memory_.k[stage]), KBlocks::kNextRows, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < Traits::kQk; d += 16) {
      const int part = d / kPartColumns, within = d % kPartColumns * 2;
      ptx::wgmma_shared<Q, kTokens>(&s[0][0][0], q.at(part * QBlocks::kNextColumns + within),
                                    k.at(part * KBlocks::kNextColumns + within), d > 0);
    }
    ptx::wgmma_commit();
  }

  // Issue O += P V.
  __device__ __forceinline__ void multiply_values(const WeightTile<Traits>& weights, int stage) {
    using Blocks = typename Traits::VTile::Blocks;
    const ptx::WgmmaMatrix v(ptx::shared_address(memory_.v[stage]), Blocks::kNextRows,
                             Blocks::kNextColumns);
    ptx::wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      ptx::wgmma_registers<typename Traits::Weight, Traits::kVo>(
          &rows_.o[0][0][0], weights[t], v.at(t * (16 / kBlockRows) * Blocks::kNextRows));
    }
    ptx::wgmma_commit();
  }

  // Rows of a tile of V whose weights are 0 must be zeros too: they may hold anything, and nothing
  // else times 0 is sure to be 0. Both groups do so, and neither waits for the other.
  __device__ __forceinline__ void clear_values(int begin, int end, int stage) const {
    constexpr int kChunks = Traits::VTile::kParts * PartRows::kChunks;
#pragma unroll 1
    for (int n = fresh_thread() % kGroupThreads; n < (end - begin) * kChunks; n += kGroupThreads) {
      uint8_t* to =
          memory_.v[stage] + Traits::VTile::Blocks::offset(begin + n / kChunks, n % kChunks);
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_async_proxy();
    sync_group();
  }
  // Boxes past the end are zeros already, and rows that are copied one by one are those of tokens.
  __device__ __forceinline__ void clear_past_end(const Unit& unit, int token) const {
    const int past_end = unit.tokens.end - token;
    if (kSkipsTiles<Variant> && past_end >= kTokens) return;  // tiles after this one are left out
    const int box_tokens = params_.v.box_tokens;
    const int box_end = (past_end + box_tokens - 1) & -box_tokens;  // a power of two, or 0
    if (past_end >= box_end) return;
    wait_for_tile(memory_.v_full[tile_.index()], tile_);
    clear_values(past_end, box_end, tile_.index());
  }
  // Tiles are taken in turn, K and V of one at the same place: tile_ is the next one.
  __device__ __forceinline__ FixedRingPlace<Traits::kStages> tile_before() const {
    return {tile_.n - 1};
  }

  // Weights of the tile with the scores s. wait() comes back as soon as the products of the tile
  // before are done.
  template <class Wait>
  __device__ __forceinline__ void make_weights(const ScoreTile<Traits>& s, float scale,
                                               WeightTile<Traits>& weights, const Wait& wait) {
    // No sum is larger where move_maxima() would leave all maxima as they are.
    constexpr float kLargest = Traits::kTokens / 4 * (1 << int(kMaxSlack));
    float sums[2];
    pack_weights<Traits>(s, scale, rows_.sums, weights, sums, wait);
    if constexpr (!Variant::kUsesSoftmax) return;
    if (__any_sync(kFullWarp, fmaxf(sums[0], sums[1]) > kLargest)) {
      const bool is_large[2] = {max_over_row(sums[0]) > kLargest, max_over_row(sums[1]) > kLargest};
      move_maxima<Traits>(
          s, scale, rows_, [&](int, int h) { return is_large[h]; },
          [&](int m, int h, float factor) { scale_output<Traits>(rows_.o, m, h, factor); });
      pack_weights<Traits>(s, scale, rows_.sums, weights, sums, [] {});
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) rows_.sums.sum[0][h] += sums[h];
  }

  // Add the weighted values of the tile before, and compute the weights of this one. kIsFree: its
  // scores need but the scale.
  template <bool kIsFree>
  __device__ __forceinline__ void step(const Unit& unit, int queries, int token,
                                       WeightTile<Traits>& weights) {
    const int stage = tile_.index();
    const FixedRingPlace<Traits::kStages> before = tile_before();
    ScoreTile<Traits> s;
    wait_for_tile(memory_.k_full[stage], tile_);
    wait_for_turn();
    multiply_keys(queries, stage, s);
    wait_for_tile(memory_.v_full[before.index()], before);
    multiply_values(weights, before.index());
    give_turn();
    float scale = kIsFree ? unit.item.scale : score_scale(unit);
    ptx::wgmma_wait<1>();
    ptx::wgmma_finished<kTokens / 2>(&s[0][0][0]);
    release(memory_.k_empty[stage]);
    if constexpr (!kIsFree) {
      make_scores<Traits>(p_, memory_.geometry(), unit.item, unit.unmasked[group_], first_row(unit),
                          token, s);
      scale = score_scale(unit);  // anew: masks leave no register to keep it in
    }
    make_weights(s, scale, weights, [&] {
      ptx::wgmma_wait<0>();
      ptx::wgmma_finished<Traits::kVo / 2>(&rows_.o[0][0][0]);
      release(memory_.v_empty[before.index()]);
    });
    ++tile_.n;
  }

  __device__ __forceinline__ void first_step(const Unit& unit, int queries, int token,
                                             WeightTile<Traits>& weights) {
    const int stage = tile_.index();
    ScoreTile<Traits> s;
    wait_for_tile(memory_.k_full[stage], tile_);
    multiply_keys(queries, stage, s);
    ptx::wgmma_wait<0>();
    ptx::wgmma_finished<kTokens / 2>(&s[0][0][0]);
    release(memory_.k_empty[stage]);
    make_scores<Traits>(p_, memory_.geometry(), unit.item, unit.unmasked[group_], first_row(unit),
                        token, s);
    const float scale = score_scale(unit);
    move_maxima<Traits>(
        s, scale, rows_, [](int, int) { return true; },
        [](int, int, float) {});  // there is no output yet
    pack_weights<Traits>(s, scale, rows_.sums, weights, rows_.sums.sum[0], [] {});
    clear_past_end(unit, token);
    ++tile_.n;
  }

  // Add the weighted values of the unit's first tokens, which were computed last.
  __device__ __forceinline__ void last_step(const Unit& unit, const WeightTile<Traits>& weights) {
    const FixedRingPlace<Traits::kStages> before = tile_before();
    const int before_begin = unit.tokens.begin - unit.tile_token(0);
    wait_for_tile(memory_.v_full[before.index()], before);
    if (before_begin > 0) clear_values(0, before_begin, before.index());
    multiply_values(weights, before.index());
    ptx::wgmma_wait<0>();
    ptx::wgmma_finished<Traits::kVo / 2>(&rows_.o[0][0][0]);
    release(memory_.v_empty[before.index()]);
  }

  // Whether the scores of a tile need but the scale. A variant makes scores of every tile's logits.
  __device__ __forceinline__ bool is_free(const Unit& unit, int token) const {
    if constexpr (kHasScores<Variant>) return false;
    const KvRange& free = unit.free[group_];
    return token >= free.begin && token + kTokens <= free.end;
  }

  __device__ __forceinline__ void attend(const Unit& unit, int queries) {
    if constexpr (kSkipsTiles<Variant>) return attend_seen(unit, queries);
    const int first_token = unit.first_token;
    int token = first_token + (unit.num_tiles - 1) * kTokens;
    WeightTile<Traits> weights;
    first_step(unit, queries, token, weights);
    token -= kTokens;
    if constexpr (Traits::kIsFp8Cache) {
      // Beside warps that widen there are no registers for another loop.
      const KvRange free = unit.free[group_];
#pragma unroll 1
      for (; token >= first_token; token -= kTokens) {
        if (!kHasScores<Variant> && token >= free.begin && token + kTokens <= free.end) {
          step<true>(unit, queries, token, weights);
        } else {
          step<false>(unit, queries, token, weights);
        }
      }
    } else {
#pragma unroll 1
      while (token >= first_token) {
        if (!is_free(unit, token)) {
          step<false>(unit, queries, token, weights);
          token -= kTokens;
          continue;
        }
        const int last_free = max(unit.free[group_].begin, first_token);
#pragma unroll 1
        do {
          step<true>(unit, queries, token, weights);
          token -= kTokens;
        } while (token >= last_free);
      }
    }
    last_step(unit, weights);
  }

  // The same, of some of the tiles.
  __device__ __forceinline__ void attend_seen(const Unit& unit, int queries) {
    const KvRange& free = unit.free[group_];
    int n = unit.num_tiles - 1;
    int token = unit.tile_token(n);
    WeightTile<Traits> weights;
    first_step(unit, queries, token, weights);
#pragma unroll 1
    for (--n; n >= 0; --n) {
      const SeenTile tile = unit.seen_tile(n);
      token = unit.first_token + tile.index() * kTokens;
      if (kScalesLate<Variant> && tile.is_free() && token >= free.begin &&
          token + kTokens <= free.end) {
        step<true>(unit, queries, token, weights);
      } else {
        step<false>(unit, queries, token, weights);
      }
    }
    last_step(unit, weights);
  }

  __device__ __forceinline__ void end_unit(const Unit& unit) {
    const WorkPiece& piece = unit.item.piece;
    const int first = first_row(unit);
    rows_.sums.add_lanes();
    if (kKeepsParts<Variant> || piece.whole()) {
      write_output<Traits>(p_, memory_.geometry(), unit.item, first, rows_);
      return;
    }
    const ItemHolders& holders = unit.item.holders;
    write_partial<Traits>(PartialItem<Traits>(p_, holders, holders.rank), piece.num_rows, first,
                          rows_);
    if (!unit.is_last) return;
    end_part<Traits>(p_, g_, unit.item, &memory_.is_last_holder,
                     [] { ptx::named_barrier_sync<Traits::kComputeThreads>(kComputeBarrier); });
  }

  const ManyRowsSm90Params& params_;
  const AttentionParams& p_;
  const WorkGeometry& g_;
  Memory& memory_;
  int group_;
  FixedRingPlace<Traits::kStages> tile_;
  RowStates<Traits> rows_;
};

}  // namespace fi
