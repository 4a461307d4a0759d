// Data movement across the lanes of a set of vectors, for any vector width.
#pragma once

#include <fi_backend/attention/cpu/compute.h>

#include <utility>

namespace fi::cpu {

namespace detail {

// Lane numbers for __builtin_shuffle(a, b, lanes): kSet(l) where bit kBit of lane l is set, and
// kClear(l) where it is not; numbers from kLanes on are lanes of b.
template <int kBit, int kClearOffset, int kSetOffset, int... kLane>
constexpr VecI choose_lanes(std::integer_sequence<int, kLane...>) {
  return VecI{(kLane & kBit ? kLane + kSetOffset : kLane + kClearOffset)...};
}
template <int kBit, int kClearOffset, int kSetOffset>
constexpr VecI kChosenLanes =
    choose_lanes<kBit, kClearOffset, kSetOffset>(std::make_integer_sequence<int, kLanes>());

}  // namespace detail

// One vector whose lane l is the sum over the lanes of x[l]. Overwrites x.
template <int kBit = kLanes / 2>
inline VecF sum_each(VecF* x) {
  if constexpr (kBit == 0) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kBit; ++i) {
      const VecF a = x[i];
      const VecF b = x[i + kBit];
      // Lane l of a where the bit is clear, of b where it is set; then the lanes these leave out.
      const VecF own = __builtin_shuffle(a, b, detail::kChosenLanes<kBit, 0, kLanes>);
      const VecF other = __builtin_shuffle(a, b, detail::kChosenLanes<kBit, kBit, kLanes - kBit>);
      x[i] = own + other;
    }
    return sum_each<kBit / 2>(x);
  }
}

// Transpose a square of kLanes x kLanes words in place.
template <int kBit = kLanes / 2>
inline void transpose(VecF* x) {
  if constexpr (kBit > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kBit) continue;
      const VecF a = x[i];
      const VecF b = x[i + kBit];
      x[i] = __builtin_shuffle(a, b, detail::kChosenLanes<kBit, 0, kLanes - kBit>);
      x[i + kBit] = __builtin_shuffle(a, b, detail::kChosenLanes<kBit, kBit, kLanes>);
    }
    transpose<kBit / 2>(x);
  }
}

}  // namespace fi::cpu
