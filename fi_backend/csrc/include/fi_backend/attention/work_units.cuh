// What a worker of the few-row line computes one after the other: units, which are some rows of a
// chunk of a piece.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/plan/work_pieces.h>

#include <fi_backend/attention/item_partials.cuh>

namespace fi {

// A unit, as the warps that compute it need to know it.
struct FewRowsUnit {
  WorkPiece piece;
  KvRange tokens;     // of the unit
  int32_t first_row;  // of its rows, among the packed rows of the item
  int32_t num_rows;
  int32_t prior_row;    // of the states that go before its first keys
  int32_t prior_parts;  // that each row has; 0 = nothing goes before
  bool is_whole_item;
  bool ends_piece;
  bool exists;            // false past the last unit
  ItemPartials partials;  // of the item, unless it is the whole item
  int64_t slot;           // of its own state among them
};

// What a worker finds in the plan about itself: all is loaded at once.
struct WorkerRange {
  LinePosition begin;
  LinePosition end;
  ItemCut begin_cut;  // of the item where the worker begins
  ItemCut end_cut;    // of the item where the next one does
  RequestSpan span;   // of the request where it begins
};

// The plan's records are 16 bytes each and aligned: one load.
template <class Record>
__device__ __forceinline__ Record load_record(const Record* record) {
  static_assert(sizeof(Record) == sizeof(int4));
  const int4 ints = *reinterpret_cast<const int4*>(record);
  return *reinterpret_cast<const Record*>(&ints);
}

__device__ __forceinline__ WorkerRange load_worker_range(const LinePosition* starts,
                                                         const ItemCut* cuts,
                                                         const RequestSpan* spans, int32_t worker) {
  return {load_record(starts + worker), load_record(starts + worker + 1),
          load_record(cuts + worker), load_record(cuts + worker + 1), load_record(spans + worker)};
}

// A walk over a worker's units, in registers: all lanes of a warp take the same steps.
class WorkUnits {
 public:
  __device__ __forceinline__ WorkUnits(const WorkGeometry& g, const WorkerRange& range,
                                       int32_t worker, int unit_rows, const int32_t* qo_indptr,
                                       const int32_t* kv_lens, const int32_t* first_pages)
      : g_(g),
        qo_indptr_(qo_indptr),
        kv_lens_(kv_lens),
        first_pages_(first_pages),
        at_(range.begin),
        end_(range.end),
        loaded_{range.span.qo_begin, range.span.qo_begin + range.span.qo_len, range.span.kv_len,
                range.span.first_page},
        worker_(worker),
        unit_rows_(unit_rows),
        begin_holder_(range.begin_cut.first_holder),
        begin_rank_(range.begin_cut.rank),
        begin_holders_(range.begin_cut.num_holders),
        end_holders_(range.end_cut.num_holders) {}

  // Step to the next unit, at first to the first one; false at the end.
  __device__ __forceinline__ bool next() {
    if (first_row_ + unit_rows_ < piece_.num_rows) {
      first_row_ += unit_rows_;
      return true;
    }
    first_row_ = 0;
    if (tokens_.end >= piece_.tokens.end) {
      if (!next_piece()) return false;
      tokens_.end = piece_.tokens.begin;
    }
    const int32_t rest = piece_.tokens.end - tokens_.end;
    tokens_ = {tokens_.end, tokens_.end + (chunk_ != 0 && chunk_ < rest ? chunk_ : rest)};
    return true;
  }

  __device__ __forceinline__ const WorkPiece& piece() const { return piece_; }
  __device__ __forceinline__ const KvRange& tokens() const { return tokens_; }
  __device__ __forceinline__ int32_t first_row() const { return first_row_; }
  __device__ __forceinline__ int32_t num_rows() const {
    return min(unit_rows_, piece_.num_rows - first_row_);
  }

  // Describe the current unit; partial states lie in `area`.
  __device__ __forceinline__ void describe(const PartialArea& area, const PriorStates& prior,
                                           FewRowsUnit& unit) const {
    unit.piece = piece_;
    unit.tokens = tokens_;
    unit.first_row = first_row_;
    unit.num_rows = num_rows();
    unit.is_whole_item = tokens_.begin == piece_.item.begin && tokens_.end == piece_.item.end;
    unit.ends_piece =
        tokens_.end == piece_.tokens.end && first_row_ + unit_rows_ >= piece_.num_rows;
    unit.exists = true;
    const bool has_prior =
        prior.are_of(first_pages_, piece_.first_page) && tokens_.begin == piece_.item.begin;
    unit.prior_row = has_prior ? prior.first_rows[piece_.request] : 0;
    unit.prior_parts = has_prior ? *prior.num_parts : 0;
    if (unit.is_whole_item) return;
    const bool begins_item = piece_.tokens.begin == piece_.item.begin;
    const bool ends_item = piece_.tokens.end == piece_.item.end;
    const int32_t first_holder = begins_item ? worker_ : begin_holder_;
    const int32_t num_holders = !begins_item ? begin_holders_ : ends_item ? 1 : end_holders_;
    int32_t num_chunks = 0;
    int32_t index = begins_item ? 0 : begin_rank_;
    if (chunk_ != 0) {
      num_chunks = (piece_.item.end - piece_.item.begin + chunk_ - 1) / chunk_;
      index = (tokens_.begin - piece_.item.begin) / chunk_;
    }
    unit.partials = make_item_partials(area, first_holder, num_holders, num_chunks);
    unit.slot = unit.partials.slot(index);
  }

 private:
  // Lengths of a request as they come from memory: whoever looks at them waits for them.
  struct LoadedLens {
    int32_t first_row;
    int32_t end_row;
    int32_t kv_len;
    int32_t first_page;
  };

  __device__ __forceinline__ bool next_piece() {
    while (comes_before(at_, end_)) {
      const RequestLens lens =
          make_request_lens(loaded_.first_row, loaded_.end_row, loaded_.kv_len);
      const RequestSpan span = {loaded_.first_row, lens.qo_len, lens.kv_len, loaded_.first_page};
      const int32_t request = at_.request;
      const bool is_in_line = num_q_tiles(g_, kFewRows, span.qo_len) > 0;
      if (is_in_line) {
        take_piece(g_, kFewRows, span, end_, at_, piece_);
        chunk_ = chunk_tokens(g_, kFewRows, piece_.item.end - piece_.item.begin);
      } else {
        at_ = {request + 1, 0, 0, 0};
      }
      // The next request's lengths arrive while this one's keys are copied.
      if (at_.request != request && at_.request < g_.num_reqs) {
        loaded_ = {qo_indptr_[at_.request], qo_indptr_[at_.request + 1], kv_lens_[at_.request],
                   first_pages_ == nullptr ? 0 : first_pages_[at_.request]};
      }
      if (is_in_line) return true;
    }
    return false;
  }

  const WorkGeometry& g_;
  const int32_t* qo_indptr_;
  const int32_t* kv_lens_;
  const int32_t* first_pages_;
  LinePosition at_;
  LinePosition end_;
  LoadedLens loaded_;  // of at_.request
  int32_t worker_;
  int32_t unit_rows_;
  int32_t begin_holder_;
  int32_t begin_rank_;
  int32_t begin_holders_;
  int32_t end_holders_;
  WorkPiece piece_ = {};
  KvRange tokens_ = {};
  int32_t first_row_ = 0;
  int32_t chunk_ = 0;  // tokens per chunk of the item; 0 = one chunk per piece
};

}  // namespace fi
