// Indices that a kernel asks for first and uses last.
#pragma once

#include <fi_backend/common/index_array.h>
#include <fi_backend/common/macros.h>

namespace fi {

// What is computed from the words stays behind this line. The compiler would move it to where they
// are loaded, and so wait for them in front of the loads in between.
// NOTE: not in a loop, whose invariants the assembler moves in front of it all the same.
__device__ __forceinline__ void use_from_here(int32_t& a, int32_t& b) {
  asm volatile("" : "+r"(a), "+r"(b)::"memory");
}

// An element of an index array: its load starts with the constructor, get() waits for it.
class EarlyIndex {
 public:
  EarlyIndex() = default;
  __device__ __forceinline__ EarlyIndex(IndexArray array, int64_t i) {
    const int width = array.is_int64 ? 2 : 1;
    const auto* words = static_cast<const int32_t*>(array.data) + i * width;
    low_ = words[0];
    last_ = words[width - 1];
    sign_bits_ = array.is_int64 ? 0 : 31;
  }

  // NOTE: no choice between two results: half of one is made, and waits, in front of other loads.
  __device__ __forceinline__ int64_t get() {
    use_from_here(low_, last_);
    return int64_t(uint64_t(uint32_t(last_ >> sign_bits_)) << 32 | uint32_t(low_));
  }

 private:
  int32_t low_, last_;
  int sign_bits_;  // by which the last word is shifted to become the high one
};

}  // namespace fi
