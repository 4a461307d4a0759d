// Compile-time shapes of the tiles that an instantiation works on.
#pragma once

#include <fi_backend/attention/cpu/compute.h>
#include <fi_backend/attention/cpu/scratch.h>

namespace fi::cpu {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

constexpr int kBlockRows = 64;   // query rows whose scores are computed, weighed and used at a time
constexpr int kKeyPadding = 32;  // addresses and score rows past a tile's end, for whole vectors

// Keys per tile: many enough that work per tile does not count, few enough that what a tile needs
// stays in cache: scores and converted keys and values, and for few rows the next tile as well.
constexpr int tile_keys(int line, int head_dim_qk, int head_dim_vo) {
  const int head_dim = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
  if (line == kFewRows) return head_dim <= 128 ? 128 : head_dim <= 256 ? 64 : 32;
  return head_dim <= 128 ? 192 : head_dim <= 256 ? 128 : 64;
}

// Up to this many rows, scores are summed across lanes (score_few); from there on rows are lanes.
constexpr int kMaxHorizontalRows = 4;

// Rows that lie side by side in a tile of scores for num_rows query rows: a power of two up to 16
// in the few-row line, whole vectors in the many-row line.
template <int kLine>
constexpr int block_width(int num_rows) {
  if (kLine == kManyRows) return static_cast<int>(round_up(num_rows, kLanes));
  int width = 1;
  while (width < num_rows) width *= 2;
  return width;
}

// Traits: Q, Kv, Out (element types), kHeadDimQk, kHeadDimVo, kLine.
template <class Traits>
struct TileShape {
  using C = ComputeType<typename Traits::Q, typename Traits::Kv>;
  static constexpr int kQk = Traits::kHeadDimQk;
  static constexpr int kVo = Traits::kHeadDimVo;
  static constexpr int kLine = Traits::kLine;
  static constexpr int kKeys = tile_keys(kLine, kQk, kVo);
  static constexpr int kRows = kLine == kFewRows ? kFewRowsLimit : many_row_tile(kQk, kVo);
  static constexpr int kNumBlocks = (kRows + kBlockRows - 1) / kBlockRows;
  // A row of q or K: words that count, and with zeros up to whole vectors.
  static constexpr int kQkWords = kQk / kPerWord<C>;
  static constexpr int kQkPaddedWords = static_cast<int>(round_up(kQkWords, kLanes));
  // A row of O, and of V as one word per column.
  static constexpr int kColumns = static_cast<int>(round_up(kVo, kLanes));
};

}  // namespace fi::cpu
