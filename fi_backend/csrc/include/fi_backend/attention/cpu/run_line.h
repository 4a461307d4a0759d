// Run one line of a plan: every worker takes its pieces; the last holder of a cut item merges it.
#pragma once

#include <fi_backend/attention/cpu/attend.h>
#include <fi_backend/cpu/parallel.h>

#include <atomic>
#include <new>

namespace fi::cpu {

// A worker's share of the workspace.
template <class Traits>
class WorkerSpace {
 public:
  WorkerSpace(float* partials, int worker)
      : base_(partials + worker * worker_floats(Traits::kHeadDimQk, Traits::kHeadDimVo)) {}

  // Holders of the item at this worker's tail that have finished.
  std::atomic<int32_t>& finished() const { return *reinterpret_cast<std::atomic<int32_t>*>(base_); }

  // State of a chunk. A worker shares at most two items: one it takes over at the head of its piece
  // (end 0) and one it leaves at the tail (end 1).
  float* slot(int end, int chunk, int max_chunks, int slot_rows) const {
    const int64_t row = (int64_t{end} * max_chunks + chunk) * slot_rows;
    return base_ + kControlFloats + row * (Traits::kHeadDimVo + kPartialTail);
  }
  float* scratch() const {
    return base_ + kControlFloats + partial_worker_floats(Traits::kHeadDimVo);
  }

 private:
  float* base_;
};

template <class Traits>
class LineRunner {
 public:
  LineRunner(const AttentionParams& params, const PlanView& plan)
      : params_(params), g_(*plan.geometry), starts_(plan.starts[Traits::kLine]) {
    for (int w = 0; w < g_.num_workers; ++w) {
      new (&Space(params.partials, w).finished()) std::atomic<int32_t>(0);
    }
  }

  // The scratch memory is the thread's: it stays in its cache from worker to worker.
  void run_worker(int worker, int thread) const {
    const Space space(params_.partials, worker);
    Worker work(params_, g_, Scratch(Space(params_.partials, thread).scratch()));
    LinePosition at = starts_[worker];
    WorkPiece piece;
    WorkPiece upcoming;
    bool has_more = next(worker, at, upcoming);
    while (has_more) {
      piece = upcoming;
      has_more = next(worker, at, upcoming);
      work.begin_item(piece);
      const int32_t chunk = chunk_of(piece);
      const KeyRange next_keys =
          has_more ? Worker::tile_of(upcoming, first_chunk(upcoming)) : KeyRange{};
      if (piece.whole() && piece.tokens.end - piece.tokens.begin <= chunk) {
        work.attend(piece.tokens, next_keys);
        work.write_output();
        continue;
      }
      run_chunks(work, space, piece, chunk, next_keys);
      if (piece.whole()) {
        merge(work, piece, {worker, worker + 1}, chunk);
        continue;
      }
      const KvRange holders = item_workers(piece, starts_, g_.num_workers, worker);
      std::atomic<int32_t>& finished = Space(params_.partials, holders.begin).finished();
      if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == count_holders(piece, holders)) {
        merge(work, piece, holders, chunk);
      }
    }
  }

 private:
  using Space = WorkerSpace<Traits>;
  using Worker = Attend<Traits>;

  bool next(int worker, LinePosition& at, WorkPiece& piece) const {
    return next_piece(g_, Traits::kLine, params_.qo_indptr, params_.kv_lens, starts_[worker + 1],
                      at, piece);
  }

  int32_t chunk_of(const WorkPiece& piece) const {
    const int32_t chunk = chunk_tokens(g_, Traits::kLine, piece.item.end - piece.item.begin);
    return chunk == 0 ? INT32_MAX : chunk;
  }
  float* slot(const Space& space, const KvRange& tokens, const WorkPiece& piece, int chunk) const {
    const bool invariant = g_.split > 0 && Traits::kLine == kFewRows;
    return space.slot(tokens.begin == piece.item.begin ? 1 : 0, chunk, invariant ? kMaxChunks : 1,
                      TileShape<Traits>::kRows);
  }

  // Visit the chunks of one worker's part of an item: fn(index, tokens).
  template <class Fn>
  static void for_each_chunk(const KvRange& tokens, int32_t chunk, const Fn& fn) {
    int index = 0;
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += chunk, ++index) {
      const int64_t end = std::min<int64_t>(tokens.end, begin + chunk);
      fn(index, KvRange{static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    }
  }

  KvRange first_chunk(const WorkPiece& piece) const {
    const int64_t end = int64_t{piece.tokens.begin} + chunk_of(piece);
    return {piece.tokens.begin, static_cast<int32_t>(std::min<int64_t>(piece.tokens.end, end))};
  }

  void run_chunks(Worker& work, const Space& space, const WorkPiece& piece, int32_t chunk,
                  const KeyRange& next_keys) const {
    for_each_chunk(piece.tokens, chunk, [&](int index, const KvRange& tokens) {
      const int64_t end = std::min<int64_t>(piece.tokens.end, int64_t{tokens.end} + chunk);
      const KvRange after = {tokens.end, static_cast<int32_t>(end)};
      work.attend(tokens, after.begin < after.end ? Worker::tile_of(piece, after) : next_keys);
      work.save_state(slot(space, piece.tokens, piece, index));
    });
  }

  int count_holders(const WorkPiece& piece, const KvRange& workers) const {
    int count = 0;
    for (int w = workers.begin; w < workers.end; ++w) {
      const KvRange tokens = worker_tokens(piece, starts_, w);
      count += tokens.begin < tokens.end;
    }
    return count;
  }

  // Merge all chunks in key order, whoever computed them, so that the bits do not depend on it.
  void merge(Worker& work, const WorkPiece& piece, const KvRange& workers, int32_t chunk) const {
    bool is_first = true;
    for (int w = workers.begin; w < workers.end; ++w) {
      const Space space(params_.partials, w);
      const KvRange part = worker_tokens(piece, starts_, w);
      for_each_chunk(part, chunk, [&](int index, const KvRange&) {
        const float* partial = slot(space, part, piece, index);
        if (is_first) {
          work.load_state(partial);
        } else {
          work.merge_state(partial);
        }
        is_first = false;
      });
    }
    work.write_output();
  }

  const AttentionParams& params_;
  const WorkGeometry& g_;
  const LinePosition* starts_;
};

template <class Traits>
void run_line(const AttentionParams& params, const PlanView& plan) {
  const LineRunner<Traits> runner(params, plan);
  parallel(plan.geometry->num_workers,
           [&](int worker, int thread) { runner.run_worker(worker, thread); });
}

}  // namespace fi::cpu
