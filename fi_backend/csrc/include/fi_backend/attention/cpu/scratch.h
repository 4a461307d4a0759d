// A worker's share of the workspace, handed out in 64-byte aligned parts.
#pragma once

#include <fi_backend/attention/workspace.h>

#include <cstdint>

namespace fi::cpu {

constexpr int kTileKeys = 128;  // keys per tile
constexpr int kBlockRows =
    64;  // query rows per block: a tile's scores stay in the first-level cache
constexpr int kKeyPadding = 32;  // pointers and score rows past a tile's end, for whole vectors

class Scratch {
 public:
  explicit Scratch(float* base) : next_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return part;
  }

 private:
  float* next_;
};

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Floats of scratch one worker needs; an upper bound over element types and lane counts.
constexpr int64_t scratch_floats(int head_dim_qk, int head_dim_vo) {
  const int64_t rows = many_row_tile(head_dim_qk, head_dim_vo);
  const int64_t qk = round_up(head_dim_qk, 16);
  const int64_t vo = round_up(head_dim_vo, 16);
  const int64_t keys = kTileKeys + kKeyPadding;
  const int64_t row_state = 16 * rows;
  const int64_t addresses = 8 * (keys + 16);
  return rows * (qk + vo) + row_state + keys * (kBlockRows + qk + vo) + addresses + 2 * (qk + vo) +
         6 * qk + 1024;
}

// The caller's arena may begin anywhere; workers begin on cache lines.
constexpr int64_t kArenaSlack = 16;
inline float* align_arena(float* arena) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(arena) + 63) / 64 * 64);
}

constexpr int64_t kControlFloats = 16;  // a worker's counter, on its own cache line

constexpr int64_t worker_floats(int head_dim_qk, int head_dim_vo) {
  return kControlFloats + partial_worker_floats(head_dim_vo) +
         round_up(scratch_floats(head_dim_qk, head_dim_vo), 16);
}

constexpr int64_t arena_floats(int64_t num_workers, int head_dim_qk, int head_dim_vo) {
  return num_workers * worker_floats(head_dim_qk, head_dim_vo) + kArenaSlack;
}

}  // namespace fi::cpu
