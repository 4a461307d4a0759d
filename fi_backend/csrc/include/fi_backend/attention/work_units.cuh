// What a worker of the few-row line computes one after the other: units, which are some rows of a
// chunk of a piece.
#pragma once

#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

inline constexpr int kFewRowsWarps = 4;  // of a CTA, a power of two
inline constexpr int kTileTokens = 16;   // rows of an mma

// The warp of this thread. Read every time it is needed: kept in a register, it would be spilled
// where accumulators take them all.
__device__ __forceinline__ int this_warp() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread / kWarpSize;
}

// What a worker finds in the plan about itself, loaded at once.
struct WorkerRange {
  LinePosition begin;
  LinePosition end;
  RequestSpan span;  // of the request where it begins
};

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
  bool exists;        // false past the last unit

  // Begin with a worker's first unit; false if it has none. A whole warp calls this, as all below.
  __device__ __forceinline__ bool start(const WorkGeometry& g, const WorkerRange& range,
                                        int unit_rows, const int32_t* qo_indptr,
                                        const int32_t* kv_lens) {
    if (threadIdx.x % kWarpSize == 0) {
      at_ = range.begin;
      end_ = range.end;
      piece.request = -1;
      piece.tokens = tokens = {0, 0};
      piece.num_rows = first_row = 0;
      unit_rows_ = unit_rows;
      dealt_ = 0;
      if (num_q_tiles(g, kFewRows, range.span.qo_len) > 0) {
        take_piece(g, kFewRows, range.span, end_, at_, piece);
        begin_piece(g);
        exists = true;
      } else {
        exists = advance(g, qo_indptr, kv_lens);
      }
    }
    __syncwarp();
    return exists;
  }

  // Step to the next unit; false at the end.
  __device__ __forceinline__ bool next(const WorkGeometry& g, const int32_t* qo_indptr,
                                       const int32_t* kv_lens) {
    __syncwarp();  // all lanes are done with the current unit
    if (threadIdx.x % kWarpSize == 0) exists = advance(g, qo_indptr, kv_lens);
    __syncwarp();
    return exists;
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
  // The tile that this warp gets first.
  __device__ __forceinline__ int first_tile() const {
    return (this_warp() - dealt_) & (kFewRowsWarps - 1);
  }
  // The warp that has tile 0.
  __device__ __forceinline__ int first_warp() const { return dealt_ & (kFewRowsWarps - 1); }

  __device__ __forceinline__ bool is_whole_item() const {
    return tokens.begin == piece.item.begin && tokens.end == piece.item.end;
  }
  __device__ __forceinline__ bool begins_piece() const {
    return tokens.begin == piece.tokens.begin && first_row == 0;
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
      begin_unit(tokens.end);
      return true;
    }
    if (!comes_before(at_, end_)) return false;
    if (at_.request == piece.request) {
      take_next_head(g);
    } else if (!next_piece(g, kFewRows, qo_indptr, kv_lens, end_, at_, piece)) {
      return false;
    }
    begin_piece(g);
    return true;
  }

  // As next_piece(), from one head of a request to the next: all but the head stays the same.
  __device__ __forceinline__ void take_next_head(const WorkGeometry& g) {
    piece.kv_head = at_.kv_head;
    piece.tokens = piece.item;
    const bool cut = same_item(at_, end_);
    if (cut) piece.tokens.end = piece.item.begin + end_.kv_offset;
    at_ = cut ? end_ : next_item(g, 1, at_);
  }

  __device__ __forceinline__ void begin_piece(const WorkGeometry& g) {
    chunk = chunk_tokens(g, kFewRows, piece.item.end - piece.item.begin);
    begin_unit(piece.tokens.begin);
  }
  __device__ __forceinline__ void begin_unit(int32_t begin) {
    const int32_t rest = piece.tokens.end - begin;
    tokens = {begin, begin + (chunk != 0 && chunk < rest ? chunk : rest)};
  }

  LinePosition at_;
  LinePosition end_;
  int32_t unit_rows_;
  int32_t dealt_;  // tiles of earlier units
};

}  // namespace fi
