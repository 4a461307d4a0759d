// What a worker of the few-row line computes one after the other: units, which are some rows of a
// chunk of a piece.
#pragma once

#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

inline constexpr int kFewRowsWarps = 4;  // of a CTA, a power of two
inline constexpr int kTileTokens = 16;   // rows of an mma

// A walk over units lies in shared memory, one per warp: registers belong to the accumulators.
//
// A unit's tokens come in tiles, dealt to the warps in turn; the first tile of a unit goes to the
// warp after the one that got the last of the unit before, so that short units keep all warps busy.
class WorkUnits {
 public:
  WorkPiece piece;
  KvRange tokens;     // of the unit
  int32_t first_row;  // of its rows, among the packed rows of the item
  int32_t chunk;      // tokens per chunk of the item; 0 = one chunk per piece

  // Begin with the units between two places of the line. A whole warp calls this, as all below.
  __device__ __forceinline__ void start(const LinePosition& begin, const LinePosition& end,
                                        int unit_rows) {
    if (threadIdx.x % kWarpSize == 0) {
      at_ = begin;
      end_ = end;
      piece.request = -1;
      piece.tokens = tokens = {0, 0};
      piece.num_rows = first_row = 0;
      chunk = 0;
      unit_rows_ = unit_rows;
      dealt_ = 0;
    }
    __syncwarp();
  }

  // Step to the next unit; false at the end.
  __device__ __forceinline__ bool next(const WorkGeometry& g, const int32_t* qo_indptr,
                                       const int32_t* kv_lens) {
    bool has_more = false;
    __syncwarp();  // all lanes are done with the current unit
    if (threadIdx.x % kWarpSize == 0) has_more = advance(g, qo_indptr, kv_lens);
    __syncwarp();
    return __shfl_sync(kFullWarp, has_more, 0);
  }

  // Take over the place of another walk.
  __device__ __forceinline__ void copy_from(const WorkUnits& other) {
    constexpr unsigned kInts = sizeof(WorkUnits) / sizeof(int32_t);
    static_assert(kInts <= kWarpSize, "a warp copies an int each");
    const unsigned lane = threadIdx.x % kWarpSize;
    if (lane < kInts) {
      reinterpret_cast<int32_t*>(this)[lane] = reinterpret_cast<const int32_t*>(&other)[lane];
    }
  }

  __device__ __forceinline__ int num_tiles() const {
    return (tokens.end - tokens.begin + kTileTokens - 1) / kTileTokens;
  }
  // The tile that a warp gets first.
  __device__ __forceinline__ int first_tile(int warp) const {
    return (warp - dealt_) & (kFewRowsWarps - 1);
  }
  // The warp that has tile 0.
  __device__ __forceinline__ int first_warp() const { return dealt_ & (kFewRowsWarps - 1); }

  __device__ __forceinline__ bool is_whole_item() const {
    return tokens.begin == piece.item.begin && tokens.end == piece.item.end;
  }
  __device__ __forceinline__ bool ends_piece() const {
    return tokens.end == piece.tokens.end && first_row + unit_rows_ >= piece.num_rows;
  }
  __device__ __forceinline__ int num_rows() const {
    return min(unit_rows_, piece.num_rows - first_row);
  }
  // Place of the unit among the chunks of its item.
  __device__ __forceinline__ int chunk_index() const {
    return chunk == 0 ? 0 : (tokens.begin - piece.item.begin) / chunk;
  }

 private:
  __device__ __forceinline__ bool advance(const WorkGeometry& g, const int32_t* qo_indptr,
                                          const int32_t* kv_lens) {
    dealt_ += num_tiles();
    if (first_row + unit_rows_ < piece.num_rows) {
      first_row += unit_rows_;
      return true;
    }
    first_row = 0;
    if (tokens.end < piece.tokens.end) {
      tokens.begin = tokens.end;
    } else {
      if (is_done_with(piece) && piece.kv_head + 1 < g.num_kv_heads) {
        if (!take_next_head()) return false;
      } else {
        if (!next_piece(g, kFewRows, qo_indptr, kv_lens, end_, at_, piece)) return false;
        chunk = chunk_tokens(g, kFewRows, piece.item.end - piece.item.begin);
      }
      tokens.begin = piece.tokens.begin;
    }
    tokens.end = piece.tokens.end;
    if (chunk != 0 && tokens.end - tokens.begin > chunk) tokens.end = tokens.begin + chunk;
    return true;
  }

  __device__ __forceinline__ bool is_done_with(const WorkPiece& done) const {
    return at_.request == done.request && at_.kv_head == done.kv_head && at_.q_tile == 1;
  }

  // As next_piece(), from one head of a request to the next: all but the head stays the same.
  __device__ __forceinline__ bool take_next_head() {
    at_ = {piece.request, piece.kv_head + 1, 0, 0};
    if (!comes_before(at_, end_)) return false;
    piece.kv_head = at_.kv_head;
    piece.tokens = piece.item;
    if (same_item(at_, end_)) {
      piece.tokens.end = piece.item.begin + end_.kv_offset;
      at_ = end_;
    } else {
      at_.q_tile = 1;
    }
    return true;
  }

  LinePosition at_;
  LinePosition end_;
  int32_t unit_rows_;
  int32_t dealt_;  // tiles of earlier units
};

}  // namespace fi
