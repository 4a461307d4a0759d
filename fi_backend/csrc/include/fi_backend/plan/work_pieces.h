// Walk the pieces that a plan gives to one worker, and find the pieces that make up an item.
#pragma once

#include <fi_backend/plan/item_cuts.h>

namespace fi {

struct WorkPiece {
  int32_t request;
  int32_t kv_head;
  int32_t q_tile;
  int32_t qo_begin;  // first row of the request in q
  int32_t qo_len;
  int32_t kv_len;
  int32_t first_page;  // of the request's table, where its keys begin
  int32_t num_rows;    // packed rows of the item
  KvRange item;        // kv tokens of the whole item
  KvRange tokens;      // kv tokens of this piece

  FI_HOST_DEVICE bool whole() const { return tokens.begin == item.begin && tokens.end == item.end; }
};

FI_HOST_DEVICE bool comes_before(const LinePosition& a, const LinePosition& b) {
  if (a.request != b.request) return a.request < b.request;
  if (a.kv_head != b.kv_head) return a.kv_head < b.kv_head;
  if (a.q_tile != b.q_tile) return a.q_tile < b.q_tile;
  return a.kv_offset < b.kv_offset;
}

// Take the piece at `at`, in an item of the request that `span` is of, and move `at` past it.
FI_HOST_DEVICE void take_piece(const WorkGeometry& g, int line, const RequestSpan& span,
                               const LinePosition& end, LinePosition& at, WorkPiece& piece) {
  const KvRange item = item_tokens(g, line, span.qo_len, span.kv_len, at.q_tile);
  const bool cut = same_item(at, end);
  piece.request = at.request;
  piece.kv_head = at.kv_head;
  piece.q_tile = at.q_tile;
  piece.qo_begin = span.qo_begin;
  piece.qo_len = span.qo_len;
  piece.kv_len = span.kv_len;
  piece.first_page = span.first_page;
  piece.num_rows = num_tile_rows(g, line, span.qo_len, at.q_tile);
  piece.item = item;
  piece.tokens = {item.begin + at.kv_offset, cut ? item.begin + end.kv_offset : item.end};
  at = cut ? end : next_item(g, num_q_tiles(g, line, span.qo_len), at);
}

// Take the piece at `at` and move `at` past it; false where nothing is left before `end`.
FI_HOST_DEVICE bool next_piece(const WorkGeometry& g, int line, const int32_t* qo_indptr,
                               const int32_t* kv_lens, const LinePosition& end, LinePosition& at,
                               WorkPiece& piece) {
  while (at.request < g.num_reqs && comes_before(at, end)) {
    const RequestSpan span = request_span(qo_indptr, kv_lens, g.num_reqs, at.request);
    if (num_q_tiles(g, line, span.qo_len) > 0) {
      take_piece(g, line, span, end, at, piece);
      return true;
    }
    at = {at.request + 1, 0, 0, 0};
  }
  return false;
}

// The part of a piece's item that worker w holds; empty where it holds none.
FI_HOST_DEVICE KvRange worker_tokens(const WorkPiece& piece, const LinePosition* starts,
                                     int32_t w) {
  const LinePosition item{piece.request, piece.kv_head, piece.q_tile, 0};
  int32_t edge[2];
  for (int side = 0; side < 2; ++side) {
    const LinePosition& start = starts[w + side];
    if (same_item(start, item)) {
      edge[side] = piece.item.begin + start.kv_offset;
    } else {
      edge[side] = comes_before(start, item) ? piece.item.begin : piece.item.end;
    }
  }
  return {edge[0], edge[1]};
}

// The workers [begin, end) among which all holders of a piece's item are; `worker` is one of them.
FI_HOST_DEVICE KvRange item_workers(const WorkPiece& piece, const LinePosition* starts,
                                    int32_t num_workers, int32_t worker) {
  KvRange workers{worker, worker + 1};
  while (workers.begin > 0 &&
         worker_tokens(piece, starts, workers.begin).begin > piece.item.begin) {
    --workers.begin;
  }
  while (workers.end < num_workers &&
         worker_tokens(piece, starts, workers.end - 1).end < piece.item.end) {
    ++workers.end;
  }
  return workers;
}

}  // namespace fi
