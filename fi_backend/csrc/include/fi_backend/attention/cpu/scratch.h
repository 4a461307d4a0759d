// The workspace on the CPU: each worker's share, and how it is handed out.
//
// Each worker owns partial states of items that it shares with others (at most one at the head and
// one at the tail of its piece of the line, each in up to kMaxChunks chunks) and scratch for the
// tile it works on.
#pragma once

#include <fi_backend/attention/row_tiles.h>
#include <fi_backend/plan/work_line.h>

#include <cstdint>

namespace fi::cpu {

// Most packed rows of an item of the few-row line.
constexpr int kFewRowsLimit = 16;

constexpr int kPartialRows = 2 * kMaxChunks * kFewRowsLimit;  // of a worker, both ends
static_assert(kPartialRows >= 2 * many_row_tile(128, 128), "both lines use one partial area");

constexpr int64_t partial_worker_floats(int head_dim_vo) {
  return (int64_t{kPartialRows} * (head_dim_vo + kPartialTail) + 15) / 16 * 16;
}

// Hands out 64-byte aligned parts of a worker's scratch.
class Scratch {
 public:
  explicit Scratch(float* base) : base_(base), next_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return part;
  }
  int64_t num_taken() const { return next_ - base_; }  // floats

 private:
  float* base_;
  float* next_;
};

// Floats of scratch one worker needs: an upper bound over element types, lines and lane counts,
// which Attend asserts (with FI_BACKEND_JIT_DEBUG).
constexpr int64_t scratch_floats(int head_dim_qk, int head_dim_vo) {
  const int64_t rows = many_row_tile(head_dim_qk, head_dim_vo);
  const int64_t qk = (head_dim_qk + 31) / 32 * 32;
  const int64_t vo = (head_dim_vo + 31) / 32 * 32;
  const int64_t wide = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
  const int64_t keys = (wide <= 128 ? 192 : wide <= 256 ? 128 : 64) + 32;
  const int64_t state = 8 * rows;
  const int64_t scores = keys * 64;
  const int64_t addresses = 8 * keys;
  return rows * (qk + vo) + state + scores + keys * (qk + vo) + addresses + 24 * (qk + vo) + 1024;
}

// The caller's arena may begin anywhere; workers begin on cache lines.
constexpr int64_t kArenaSlack = 16;
inline float* align_arena(float* arena) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(arena) + 63) / 64 * 64);
}

constexpr int64_t kControlFloats = 16;  // a worker's counter, on its own cache line

constexpr int64_t worker_floats(int head_dim_qk, int head_dim_vo) {
  return kControlFloats + partial_worker_floats(head_dim_vo) +
         (scratch_floats(head_dim_qk, head_dim_vo) + 15) / 16 * 16;
}

constexpr int64_t arena_floats(int64_t num_workers, int head_dim_qk, int head_dim_vo) {
  return num_workers * worker_floats(head_dim_qk, head_dim_vo) + kArenaSlack;
}

}  // namespace fi::cpu
