// From scores to weights, for the rows of one warp: logits, masks, online softmax in base 2.
#pragma once

#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_products.cuh>
#include <fi_backend/attention/variant.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/math.cuh>

namespace fi {

inline constexpr float kLowestFloat = -3.402823466e38f;

// Rows m, h of a lane are 16 * m + 8 * h + lane / 4 of its warp.
template <class Traits>
struct RowSums {
  float max[Traits::kRowBlocks][2];
  float sum[Traits::kRowBlocks][2];  // of this lane's columns alone until add_lanes()

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        max[m][h] = first_maximum<typename Traits::Variant>();
        sum[m][h] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[m][h] = sum_over_lanes(sum[m][h], 4);
    }
  }
};

template <class Traits>
struct RowStates {
  OutputTile<Traits> o;  // not normalised
  RowSums<Traits> sums;

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int j = 0; j < Traits::kVo / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][j][e] = 0.f;
      }
    }
  }
  __device__ __forceinline__ void clear() {
    sums.clear();
    clear_output();
  }
};

// The first token of a tile whose scores this lane holds; the others are at known distances.
__device__ __forceinline__ int lane_token(int first_token) {
  return first_token + fresh_thread() % 4 * 2;
}

// Call fn(row, distance, x) for every score x of this lane, row by row. Rows that do not exist do
// as the last one does. first_row: of the warp, in the tile.
template <class Traits, class Fn>
__device__ __forceinline__ void for_each_score(const AttentionParams& p, const WorkGeometry& g,
                                               const ManyRowsItem& item, int first_row,
                                               ScoreTile<Traits>& s, const Fn& fn) {
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Registers are full of scores and outputs: load for one row at a time.
      asm volatile("" ::: "memory");
      const int i = first_row + 16 * m + 8 * h + lane / 4;
      const LogitRow row = tile_row(p, g, item, min(i, item.piece.num_rows - 1));
#pragma unroll
      for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) fn(row, 8 * j + e, s[m][j][2 * h + e]);
      }
    }
  }
}

// Turn products into logits: one step after the other over all scores, because what a row needs to
// know about itself takes registers.
template <class Traits>
__device__ __forceinline__ void transform_logits(const AttentionParams& p, const WorkGeometry& g,
                                                 const ManyRowsItem& item, int first_row,
                                                 int first_token, ScoreTile<Traits>& s) {
  const float cap = p.soft_cap * logit_unit<typename Traits::Variant>();
  // Scores that are capped side by side: a branch for each would keep them apart, and more of them
  // than these take registers.
  constexpr int kColumns = 4;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int first = 0; first < Traits::kTokens / 8; first += kColumns) {
      const auto x = [&](int i) -> float& { return s[m][first + i / 4][i % 4]; };
#pragma unroll
      for (int i = 0; i < 4 * kColumns; ++i) x(i) *= item.scale;
      if (cap == 0.f) continue;
#pragma unroll
      for (int i = 0; i < 4 * kColumns; ++i) x(i) = soft_cap_tanh(x(i)) * cap;
    }
  }
  if (p.alibi_slopes == nullptr) return;
  const int token = lane_token(first_token);
  for_each_score<Traits>(p, g, item, first_row, s,
                         [&](const LogitRow& row, int distance, float& x) {
                           x += row.slope * static_cast<float>(token + distance - row.position);
                         });
}

// How many of a lane's scores of a row, of a tile, are of tokens before `end`, counted from the
// lane's first one: bits so many make a mask of.
template <class Traits>
__device__ __forceinline__ int scores_before(int end) {
  const int clamped = min(max(end, 0), Traits::kTokens);
  return clamped / 8 * 2 + min(clamped % 8, 2);
}

// Put -inf where a row does not see a token, or where the piece has none. Which those are is found
// out for a row at a time and kept in bits: registers are full of scores and outputs.
template <class Traits>
__device__ __forceinline__ void mask_logits(const AttentionParams& p, const WorkGeometry& g,
                                            const ManyRowsItem& item, int first_row,
                                            int first_token, ScoreTile<Traits>& s) {
  static_assert(Traits::kTokens / 4 <= 32, "a bit for each score");
  const int token = lane_token(first_token);
  const KvRange& tokens = item.piece.tokens;
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_row + 16 * m + 8 * h + lane / 4;
      const LogitRow row = tile_row(p, g, item, min(i, item.piece.num_rows - 1));
      const int begin = Traits::kTilesBeginEarly ? max(row.begin, tokens.begin) : row.begin;
      const int end = min(row.end, tokens.end);
      uint32_t seen = low_bits(scores_before<Traits>(end - token)) &
                      ~low_bits(scores_before<Traits>(begin - token));
      if (p.custom_mask != nullptr) {
        const uint8_t* mask = p.custom_mask + p.mask_indptr[item.piece.request];
        const int64_t first_bit = int64_t{row.qo_idx} * item.piece.kv_len + token;
#pragma unroll 1
        for (uint32_t left = seen; left != 0; left &= left - 1) {
          const int n = __ffs(left) - 1;
          const int64_t bit = first_bit + n / 2 * 8 + n % 2;
          if (!(mask[bit >> 3] >> (bit & 7) & 1)) seen &= ~(1u << n);
        }
      }
#pragma unroll
      for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!(seen >> (2 * j + e) & 1)) s[m][j][2 * h + e] = minus_infinity();
        }
      }
    }
  }
}

// Which of a lane's scores of a row, of a tile, its variant lets the row see: a bit each. What the
// variant loads for them would take more registers than there are, so it does so for a few scores
// at a time, or once for a block of keys that are seen together.
template <class Traits, bool kIsMasked>
__device__ __forceinline__ uint32_t seen_bits(const PieceVariant<typename Traits::Variant>& variant,
                                              const variants::Row& row, int token) {
  using Piece = PieceVariant<typename Traits::Variant>;
  static_assert(Traits::kTokens / 4 <= 32, "a bit for each score");
  constexpr int kBlock = kSeenTogether<typename Traits::Variant>;
  uint32_t bits = 0;
  if constexpr (kBlock > 8) {
    // A tile may begin inside of a block, and its last blocks may have no key.
    constexpr bool kFits = Traits::kTokens % kBlock == 0 || kBlock % Traits::kTokens == 0;
    constexpr int kBlocks = Traits::kTilesAreAligned && kFits
                                ? (Traits::kTokens + kBlock - 1) / kBlock
                                : (Traits::kTokens + kBlock - 2) / kBlock + 1;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const int begin = (token / kBlock + n) * kBlock;
      const variants::Pair at = Piece::template pair<true>(row, max(begin, token));
      if (!variant.sees(at)) continue;
      bits |= low_bits(scores_before<Traits>(begin + kBlock - token)) &
              ~low_bits(scores_before<Traits>(begin - token));
    }
  } else {
#pragma unroll 4
    for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const variants::Pair at = Piece::template pair<kIsMasked>(row, token + 8 * j + e);
        bits |= uint32_t{variant.sees(at)} << (2 * j + e);
      }
    }
  }
  return bits;
}

// Make a variant's scores, in units of score_unit(), of logits, of which a mask has hidden some
// where kIsMasked.
template <class Traits, bool kIsMasked>
__device__ __forceinline__ void apply_variant(const AttentionParams& p, const WorkGeometry& g,
                                              const ManyRowsItem& item, int first_row,
                                              int first_token, ScoreTile<Traits>& s) {
  using Variant = typename Traits::Variant;
  using Piece = PieceVariant<Variant>;
  const Piece variant(p, item.piece);
  const int token = lane_token(first_token);
  const int lane = fresh_thread() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_row + 16 * m + 8 * h + lane / 4;
      const LogitRow tile = tile_row(p, g, item, min(i, item.piece.num_rows - 1));
      const variants::Row row = variant.row(tile.qo_idx, tile.head);
      uint32_t seen = ~0u;
      if constexpr (kHasMask<Variant>) seen = seen_bits<Traits, kIsMasked>(variant, row, token);
#pragma unroll
      for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[m][j][2 * h + e];
          const variants::Pair at = Piece::template pair<kIsMasked>(row, token + 8 * j + e);
          x = variant.template unscaled<kIsMasked>(x, at);
          if (!(seen >> (2 * j + e) & 1)) x = hidden_score<Variant>();
        }
      }
    }
  }
}

// Turn products into scores. `unmasked`: tokens that all rows of the warp see.
template <class Traits>
__device__ __forceinline__ void make_scores(const AttentionParams& p, const WorkGeometry& g,
                                            const ManyRowsItem& item, const KvRange& unmasked,
                                            int first_row, int first_token, ScoreTile<Traits>& s) {
  if (!item.is_scale_only) transform_logits<Traits>(p, g, item, first_row, first_token, s);
  const bool is_masked =
      first_token < unmasked.begin || first_token + Traits::kTokens > unmasked.end;
  if (is_masked) mask_logits<Traits>(p, g, item, first_row, first_token, s);
  if constexpr (kHasScores<typename Traits::Variant>) {
    is_masked ? apply_variant<Traits, true>(p, g, item, first_row, first_token, s)
              : apply_variant<Traits, false>(p, g, item, first_row, first_token, s);
  }
}

__device__ __forceinline__ float max_over_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Move the maxima of rows whose logits in s, times a positive scale, are far above, and of which
// may_move(m, h) is true, in all lanes of a row. For each row of a warp where any moves,
// on_move(m, h, factor) gets what turns weights under the old maximum into weights under the new
// one, 1 where a row stays. Returns whether it was called.
template <class Traits, class May, class Fn>
__device__ __forceinline__ bool move_maxima(const ScoreTile<Traits>& s, float scale,
                                            RowStates<Traits>& rows, const May& may_move,
                                            const Fn& on_move) {
  if constexpr (!Traits::Variant::kUsesSoftmax) return false;
  constexpr int kColumns = Traits::kTokens / 8;
  // Lanes of a row need not ask each other in most tiles; but with more rows that takes registers.
  constexpr bool kAsksLate = Traits::kRowBlocks == 1;
  float top[Traits::kRowBlocks][2];
  bool grows = false;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
      for (int j = 1; j < kColumns; ++j) {
        highest = fmaxf(highest, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
      }
      if constexpr (!kAsksLate) highest = max_over_row(highest);
      top[m][h] = highest * scale;
      grows |= top[m][h] > rows.sums.max[m][h] + kMaxSlack;
    }
  }
  if (!__any_sync(kFullWarp, grows)) return false;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kAsksLate) top[m][h] = max_over_row(top[m][h]);
      const float old_max = rows.sums.max[m][h];
      // A row moves for its own sake alone: its bits must not depend on the rows beside it.
      const bool moves = may_move(m, h) && top[m][h] > old_max + kMaxSlack;
      const float new_max = moves ? top[m][h] : old_max;
      // A row that has seen no key keeps -inf: its factor, of nothing, is 1.
      const float factor = new_max == old_max ? 1.f : ptx::exp2_approx(old_max - new_max);
      rows.sums.max[m][h] = new_max;
      rows.sums.sum[m][h] *= factor;
      on_move(m, h, factor);
    }
  }
  return true;
}

// Scale the output of rows m, h of a lane.
template <class Traits>
__device__ __forceinline__ void scale_output(OutputTile<Traits>& o, int m, int h, float factor) {
#pragma unroll
  for (int j = 0; j < Traits::kVo / 8; ++j) {
    o[m][j][2 * h] *= factor;
    o[m][j][2 * h + 1] *= factor;
  }
}

// Turn s, times the scale the logits of a tile, into weights under the rows' maxima, and add them
// to the rows' sums. Without softmax they are weights, and nobody needs their sums.
template <class Traits>
__device__ __forceinline__ void add_weights(ScoreTile<Traits>& s, float scale,
                                            RowStates<Traits>& rows) {
  if constexpr (Traits::Variant::kUsesSoftmax) {
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Not -inf - -inf where a row has seen no key: its weights are 0 under any finite maximum.
        const float base = -fmaxf(rows.sums.max[m][h], kLowestFloat);
        // An addition takes longer than a weight: two sums, where there are no other rows beside.
        constexpr int kSums = 2;
        float sum[kSums] = {};
#pragma unroll
        for (int j = 0; j < Traits::kTokens / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][j][2 * h + e];
            x = ptx::exp2_approx(fmaf(x, scale, base));
            sum[e % kSums] += x;
          }
        }
        rows.sums.sum[m][h] += kSums == 1 ? sum[0] : sum[0] + sum[kSums - 1];
      }
    }
  }
}

}  // namespace fi
