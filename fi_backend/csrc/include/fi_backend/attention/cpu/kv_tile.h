// A tile of keys: from cache rows to what the matrix products read, in place wherever that fits.
#pragma once

#include <fi_backend/attention/cpu/rope.h>
#include <fi_backend/attention/cpu/rows.h>
#include <fi_backend/attention/cpu/scores.h>
#include <fi_backend/attention/cpu/scratch.h>
#include <fi_backend/attention/cpu/tile_shape.h>
#include <fi_backend/attention/cpu/values.h>
#include <fi_backend/attention/params.h>

#include <algorithm>
#include <utility>

namespace fi::cpu {

template <class Traits>
class KvTile {
 public:
  using Kv = typename Traits::Kv;
  using Shape = TileShape<Traits>;
  using C = typename Shape::C;

  KvTile(const AttentionParams& params, Scratch& scratch) : params_(params) {
    constexpr int kWidest = std::max(Shape::kQkPaddedWords * kPerWord<C>, Shape::kColumns);
    k_tile_ = scratch.take<C>(int64_t{Shape::kKeys} * kKeyStride);
    v_tile_ = scratch.take<float>(int64_t{Shape::kKeys} * Shape::kColumns);
    k_rows_ = scratch.take<const Kv*>(kMaxRows);
    v_rows_ = scratch.take<const Kv*>(kMaxRows);
    next_k_rows_ = scratch.take<const Kv*>(kMaxRows);
    next_v_rows_ = scratch.take<const Kv*>(kMaxRows);
    k_words_ = scratch.take<const float*>(kMaxRows);
    wide_v_rows_ = scratch.take<const float*>(kMaxRows);
    zeros_ = scratch.take<float>(kWidest);
    row_ = scratch.take<float>(kWidest);
    std::fill_n(zeros_, kWidest, 0.0f);
    if (kKeyStride > Shape::kQk) {
      for (int i = 0; i < Shape::kKeys; ++i) {
        std::fill_n(k_tile_ + int64_t{i} * kKeyStride + Shape::kQk, kKeyStride - Shape::kQk, C{});
      }
    }
  }

  // Load a tile. angles: nullptr, or the rotary embedding of K.
  void load(const KeyRange& keys, RotaryAngles<Shape::kQk>* angles) {
    if (keys == next_) {
      std::swap(k_rows_, next_k_rows_);
      std::swap(v_rows_, next_v_rows_);
    } else {
      find_rows(params_, keys, k_rows_, v_rows_);
    }
    load_keys(keys, angles);
    load_values(keys.count);
  }

  // Find the tile that load() will ask for next, so that it is prefetched meanwhile. An empty range
  // stands for none.
  void look_ahead(const KeyRange& next) {
    next_ = next;
    find_rows(params_, next, next_k_rows_, next_v_rows_);
    std::fill(next_k_rows_ + next.count, next_k_rows_ + kMaxRows, no_row());
    std::fill(next_v_rows_ + next.count, next_v_rows_ + kMaxRows, no_row());
  }

  // Rows of K as words; rows past the tile's end are zeros.
  const float* const* k_words() const { return k_words_; }
  KeyRows key_rows() const {
    return {k_words_, reinterpret_cast<const void* const*>(next_k_rows_),
            kReadsVInPlace ? nullptr : reinterpret_cast<const void* const*>(next_v_rows_),
            static_cast<int>(Shape::kQk * sizeof(Kv)), static_cast<int>(Shape::kVo * sizeof(Kv))};
  }

  // Source of V for value_tile().
  auto values() const {
    if constexpr (kReadsVInPlace) {
      return ValueRows<Kv>{v_rows_, Shape::kLine == kFewRows ? next_v_rows_ : nullptr};
    } else {
      return ValueRows<float>{wide_v_rows_, nullptr};
    }
  }

 private:
  static constexpr int kMaxRows = Shape::kKeys + kKeyPadding;
  static constexpr int kKeyStride = Shape::kQkPaddedWords * kPerWord<C>;
  // Few-row scores read K in whole vectors; many-row scores one word at a time.
  static constexpr bool kReadsKInPlace =
      std::is_same_v<Kv, C> && (Shape::kLine == kManyRows || kKeyStride == Shape::kQk);
  // A few query rows use a value once: it is widened where it is used. Many rows share the work.
  static constexpr bool kReadsVInPlace =
      Shape::kVo % kLanes == 0 &&
      (std::is_same_v<Kv, float> || (Shape::kLine == kFewRows && sizeof(Kv) == 2));

  const Kv* no_row() const { return reinterpret_cast<const Kv*>(zeros_); }

  void load_keys(const KeyRange& keys, RotaryAngles<Shape::kQk>* angles) {
    const int num_keys = keys.count;
    if (kReadsKInPlace && angles == nullptr) {
      for (int i = 0; i < num_keys; ++i) k_words_[i] = reinterpret_cast<const float*>(k_rows_[i]);
    } else {
      if (angles != nullptr) angles->seek(keys.first);
      for (int i = 0; i < num_keys; ++i) {
        C* row = k_tile_ + int64_t{i} * kKeyStride;
        if (angles == nullptr) {
          convert_row(k_rows_[i], Shape::kQk, row);
        } else {
          widen_row(k_rows_[i], Shape::kQk, row_);
          angles->rotate(row_);
          angles->next();
          narrow_row(row_, Shape::kQk, row);
        }
        k_words_[i] = reinterpret_cast<const float*>(row);
      }
    }
    std::fill_n(k_words_ + num_keys, kKeyPadding, zeros_);
  }

  void load_values(int num_keys) {
    if constexpr (kReadsVInPlace) {
      std::fill_n(v_rows_ + num_keys, kKeyPadding, no_row());
    } else {
      for (int i = 0; i < num_keys; ++i) {
        float* row = v_tile_ + int64_t{i} * Shape::kColumns;
        widen_row(v_rows_[i], Shape::kVo, row);
        wide_v_rows_[i] = row;
      }
      std::fill_n(wide_v_rows_ + num_keys, kKeyPadding, zeros_);
    }
  }

  const AttentionParams& params_;
  C* k_tile_;
  float* v_tile_;
  const Kv** k_rows_;
  const Kv** v_rows_;
  const Kv** next_k_rows_;
  const Kv** next_v_rows_;
  KeyRange next_ = {};
  const float** k_words_;
  const float** wide_v_rows_;
  float* zeros_;
  float* row_;
};

}  // namespace fi::cpu
