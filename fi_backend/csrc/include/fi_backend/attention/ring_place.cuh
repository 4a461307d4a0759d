// Places in rings of slots of shared memory that are filled and emptied in turn.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// A place in a ring of slots that are used in turn.
struct RingPlace {
  uint32_t slot;
  uint32_t parity;  // of the times the slot was used before

  __device__ __forceinline__ void advance(uint32_t num_slots) {
    if (++slot == num_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Place n of a line of tiles, or of units, in a ring of kSize, a power of two, and the parity of
// its phase: one register.
template <int kSize>
struct FixedRingPlace {
  static_assert((kSize & (kSize - 1)) == 0);
  uint32_t n = 0;

  __device__ __forceinline__ int index() const { return n % kSize; }
  __device__ __forceinline__ uint32_t parity() const { return n / kSize % 2; }
  // Of the phase before: over as soon as the place is empty.
  __device__ __forceinline__ uint32_t empty_parity() const { return parity() ^ 1; }
};

}  // namespace fi
