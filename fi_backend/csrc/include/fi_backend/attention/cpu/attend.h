// Attention of one work item on one worker: query rows in blocks, keys in tiles.
#pragma once

#include <fi_backend/attention/cpu/load_tile.h>
#include <fi_backend/attention/cpu/scores.h>
#include <fi_backend/attention/cpu/scratch.h>
#include <fi_backend/attention/cpu/softmax.h>
#include <fi_backend/attention/cpu/values.h>
#include <fi_backend/plan/work_pieces.h>

#include <algorithm>

namespace fi::cpu {

// Traits: Q, Kv, Out (element types), kHeadDimQk, kHeadDimVo, kLine.
template <class Traits>
class Attend {
 public:
  using Q = typename Traits::Q;
  using Kv = typename Traits::Kv;
  using Out = typename Traits::Out;
  using C = ComputeType<Q, Kv>;
  static constexpr int kQk = Traits::kHeadDimQk;
  static constexpr int kVo = Traits::kHeadDimVo;
  static constexpr int kQkPadded = static_cast<int>(round_up(kQk, kLanes));
  static constexpr int kColumns = static_cast<int>(round_up(kVo, kLanes));
  static constexpr int kQkWords = kQk / kPerWord<C>;
  static constexpr int kTileRows =
      Traits::kLine == kFewRows ? kFewRowsLimit : many_row_tile(kQk, kVo);
  static constexpr int kNumBlocks = (kTileRows + kBlockRows - 1) / kBlockRows;

  Attend(const AttentionParams& params, const WorkGeometry& geometry, float* scratch_base)
      : params_(params), geometry_(geometry) {
    Scratch scratch(scratch_base);
    const int rows = std::max<int>(kTileRows, kLanes);
    q_ = scratch.take<float>(int64_t{rows} * kQkPadded);
    o_ = scratch.take<float>(int64_t{rows} * kColumns);
    max_ = scratch.take<float>(rows);
    sum_ = scratch.take<float>(rows);
    alpha_ = scratch.take<float>(rows);
    slope_ = scratch.take<float>(rows);
    first_ = scratch.take<int32_t>(rows);
    last_ = scratch.take<int32_t>(rows);
    position_ = scratch.take<int32_t>(rows);
    scores_ = scratch.take<float>(int64_t{kTileKeys + kKeyPadding} * kBlockRows);
    k_tile_ = scratch.take<C>(int64_t{kTileKeys} * kQkPadded);
    v_tile_ = scratch.take<float>(int64_t{kTileKeys + kKeyPadding} * kColumns);
    k_rows_ = scratch.take<const Kv*>(kTileKeys + kKeyPadding);
    v_rows_ = scratch.take<const Kv*>(kTileKeys + kKeyPadding);
    k_words_ = scratch.take<const float*>(kTileKeys + kKeyPadding);
    v_words_ = scratch.take<const float*>(kTileKeys + kKeyPadding);
    row_ = scratch.take<float>(std::max(kQkPadded, kColumns));
    zeros_ = scratch.take<float>(std::max(kQkPadded, kColumns));
    std::fill_n(zeros_, std::max(kQkPadded, kColumns), 0.0f);
    angles_ = scratch.take<RotaryAngles<kQk>>(1);
    if (has_rope()) angles_->init(params.rope_scale, params.rope_theta);
  }

  // Read the item's query rows and what each may see.
  void begin_item(const WorkPiece& piece) {
    request_ = piece.request;
    kv_head_ = piece.kv_head;
    first_row_ = int64_t{piece.q_tile} * geometry_.tile_rows;
    num_rows_ = piece.num_rows;
    qo_begin_ = piece.qo_begin;
    const float k_scale =
        params_.k_scale != nullptr ? params_.k_scale[kv_head_] : params_.k_scale_value;
    logits_.scale = params_.sm_scale * k_scale;
    logits_.soft_cap = params_.soft_cap;
    logits_.has_alibi = params_.alibi_slopes != nullptr;
    logits_.mask = params_.custom_mask == nullptr
                       ? nullptr
                       : params_.custom_mask + params_.mask_indptr[piece.request];
    logits_.kv_len = piece.kv_len;
    logits_.qo_len = piece.qo_len;
    for (int row = 0; row < num_rows_; row += kBlockRows) begin_block(piece, row);
  }

  // Attend to keys [tokens.begin, tokens.end) from an empty state.
  void attend(KvRange tokens) {
    for (int b = 0; b * kBlockRows < num_rows_; ++b) {
      const RowBlock& block = blocks_[b];
      std::fill_n(block.max, block.num_lanes(), -INFINITY);
      std::fill_n(block.sum, block.num_lanes(), 0.0f);
    }
    std::fill_n(o_, int64_t{num_rows_} * kColumns, 0.0f);
    for (int32_t key = tokens.begin; key < tokens.end;) {
      const int num_keys = std::min<int32_t>(kTileKeys, tokens.end - key);
      attend_tile(key, num_keys);
      key += num_keys;
    }
    for (int b = 0; b * kBlockRows < num_rows_; ++b) fold_sums(blocks_[b]);
  }

  // Store the state: [num_rows, kVo + kPartialTail].
  void save_state(float* partial) const {
    for (int row = 0; row < num_rows_; ++row, partial += kVo + kPartialTail) {
      std::copy_n(o_ + int64_t{row} * kColumns, kVo, partial);
      partial[kVo] = max_[row];
      partial[kVo + 1] = sum_[row];
    }
  }
  void load_state(const float* partial) {
    for (int row = 0; row < num_rows_; ++row, partial += kVo + kPartialTail) {
      std::copy_n(partial, kVo, o_ + int64_t{row} * kColumns);
      max_[row] = partial[kVo];
      sum_[row] = partial[kVo + 1];
    }
  }
  // Add a stored state to the current one.
  void merge_state(const float* partial) {
    for (int row = 0; row < num_rows_; ++row, partial += kVo + kPartialTail) {
      const float merged = std::max(max_[row], partial[kVo]);
      if (merged == -INFINITY) continue;
      const float mine = std::exp2(max_[row] - merged);
      const float other = std::exp2(partial[kVo] - merged);
      float* o = o_ + int64_t{row} * kColumns;
      for (int d = 0; d < kVo; ++d) o[d] = o[d] * mine + partial[d] * other;
      sum_[row] = sum_[row] * mine + partial[kVo + 1] * other;
      max_[row] = merged;
    }
  }

  // Normalise the state and write it to out and lse.
  void write_output() const {
    const float v_scale =
        params_.v_scale != nullptr ? params_.v_scale[kv_head_] : params_.v_scale_value;
    for (int row = 0; row < num_rows_; ++row) {
      const int64_t packed = first_row_ + row;
      const int64_t token = qo_begin_ + packed / geometry_.group_size;
      const int64_t head = kv_head_ * geometry_.group_size + packed % geometry_.group_size;
      float sum = sum_[row];
      float lse = -INFINITY;
      float factor = 0.0f;
      if (sum != 0.0f) {
        // Logits count ALiBi distance from the row's own position, callers from query 0.
        const float origin = slope_[row] * static_cast<float>(logits_.kv_len - logits_.qo_len);
        float scale = 1.0f;
        float top = max_[row];
        if (params_.sinks != nullptr) {
          const float sink = params_.sinks[head] * kLog2e - origin;
          top = std::max(top, sink);
          scale = std::exp2(max_[row] - top);
          sum = sum * scale + std::exp2(sink - top);
        }
        lse = top + std::log2(sum) + origin;
        factor = scale / sum * v_scale;
      }
      float* o = o_ + int64_t{row} * kColumns;
      for (int d = 0; d < kColumns; d += kLanes) {
        store(o + d, factor == 0.0f ? VecF{} : load(o + d) * factor);
      }
      narrow_row(o, kVo,
                 static_cast<Out*>(params_.out) + token * params_.out_row_stride +
                     head * params_.out_head_stride);
      if (params_.lse != nullptr) {
        params_.lse[token * params_.lse_row_stride + head * params_.lse_head_stride] = lse;
      }
    }
  }

 private:
  static constexpr bool kReadsKInPlace = std::is_same_v<Kv, C>;
  static constexpr bool kReadsVInPlace = std::is_same_v<Kv, float> && kVo % kLanes == 0;

  bool has_rope() const { return params_.rope_theta != 0.0f; }

  void begin_block(const WorkPiece& piece, int row_begin) {
    RowBlock& block = blocks_[row_begin / kBlockRows];
    block.num_rows = std::min(kBlockRows, num_rows_ - row_begin);
    block.width = static_cast<int>(round_up(block.num_rows, kLanes));
    block.max = max_ + row_begin;
    block.sum = sum_ + row_begin;
    block.alpha = alpha_ + row_begin;
    block.slope = slope_ + row_begin;
    block.first = first_ + row_begin;
    block.last = last_ + row_begin;
    block.position = position_ + row_begin;
    block.some_begin = block.all_end = piece.kv_len;
    block.some_end = block.all_begin = 0;
    C* q = reinterpret_cast<C*>(q_ + int64_t{row_begin} * kQkPadded);
    std::fill_n(reinterpret_cast<float*>(q), int64_t{kQkWords} * block.width, 0.0f);
    for (int lane = 0; lane < block.num_lanes(); ++lane) {
      // Rows that do not exist see what the last row sees.
      const int row = std::min(lane % block.width, block.num_rows - 1);
      const int64_t packed = first_row_ + row_begin + row;
      const int32_t token = static_cast<int32_t>(packed / geometry_.group_size);
      const int64_t head = kv_head_ * geometry_.group_size + packed % geometry_.group_size;
      const KvRange seen = visible_tokens(geometry_, piece.qo_len, piece.kv_len, token);
      const int32_t key_offset = lane / block.width;
      block.first[lane] = seen.begin - key_offset;
      block.last[lane] = seen.end - 1 - key_offset;
      block.position[lane] = piece.kv_len - piece.qo_len + token - key_offset;
      block.slope[lane] = logits_.has_alibi ? params_.alibi_slopes[head] * kLog2e : 0.0f;
      block.some_begin = std::min(block.some_begin, seen.begin);
      block.some_end = std::max(block.some_end, seen.end);
      block.all_begin = std::max(block.all_begin, seen.begin);
      block.all_end = std::min(block.all_end, seen.end);
      if (lane < block.num_rows) {
        const Q* source = static_cast<const Q*>(params_.q) +
                          (qo_begin_ + token) * params_.q_row_stride + head * params_.q_head_stride;
        widen_row(source, kQk, row_);
        if (has_rope()) {
          angles_->seek(int64_t{piece.kv_len} - piece.qo_len + token);
          angles_->rotate(row_);
        }
        for (int d = 0; d < kQk; ++d) {
          const int64_t word = int64_t{d / kPerWord<C>} * block.width + lane;
          q[word * kPerWord<C> + d % kPerWord<C>] = from_float<C>(row_[d]);
        }
      }
    }
  }

  void attend_tile(int32_t first_key, int num_keys) {
    find_rows(params_, request_, kv_head_, first_key, num_keys, k_rows_, v_rows_);
    load_keys(first_key, num_keys);
    load_values(num_keys);
    for (int b = 0; b * kBlockRows < num_rows_; ++b) {
      const RowBlock& block = blocks_[b];
      const int seen = std::min(first_key + num_keys, block.some_end) - first_key;
      if (seen <= 0 || block.some_begin >= first_key + num_keys) continue;
      score_tile<C>(k_words_, seen, q_ + int64_t{b} * kBlockRows * kQkPadded, block.width, kQkWords,
                    scores_);
      const int num_steps = softmax_tile<C>(block, logits_, scores_, seen, first_key);
      value_tile<C>(scores_, block.width, v_words_, kColumns, num_steps, block.alpha,
                    block.num_rows, o_ + int64_t{b} * kBlockRows * kColumns);
    }
  }

  void load_keys(int32_t first_key, int num_keys) {
    if (kReadsKInPlace && !has_rope()) {
      for (int i = 0; i < num_keys; ++i) k_words_[i] = reinterpret_cast<const float*>(k_rows_[i]);
    } else {
      if (has_rope()) angles_->seek(first_key);
      for (int i = 0; i < num_keys; ++i) {
        widen_row(k_rows_[i], kQk, row_);
        if (has_rope()) {
          angles_->rotate(row_);
          angles_->next();
        }
        C* row = k_tile_ + int64_t{i} * kQkPadded;
        narrow_row(row_, kQk, row);
        k_words_[i] = reinterpret_cast<const float*>(row);
      }
    }
    for (int i = num_keys; i < num_keys + kKeyPadding; ++i) k_words_[i] = zeros_;
  }

  void load_values(int num_keys) {
    if constexpr (kReadsVInPlace) {
      for (int i = 0; i < num_keys; ++i) v_words_[i] = v_rows_[i];
      for (int i = num_keys; i < num_keys + kKeyPadding; ++i) v_words_[i] = zeros_;
    } else if constexpr (std::is_same_v<C, float>) {
      for (int i = 0; i < num_keys; ++i) {
        float* row = v_tile_ + int64_t{i} * kColumns;
        widen_row(v_rows_[i], kVo, row);
        v_words_[i] = row;
      }
      for (int i = num_keys; i < num_keys + kKeyPadding; ++i) v_words_[i] = zeros_;
    } else {
      const Kv* nothing = reinterpret_cast<const Kv*>(zeros_);
      for (int i = num_keys; i < num_keys + kKeyPadding; ++i) v_rows_[i] = nothing;
      for (int i = 0; i < num_keys; i += 2) {
        float* row = v_tile_ + int64_t{i / 2} * kColumns;
        pair_rows(v_rows_[i], v_rows_[i + 1], kVo, row);
        v_words_[i / 2] = row;
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
  float* q_;  // per block: [kQkWords, width] words
  float* o_;  // [num_rows, kColumns], unnormalised
  float* max_;
  float* sum_;
  float* alpha_;
  float* slope_;
  int32_t* first_;
  int32_t* last_;
  int32_t* position_;
  float* scores_;
  C* k_tile_;
  float* v_tile_;
  const Kv** k_rows_;
  const Kv** v_rows_;
  const float** k_words_;
  const float** v_words_;
  float* row_;
  float* zeros_;
  RotaryAngles<kQk>* angles_;
  RowBlock blocks_[kNumBlocks];
  LogitTransform logits_;
  int32_t request_;
  int32_t kv_head_;
  int64_t first_row_;
  int64_t qo_begin_;
  int num_rows_;
};

}  // namespace fi::cpu
