// Attention of one work item on one worker: query rows in blocks, keys in tiles.
#pragma once

#include <fi_backend/attention/cpu/kv_tile.h>
#include <fi_backend/attention/cpu/query_tile.h>
#include <fi_backend/attention/cpu/scores.h>
#include <fi_backend/attention/cpu/variant_scores.h>
#include <fi_backend/attention/seen_blocks.h>
#include <fi_backend/plan/group_rows.h>

#include <cassert>

namespace fi::cpu {

template <class Traits>
class Attend {
 public:
  using Out = typename Traits::Out;
  using Variant = typename Traits::Variant;
  using Shape = TileShape<Traits>;
  using C = typename Shape::C;

  Attend(const AttentionParams& params, const WorkGeometry& geometry, Scratch scratch)
      : params_(params),
        geometry_(geometry),
        queries_(params, geometry, scratch),
        keys_(params, scratch) {
    o_ = scratch.take<float>(int64_t{kStateRows} * Shape::kColumns);
    scores_ = scratch.take<float>(int64_t{Shape::kKeys + kKeyPadding} * kMaxWidth);
    auto* angles = scratch.take<RotaryAngles<Shape::kQk>>(1);
    assert(scratch.num_taken() <= scratch_floats(Shape::kQk, Shape::kVo));
    if (params.rope_theta != 0.0f) {
      angles->init(params.rope_scale, params.rope_theta);
      angles_ = angles;
    }
  }

  // Read the item's query rows and what each may see.
  void begin_item(const WorkPiece& piece) {
    piece_ = piece;
    const int head = piece.kv_head;
    const float k_scale =
        params_.k_scale != nullptr ? params_.k_scale[head] : params_.k_scale_value;
    logits_.scale = params_.sm_scale * k_scale;
    logits_.soft_cap = params_.soft_cap;
    logits_.has_alibi = params_.alibi_slopes != nullptr;
    logits_.mask = params_.custom_mask == nullptr
                       ? nullptr
                       : params_.custom_mask + params_.mask_indptr[piece.request];
    logits_.kv_len = piece.kv_len;
    logits_.qo_len = piece.qo_len;
    queries_.load(piece, angles_);
  }

  // Attend to some of the item's keys from an empty state. `next` is what comes after them: more
  // keys of this item, or the first of another.
  void attend(KvRange tokens, const KeyRange& next) {
    for (int b = 0; b < queries_.num_blocks(); ++b) {
      const RowBlock& block = queries_.block(b);
      std::fill_n(block.max, block.num_lanes(), first_maximum<Variant>());
      std::fill_n(block.sum, block.num_lanes(), 0.0f);
    }
    std::fill_n(is_empty_, Shape::kNumBlocks, true);
    for (KeyRange keys = seen_tile(tokens); keys.count > 0;) {
      keys_.load(keys, angles_);
      const KeyRange after = seen_tile({keys.first + keys.count, tokens.end});
      if constexpr (Shape::kLine == kFewRows) keys_.look_ahead(after.count > 0 ? after : next);
      attend_tile(keys);
      keys = after;
    }
    for (int b = 0; b < queries_.num_blocks(); ++b) {
      fold_sums(queries_.block(b));
      if (is_empty_[b]) {
        std::fill_n(o_row(b * kBlockRows), int64_t{queries_.block(b).num_rows} * Shape::kColumns,
                    0.0f);
      }
    }
  }

  // The first tile of some keys of an item. Tiles of the many-row line end at multiples of their
  // size, or those of a windowed row would lie where the rows beside it want them.
  static KeyRange tile_of(const WorkPiece& piece, KvRange tokens) {
    const int32_t left = tokens.end - tokens.begin;
    const int32_t before = Shape::kLine == kManyRows ? tokens.begin % Shape::kKeys : 0;
    const int32_t count = std::min<int32_t>(Shape::kKeys - before, left);
    return {piece.request, piece.kv_head, tokens.begin, count};
  }

  // Store the state: [num_rows, kVo + kPartialTail].
  void save_state(float* partial) const {
    for (int row = 0; row < piece_.num_rows; ++row, partial += kPartialSize) {
      std::copy_n(o_row(row), Shape::kVo, partial);
      partial[Shape::kVo] = queries_.max()[row];
      partial[Shape::kVo + 1] = queries_.sum()[row];
    }
  }
  void load_state(const float* partial) {
    for (int row = 0; row < piece_.num_rows; ++row, partial += kPartialSize) {
      std::copy_n(partial, Shape::kVo, o_row(row));
      queries_.max()[row] = partial[Shape::kVo];
      queries_.sum()[row] = partial[Shape::kVo + 1];
    }
  }
  // Add a stored state to the current one.
  void merge_state(const float* partial) {
    for (int row = 0; row < piece_.num_rows; ++row, partial += kPartialSize) {
      merge_row(row, partial, partial[Shape::kVo], partial[Shape::kVo + 1]);
    }
  }

  // Normalise the state and write it to out and lse.
  void write_output() {
    const int32_t* first_pages = params_.first_pages;
    const int32_t first_page = first_pages == nullptr ? 0 : first_pages[piece_.request];
    if (params_.prior.are_of(first_pages, first_page)) merge_prior();
    for (int row = 0; row < piece_.num_rows; ++row) {
      const PackedRow& packed = queries_.packed_row(row);
      const int64_t token = output_row(piece_.qo_begin + packed.token);
      float* lse = params_.lse == nullptr ? nullptr
                                          : params_.lse + token * params_.lse_row_stride +
                                                packed.head * params_.lse_head_stride;
      const float factor = finish_row(row, packed.head, lse);
      const float* o = o_row(row);
      Out* out = static_cast<Out*>(params_.out) + token * params_.out_row_stride +
                 packed.head * params_.out_head_stride;
      const BlockVariant<Variant> variant(params_, piece_, &packed, false);
      for_each_vector(Shape::kVo, [&](int d, int count) {
        float values[kLanes];
        store(values, factor == 0.0f ? VecF{} : load(o + d) * factor);
        variant.change_output(0, d, values, count);
        store_some(out + d, load(values), count);
      });
    }
  }

 private:
  static constexpr int kStateRows = std::max<int>(Shape::kRows, kLanes);
  static constexpr int kMaxWidth =
      Shape::kLine == kFewRows ? std::max<int>(kFewRowsLimit, kLanes) : kBlockRows;
  static constexpr int kPartialSize = Shape::kVo + kPartialTail;

  // Where a row goes in out and lse.
  int64_t output_row(int32_t row) const {
    if (params_.q_rows == nullptr) return row;
    return state_range(params_.plan, params_.qo_indptr, row).begin;
  }

  // Add the states over the keys that come before the piece's own.
  void merge_prior() {
    const PriorStates& prior = params_.prior;
    for (int row = 0; row < piece_.num_rows; ++row) {
      const PackedRow& packed = queries_.packed_row(row);
      const int64_t first = prior.first_rows[piece_.request] + packed.token;
      for (int32_t part = 0; part < *prior.num_parts; ++part) {
        const int64_t at = (first * *prior.num_parts + part) * params_.num_qo_heads + packed.head;
        merge_row(row, prior.out + at * Shape::kVo, prior.lse[at], 1.0f);
      }
    }
  }
  // Add the state of a row to the current one: values relative to 2^max, with their sum of weights.
  void merge_row(int row, const float* values, float other_max, float other_sum) {
    float& top = queries_.max()[row];
    float& sum = queries_.sum()[row];
    const float merged = std::max(top, other_max);
    if (merged == -INFINITY) return;
    const float mine = std::exp2(top - merged);
    const float other = std::exp2(other_max - merged);
    float* o = o_row(row);
    for (int d = 0; d < Shape::kVo; ++d) o[d] = o[d] * mine + values[d] * other;
    sum = sum * mine + other_sum * other;
    top = merged;
  }

  float* o_row(int row) const { return o_ + int64_t{row} * Shape::kColumns; }

  // Write a row's lse, if wanted, and return the factor from its state to its output: 0 where it
  // saw no key.
  float finish_row(int row, int head, float* lse) const {
    const float v_scale =
        params_.v_scale != nullptr ? params_.v_scale[piece_.kv_head] : params_.v_scale_value;
    if constexpr (!Variant::kUsesSoftmax) return v_scale;
    float sum = queries_.sum()[row];
    if (sum == 0.0f) {
      if (lse != nullptr) *lse = -INFINITY;
      return 0.0f;
    }
    // Logits count ALiBi distance from the row's own position, callers from query 0.
    const float origin = queries_.slope(row) * static_cast<float>(piece_.kv_len - piece_.qo_len);
    float top = queries_.max()[row];
    float scale = 1.0f;
    if (params_.sinks != nullptr) {
      const float sink = params_.sinks[head] * kLog2e - origin;
      const float merged = std::max(top, sink);
      scale = std::exp2(top - merged);
      sum = sum * scale + std::exp2(sink - merged);
      top = merged;
    }
    if (lse != nullptr) *lse = top + std::log2(sum) + origin;
    return scale / sum * v_scale;
  }

  // The first tile of some of the item's keys; of those that no row sees, none.
  KeyRange seen_tile(KvRange tokens) const {
    if constexpr (kSkipsTiles<Variant>) {
      const auto is_seen = [&](int32_t key) { return sight(0, piece_.num_rows, key).some; };
      while (tokens.begin < tokens.end && !is_seen(tokens.begin)) {
        tokens.begin = std::min(block_end(tokens.begin), tokens.end);
      }
      int32_t end = tokens.begin;
      const KeyRange tile = tile_of(piece_, tokens);
      while (end < tile.first + tile.count && (end == tokens.begin || is_seen(end))) {
        end = std::min(block_end(end), tokens.end);
      }
      tokens.end = end;
    }
    return tile_of(piece_, tokens);
  }
  // Of keys that are seen together.
  static int32_t block_end(int32_t key) {
    return (key / kSeenTogether<Variant> + 1) * kSeenTogether<Variant>;
  }
  // What `num_rows` rows from `first` on see of a key.
  Sight sight(int first, int num_rows, int32_t key) const {
    const PackedRow& begin = queries_.packed_row(first);
    const PackedRow& last = queries_.packed_row(first + num_rows - 1);
    const SeeingRows rows = seeing_rows(begin.token, begin.head, last.token, last.head,
                                        piece_.kv_head, geometry_.group_size);
    return sight_of(variant_of<Variant>(params_), piece_, rows, key);
  }
  // And of some keys.
  Sight sight(int first, int num_rows, const KeyRange& keys) const {
    Sight all = {true, false};
    if constexpr (kSkipsTiles<Variant>) {
      all = {false, true};
      for (int32_t key = keys.first; key < keys.first + keys.count; key = block_end(key)) {
        const Sight block = sight(first, num_rows, key);
        all = {all.some || block.some, all.all && block.all};
      }
    }
    return all;
  }

  void attend_tile(const KeyRange& keys) {
    const int32_t end_key = keys.first + keys.count;
    for (int b = 0; b < queries_.num_blocks(); ++b) {
      const RowBlock& block = queries_.block(b);
      const int seen = std::min(end_key, block.some_end) - keys.first;
      if (seen <= 0 || block.some_begin >= end_key) continue;
      const Sight own = sight(b * kBlockRows, block.num_rows, keys);
      if (!own.some) continue;
      score(block, queries_.block_q(b), seen);
      const BlockVariant<Variant> variant(params_, piece_, &queries_.packed_row(b * kBlockRows),
                                          own.all);
      const int num_keys = softmax_tile(block, logits_, variant, scores_, seen, keys.first);
      value_tile<Shape::kColumns>({scores_, block.width}, keys_.values(), num_keys,
                                  is_empty_[b] ? nullptr : block.alpha, block.num_rows,
                                  o_row(b * kBlockRows));
      is_empty_[b] = false;
    }
  }

  void score(const RowBlock& block, const float* q, int num_keys) {
    if constexpr (Shape::kLine == kManyRows) {
      score_many<C>(keys_.k_words(), num_keys, q, block.width, Shape::kQkWords, scores_);
    } else {
      const KeyRows k = keys_.key_rows();
      switch (block.width) {
        case 1:
          return score_few<C, 1>(k, num_keys, q, Shape::kQkPaddedWords, scores_);
        case 2:
          return score_few<C, 2>(k, num_keys, q, Shape::kQkPaddedWords, scores_);
        case 4:
          return score_few<C, 4>(k, num_keys, q, Shape::kQkPaddedWords, scores_);
        case 8:
          return score_one_vector<C, 8>(k, num_keys, q, Shape::kQkWords, scores_);
        default:
          return score_one_vector<C, 16>(k, num_keys, q, Shape::kQkWords, scores_);
      }
    }
  }

  static void fold_sums(const RowBlock& block) {
    for (int lane = block.width; lane < block.num_lanes(); ++lane) {
      block.sum[lane % block.width] += block.sum[lane];
    }
  }

  const AttentionParams& params_;
  const WorkGeometry& geometry_;
  QueryTile<Traits> queries_;
  KvTile<Traits> keys_;
  RotaryAngles<Shape::kQk>* angles_ = nullptr;  // of ROPE_LLAMA mode; nullptr = off
  float* o_;                                    // [num_rows, kColumns], unnormalised
  float* scores_;                               // [keys, width], then weights
  bool is_empty_[Shape::kNumBlocks];            // blocks that have seen no key: o_ holds anything
  LogitTransform logits_;
  WorkPiece piece_;
};

}  // namespace fi::cpu
