// The query rows of a work item: packed for the matrix products, with what each row may see.
#pragma once

#include <fi_backend/attention/cpu/rope.h>
#include <fi_backend/attention/cpu/rows.h>
#include <fi_backend/attention/cpu/scratch.h>
#include <fi_backend/attention/cpu/softmax.h>
#include <fi_backend/attention/cpu/tile_shape.h>
#include <fi_backend/attention/cpu/transpose.h>
#include <fi_backend/plan/work_pieces.h>

#include <algorithm>

namespace fi::cpu {

// A packed row is (query token, head in the group of one kv head).
struct PackedRow {
  int32_t token;  // within the request
  int32_t head;   // of all query heads
};

template <class Traits>
class QueryTile {
 public:
  using Q = typename Traits::Q;
  using Shape = TileShape<Traits>;
  using C = typename Shape::C;

  QueryTile(const AttentionParams& params, const WorkGeometry& geometry, Scratch& scratch)
      : params_(params), geometry_(geometry) {
    constexpr int kRows = std::max<int>(Shape::kRows, kLanes);
    q_ = scratch.take<float>(int64_t{kRows} * Shape::kQkPaddedWords);
    max_ = scratch.take<float>(kRows);
    sum_ = scratch.take<float>(kRows);
    alpha_ = scratch.take<float>(kRows);
    slope_ = scratch.take<float>(kRows);
    first_ = scratch.take<int32_t>(kRows);
    last_ = scratch.take<int32_t>(kRows);
    position_ = scratch.take<int32_t>(kRows);
    rows_ = scratch.take<PackedRow>(kRows);
    lane_rows_ = scratch.take<float>(int64_t{kLanes} * Shape::kQkPaddedWords);
    wide_row_ = scratch.take<float>(Shape::kQkPaddedWords * kPerWord<C>);
    zeros_ = scratch.take<float>(Shape::kQkPaddedWords);
    std::fill_n(lane_rows_, int64_t{kLanes} * Shape::kQkPaddedWords, 0.0f);
    std::fill_n(zeros_, Shape::kQkPaddedWords, 0.0f);
  }

  // Pack the rows of an item. angles: nullptr, or the rotary embedding of q.
  void load(const WorkPiece& piece, RotaryAngles<Shape::kQk>* angles) {
    piece_ = piece;
    find_packed_rows();
    num_blocks_ = (piece.num_rows + kBlockRows - 1) / kBlockRows;
    for (int b = 0; b < num_blocks_; ++b) {
      set_up(b);
      set_visible(blocks_[b], b * kBlockRows);
      pack(blocks_[b], b * kBlockRows, angles);
    }
  }

  int num_blocks() const { return num_blocks_; }
  const RowBlock& block(int b) const { return blocks_[b]; }
  // [kQkWords, width] words; [width, kQkPaddedWords] for up to kMaxHorizontalRows few rows.
  const float* block_q(int b) const { return q_ + int64_t{b} * kBlockRows * Shape::kQkPaddedWords; }
  float* max() const { return max_; }
  float* sum() const { return sum_; }
  float slope(int row) const { return slope_[row]; }

  const PackedRow& packed_row(int row) const { return rows_[row]; }

 private:
  void find_packed_rows() {
    const int64_t first = int64_t{piece_.q_tile} * geometry_.tile_rows;
    const int32_t first_head = piece_.kv_head * geometry_.group_size;
    int32_t token = static_cast<int32_t>(first / geometry_.group_size);
    int32_t in_group = static_cast<int32_t>(first % geometry_.group_size);
    for (int row = 0; row < piece_.num_rows; ++row) {
      rows_[row] = {token, first_head + in_group};
      if (++in_group == geometry_.group_size) {
        in_group = 0;
        ++token;
      }
    }
  }

  void set_up(int b) {
    RowBlock& block = blocks_[b];
    const int row = b * kBlockRows;
    block.num_rows = std::min(kBlockRows, piece_.num_rows - row);
    block.width = block_width<Shape::kLine>(block.num_rows);
    block.max = max_ + row;
    block.sum = sum_ + row;
    block.alpha = alpha_ + row;
    block.slope = slope_ + row;
    block.first = first_ + row;
    block.last = last_ + row;
    block.position = position_ + row;
  }

  void set_visible(RowBlock& block, int row_begin) {
    block.some_begin = block.all_end = piece_.kv_len;
    block.some_end = block.all_begin = 0;
    KvRange seen{};
    for (int row = 0; row < block.width; ++row) {
      // Rows that do not exist see what the last row sees.
      const PackedRow& packed = rows_[row_begin + std::min(row, block.num_rows - 1)];
      if (row == 0 || (row < block.num_rows && packed.token != rows_[row_begin + row - 1].token)) {
        seen = visible_tokens(geometry_, piece_.qo_len, piece_.kv_len, packed.token);
        block.some_begin = std::min(block.some_begin, seen.begin);
        block.some_end = std::max(block.some_end, seen.end);
        block.all_begin = std::max(block.all_begin, seen.begin);
        block.all_end = std::min(block.all_end, seen.end);
      }
      block.first[row] = seen.begin;
      block.last[row] = seen.end - 1;
      block.position[row] = piece_.kv_len - piece_.qo_len + packed.token;
      block.slope[row] =
          params_.alibi_slopes != nullptr ? params_.alibi_slopes[packed.head] * kLog2e : 0.0f;
    }
    // Lanes past the rows are the same rows at later keys.
    for (int lane = block.width; lane < block.num_lanes(); ++lane) {
      block.first[lane] = block.first[lane - block.width] - 1;
      block.last[lane] = block.last[lane - block.width] - 1;
      block.position[lane] = block.position[lane - block.width] - 1;
      block.slope[lane] = block.slope[lane - block.width];
    }
  }

  void pack(const RowBlock& block, int row_begin, RotaryAngles<Shape::kQk>* angles) {
    float* q = q_ + int64_t{row_begin} * Shape::kQkPaddedWords;
    if (Shape::kLine == kFewRows && block.width <= kMaxHorizontalRows) {
      for (int row = 0; row < block.width; ++row) {
        float* out = q + row * Shape::kQkPaddedWords;
        std::fill_n(out, Shape::kQkPaddedWords, 0.0f);
        if (row < block.num_rows) read_row(row, reinterpret_cast<C*>(out), angles);
      }
      return;
    }
    for (int group = 0; group < block.width; group += kLanes) {
      const float* lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool exists = group + lane < block.num_rows;
        lanes[lane] = exists ? row_words(row_begin + group + lane, lane, angles) : zeros_;
      }
      for (int word = 0; word < Shape::kQkWords; word += kLanes) {
        VecF square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load_words<VecF>(lanes[i] + word);
        transpose(square);
        float* out = q + int64_t{word} * block.width + group;
        const int words = std::min(kLanes, Shape::kQkWords - word);
        // A block narrower than a vector is written in word order: each store overwrites what the
        // one before wrote past its word, and the buffer has room for the last.
        for (int i = 0; i < words; ++i) store_words(out + i * block.width, square[i]);
      }
    }
  }

  // A row as words, in place where it can be read in whole vectors.
  const float* row_words(int row, int lane, RotaryAngles<Shape::kQk>* angles) {
    if constexpr (std::is_same_v<Q, C> && Shape::kQkPaddedWords == Shape::kQkWords) {
      if (angles == nullptr) return reinterpret_cast<const float*>(source(row));
    }
    float* out = lane_rows_ + lane * Shape::kQkPaddedWords;
    read_row(row, reinterpret_cast<C*>(out), angles);
    return out;
  }

  const Q* source(int row) const {
    const int64_t place = int64_t{piece_.qo_begin} + rows_[row].token;
    const int64_t q_row = params_.q_rows == nullptr ? place : params_.q_rows[place];
    return static_cast<const Q*>(params_.q) + q_row * params_.q_row_stride +
           rows_[row].head * params_.q_head_stride;
  }

  void read_row(int row, C* out, RotaryAngles<Shape::kQk>* angles) {
    if (std::is_same_v<Q, C> && angles == nullptr) {
      std::memcpy(out, source(row), Shape::kQk * sizeof(Q));
      return;
    }
    widen_row(source(row), Shape::kQk, wide_row_);
    if (angles != nullptr) {
      angles->seek(int64_t{piece_.kv_len} - piece_.qo_len + rows_[row].token);
      angles->rotate(wide_row_);
    }
    narrow_row(wide_row_, Shape::kQk, out);
  }

  const AttentionParams& params_;
  const WorkGeometry& geometry_;
  WorkPiece piece_;
  int num_blocks_;
  RowBlock blocks_[Shape::kNumBlocks];
  float* q_;
  float* max_;
  float* sum_;
  float* alpha_;
  float* slope_;
  int32_t* first_;
  int32_t* last_;
  int32_t* position_;
  PackedRow* rows_;
  float* lane_rows_;  // [kLanes, kQkPaddedWords], rows that cannot be read in place
  float* zeros_;
  float* wide_row_;
};

}  // namespace fi::cpu
