// What a traced launch of the mixed kernel records about a thread block.
#pragma once

#include <fi_backend/plan/geometry.h>

namespace fi {

// Times in nanoseconds, by line; 0 where the block never was at one.
struct BlockTrace {
  int64_t sm;
  struct {
    int64_t begin;
    int64_t end;
  } lines[kNumLines];
};

constexpr int kMaxTracedBlocks = 256;

}  // namespace fi
