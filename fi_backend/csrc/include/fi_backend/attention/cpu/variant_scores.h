// A variant's functions for a block of query rows, lane by lane in loops that compilers make
// vectors of.
#pragma once

#include <fi_backend/attention/cpu/query_tile.h>
#include <fi_backend/attention/variant.h>

namespace fi::cpu {

template <class Variant>
class BlockVariant {
 public:
  static constexpr bool kUsesSoftmax = Variant::kUsesSoftmax;
  static constexpr bool kHasScores = fi::kHasScores<Variant>;
  static constexpr bool kScalesLate = fi::kScalesLate<Variant>;
  static constexpr float kLogitUnit = logit_unit<Variant>();

  // rows: those of the block. hides_nothing: of the keys at hand, from any of them.
  BlockVariant(const AttentionParams& params, const WorkPiece& piece, const PackedRow* rows,
               bool hides_nothing)
      : variant_(variant_of<Variant>(params)),
        piece_(piece),
        rows_(rows),
        hides_nothing_(hides_nothing) {}

  // Make scores of a tile's logits; masks have made some of them -inf.
  void make_scores(const RowBlock& block, float* __restrict__ s, int num_vectors,
                   int32_t first_key) const {
    if (kScalesLate && hides_nothing_) return;  // there is nothing but a mask
    const int lanes = block.num_lanes();
    for (int c = 0; c < lanes; c += kLanes) {
      int32_t tokens[kLanes], heads[kLanes], keys[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        // Rows that do not exist do as the last one does.
        const PackedRow& row = rows_[std::min((c + i) % block.width, block.num_rows - 1)];
        tokens[i] = row.token;
        heads[i] = row.head;
        keys[i] = first_key + (c + i) / block.width;
      }
      for (int u = 0; u < num_vectors; ++u) {
        float* __restrict__ column = s + u * lanes + c;
        const int32_t step = u * block.keys_per_vector();
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
          const int32_t key = std::min(keys[i] + step, piece_.kv_len - 1);
          const float logit = column[i];
          const variants::Pair at = {row_of({tokens[i], heads[i]}), key};
          const float score = variant_score(variant_, logit, at);
          const bool is_seen = variant_sees(variant_, at) & (logit != -INFINITY);
          column[i] = is_seen ? score : hidden_score<Variant>();
        }
      }
    }
  }

  // Change `count` values of row `row`, from dimension `dim` on.
  void change_output(int row, int dim, float* values, int count) const {
    if constexpr (kHasOutput<Variant>) {
      const variants::Row at = row_of(rows_[row]);
      for (int i = 0; i < count; ++i) values[i] = variant_.output(values[i], at, dim + i);
    }
  }

 private:
  variants::Row row_of(const PackedRow& row) const {
    return {piece_.request, piece_.qo_begin + row.token,
            row.token,      piece_.qo_len,
            piece_.kv_len,  row.head,
            piece_.kv_head};
  }

  const Variant& variant_;
  const WorkPiece& piece_;
  const PackedRow* rows_;
  bool hides_nothing_;
};

}  // namespace fi::cpu
