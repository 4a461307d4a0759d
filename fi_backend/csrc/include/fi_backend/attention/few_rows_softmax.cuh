// Online softmax of one warp over its tiles, in the accumulators of the tensor cores.
#pragma once

#include <fi_backend/attention/few_rows_products.cuh>
#include <fi_backend/attention/variant.cuh>
#include <fi_backend/common/fresh_registers.cuh>
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
                                            const AttentionParams& p, const WorkPiece& piece,
                                            const KvRange& keys_all_see)
      : queries_(q),
        rows_(rows),
        p_(p),
        piece_(piece),
        unmasked_{keys_all_see.begin, keys_all_see.end - Traits::kTokensAtOnce},
        last_scaled_(is_scale_only(p) ? unmasked_.end : -1) {
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

  // The key of score i of tile t, from the lane's first one.
  __device__ __forceinline__ static int key_distance(int t, int i) {
    return t * kTileTokens + i / 2 * 8;
  }

  __device__ __forceinline__ void make_scores(Scores& s, int32_t first, int32_t end) const {
    for_each_score(s, [&](int n, int j, int, float& x) { x *= scale_[n][j]; });
    if constexpr (!kHasScores<Variant>) {
      if (first >= unmasked_.begin && first <= last_scaled_) return;
    }
    const int32_t key = first + Products::token_in_tile(0);
    transform_logits(s, key);
    const bool is_masked = first < unmasked_.begin || first > unmasked_.end;
    if (is_masked) mask_logits(s, key, end);
    if constexpr (kHasScores<Variant>) {
      is_masked ? apply_variant<true>(s, key) : apply_variant<false>(s, key);
    }
  }

  // What is left of turning products into logits: one step after the other over all of them,
  // because what a row needs to know about itself takes registers. ALiBi distances count from the
  // row's own position, which keeps them small; finish_row() moves the origin to query 0, where
  // callers have it.
  __device__ __forceinline__ void transform_logits(Scores& s, int32_t key) const {
    if (p_.soft_cap != 0.f) {
      const float cap = p_.soft_cap * kLog2e;
      for_each_score(s, [&](int, int, int, float& x) { x = soft_cap_tanh(x) * cap; });
    }
    if (p_.alibi_slopes == nullptr) return;
    for_each_score(s, [&](int n, int j, int distance, float& x) {
      const LogitRow& r = row(n, j);
      x += r.slope * static_cast<float>(key + distance - r.position);
    });
  }

  // Put -inf where a row does not see a key. Which those are is found out for a row at a time and
  // kept in bits: as predicates they would take the place of those that all tiles need.
  __device__ __forceinline__ void mask_logits(Scores& s, int32_t key, int32_t end) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t seen = seen_keys(row(n, j), key, end);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = j; i < 4; i += 2) {
            if (!(seen >> (key_distance(t, i) / 8) & 1)) s[t][n][i] = minus_infinity();
          }
        }
      }
    }
  }

  // Which of the lane's keys a row sees, from the lane's first one on: a bit each.
  __device__ __forceinline__ uint32_t seen_keys(const LogitRow& r, int32_t key, int32_t end) const {
    constexpr int kKeys = 2 * kTiles;
    uint32_t seen = 0;
#pragma unroll
    for (int m = 0; m < kKeys; ++m) {
      const int32_t k = key + 8 * m;
      seen |= uint32_t{k >= r.begin && k < min(r.end, end)} << m;
    }
    if (p_.custom_mask == nullptr) return seen;
    const uint8_t* mask = p_.custom_mask + p_.mask_indptr[piece_.request];
    const int64_t first_bit = int64_t{r.qo_idx} * piece_.kv_len + key;
#pragma unroll 1
    for (int m = 0; m < kKeys; ++m) {
      const int64_t bit = first_bit + 8 * m;
      if ((seen >> m & 1) && !(mask[bit >> 3] >> (bit & 7) & 1)) seen &= ~(1u << m);
    }
    return seen;
  }

  template <bool kIsMasked>
  __device__ __forceinline__ void apply_variant(Scores& s, int32_t key) const {
    constexpr float kFromBase2 = logit_unit<Variant>() / kLog2e;
    const PieceVariant<Variant> variant(p_, piece_);
    for_each_score(s, [&](int n, int j, int distance, float& x) {
      const LogitRow& r = row(n, j);
      const auto at = PieceVariant<Variant>::template pair<kIsMasked>(variant.row(r.qo_idx, r.head),
                                                                      key + distance);
      const float score = variant.template score<kIsMasked>(x * kFromBase2, at);
      x = variant.sees(at) ? score : hidden_score<Variant>();
    });
  }

  // Call fn(block, row of the lane's two in it, distance of the key, x) for every score x.
  template <class Fn>
  __device__ __forceinline__ static void for_each_score(Scores& s, const Fn& fn) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fn(n, i % 2, key_distance(t, i), s[t][n][i]);
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
  const AttentionParams& p_;
  const WorkPiece& piece_;
  KvRange unmasked_;     // first keys of tiles that need no mask: from begin to end
  int32_t last_scaled_;  // the last of them, if a row's scale is all that makes a logit
  float scale_[kBlocks][2];
  float max_[kBlocks][2];
  float sum_[kBlocks][2];  // of this lane's tokens, until finish()
  float o_[kVoBlocks][kBlocks][4] = {};
};

}  // namespace fi
