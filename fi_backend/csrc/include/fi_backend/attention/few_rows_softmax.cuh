// Online softmax of one warp over its tiles, in the accumulators of the tensor cores.
#pragma once

#include <fi_backend/attention/few_rows_products.cuh>
#include <fi_backend/attention/variant.cuh>
#include <fi_backend/ptx/math.cuh>

namespace fi {

// Place of an accumulator in a block of rows in shared memory. Rows that the lanes of a warp write
// together get other banks.
template <class Traits>
__device__ __forceinline__ int scratch_offset(int row, int column) {
  return row * Traits::kVo + (column ^ (row / 2 % 4 * 8));
}

// kBlocks blocks of 8 packed rows: of a unit's, every kRowGroups-th.
template <class Traits, int kBlocks>
class FewRowsSoftmax {
  using Products = FewRowsProducts<Traits>;
  using Variant = typename Traits::Variant;
  static constexpr int kVoBlocks = Products::kVoBlocks;
  static constexpr int kTiles = Traits::kTilesAtOnce;
  // Of a row that has seen no key: unlike minus infinity, weights can be relative to it.
  static constexpr float kNoMaximum = -3e38f;

 public:
  // q: shared address of the first block of query rows; `rows` describes them, in shared memory
  // too.
  __device__ __forceinline__ FewRowsSoftmax(uint32_t q, const LogitRow* rows,
                                            const LogitTransform& transform,
                                            const KvRange& keys_all_see,
                                            const PieceVariant<Variant>& variant)
      : queries_(q),
        rows_(rows),
        transform_(transform),
        unmasked_{keys_all_see.begin, keys_all_see.end - Traits::kTokensAtOnce},
        last_scaled_(transform.is_scale_only() ? unmasked_.end : -1),
        variant_(variant) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        max_[n][j] = Variant::kUsesSoftmax ? kNoMaximum : first_maximum<Variant>();
        sum_[n][j] = 0.f;
        scale_[n][j] = row(n, j).scale;
      }
    }
  }

  // Attend to kTiles tiles of keys, `first` to `end` - 1; `keys`: where the lane reads them, and
  // `next_values` waits for their values.
  template <class NextValues>
  __device__ __forceinline__ void attend(uint32_t keys, int32_t first, int32_t end,
                                         const NextValues& next_values) {
    float s[kTiles][kBlocks][4] = {};
    Products::template scores<kTiles, kBlocks>(queries_, keys, s);
    make_scores(s, first, end);
    if constexpr (Variant::kUsesSoftmax) raise_maximum(s);
    uint32_t p[kTiles][kBlocks][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (Variant::kUsesSoftmax) {
            s[t][n][i] = ptx::exp2_approx(s[t][n][i] - max_[n][i % 2]);
            sum_[n][i % 2] += s[t][n][i];
          }
        }
        Products::pack_weights(s[t][n], p[t][n]);
      }
    }
    const uint32_t values = next_values();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      Products::template values<kBlocks>(values, t, p[t], o_);
    }
  }

  // Add up what the lanes have of each row's sum; a row that has seen no key has no maximum. A row
  // whose logits are all NaN must not look like that.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum_[n][j] = over_tokens(sum_[n][j], Add());
        if (Variant::kUsesSoftmax && max_[n][j] == kNoMaximum) max_[n][j] = minus_infinity();
        if (sum_[n][j] != sum_[n][j]) max_[n][j] = 0.f;
      }
    }
  }

  // Store block n: its states [kRowBlock] and its accumulators [kRowBlock, kVo], swizzled.
  __device__ __forceinline__ void store(int n, SoftmaxState* states, float* values) const {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) states[2 * lane + j] = {max_[n][j], sum_[n][j]};
    }
#pragma unroll
    for (int m = 0; m < kVoBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = Products::row_in_block(i);
        values[scratch_offset<Traits>(row, Products::value_column(m, i))] = o_[m][n][i];
      }
    }
  }

 private:
  struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  };
  struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  };

  // Reduce over the lanes that hold other tokens of the same rows.
  template <class Op>
  __device__ __forceinline__ static float over_tokens(float x, const Op& op) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      x = op(x, __shfl_xor_sync(kFullWarp, x, offset));
    }
    return x;
  }

  // Row j of the lane's two in block n.
  __device__ __forceinline__ const LogitRow& row(int n, int j) const {
    return rows_[n * Traits::kRowGroups * kRowBlock + Products::row_in_block(j)];
  }

  using Scores = float[kTiles][kBlocks][4];

  __device__ __forceinline__ void make_scores(Scores& s, int32_t first, int32_t end) const {
    const bool needs_mask = first < unmasked_.begin || first > unmasked_.end;
    make_logits(s, first, end, needs_mask);
    if constexpr (kHasScores<Variant>) {
      needs_mask ? apply_variant<true>(s, first) : apply_variant<false>(s, first);
    }
  }

  template <bool kIsMasked>
  __device__ __forceinline__ void apply_variant(Scores& s, int32_t first) const {
    constexpr float kFromBase2 = logit_unit<Variant>() / kLog2e;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t key = first + t * kTileTokens + Products::token_in_tile(i);
          const LogitRow& r = row(n, i % 2);
          const auto at =
              PieceVariant<Variant>::template pair<kIsMasked>(variant_.row(r.qo_idx, r.head), key);
          const float score = variant_.template score<kIsMasked>(s[t][n][i] * kFromBase2, at);
          s[t][n][i] = variant_.sees(at) ? score : hidden_score<Variant>();
        }
      }
    }
  }

  __device__ __forceinline__ void make_logits(Scores& s, int32_t first, int32_t end,
                                              bool needs_mask) const {
    if (first >= unmasked_.begin && first <= last_scaled_) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[t][n][i] *= scale_[n][i % 2];
        }
      }
      return;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t key = first + t * kTileTokens + Products::token_in_tile(i);
          const LogitRow& r = row(n, i % 2);
          const float logit = transform_(s[t][n][i], r, key);
          const bool is_seen = !needs_mask || (key < end && transform_.sees(r, key));
          s[t][n][i] = is_seen ? logit : minus_infinity();
        }
      }
    }
  }

  // Raise the maximum of rows that a logit exceeds. Each block of rows for itself: its bits do not
  // depend on how many rows a unit has.
  __device__ __forceinline__ void raise_maximum(const Scores& s) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float highest[2];
      bool exceeds = false;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        highest[j] = fmaxf(s[0][n][j], s[0][n][j + 2]);
#pragma unroll
        for (int t = 1; t < kTiles; ++t) {
          highest[j] = fmaxf(highest[j], fmaxf(s[t][n][j], s[t][n][j + 2]));
        }
        exceeds = exceeds || highest[j] > max_[n][j] + kMaxSlack;
      }
      if (!__any_sync(kFullWarp, exceeds)) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float raised = fmaxf(max_[n][j], over_tokens(highest[j], Max()));
        const float factor = ptx::exp2_approx(max_[n][j] - raised);
        max_[n][j] = raised;
        sum_[n][j] *= factor;
#pragma unroll
        for (int m = 0; m < kVoBlocks; ++m) {
          o_[m][n][j] *= factor;
          o_[m][n][j + 2] *= factor;
        }
      }
    }
  }

  typename Products::template Queries<kBlocks> queries_;
  const LogitRow* rows_;
  LogitTransform transform_;
  KvRange unmasked_;     // first keys of tiles that need no mask: from begin to end
  int32_t last_scaled_;  // the last of them, if a row's scale is all that makes a logit
  PieceVariant<Variant> variant_;
  float scale_[kBlocks][2];
  float max_[kBlocks][2];
  float sum_[kBlocks][2];  // of this lane's tokens, until finish()
  float o_[kVoBlocks][kBlocks][4] = {};
};

}  // namespace fi
