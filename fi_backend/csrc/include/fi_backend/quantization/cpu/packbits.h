// Packing booleans, one byte each, into bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "fi_backend/cpu/parallel.h"

namespace fi::cpu {

// Pack the first `count` (at most 8) bytes of x, each 0 or 1; missing ones are 0. Little: x[0] is
// the lowest bit, big: the highest.
inline uint8_t pack_byte(const uint8_t* x, int64_t count, bool little) {
  uint8_t bytes[8] = {};
  std::memcpy(bytes, x, count < 8 ? count : 8);
  unsigned packed = 0;
  for (int i = 0; i < 8; ++i) packed |= unsigned{bytes[i]} << (little ? i : 7 - i);
  return static_cast<uint8_t>(packed);
}

// Pack x[0, size) into ceil(size / 8) bytes.
inline void packbits(const uint8_t* x, int64_t size, uint8_t* out, bool little) {
  const int64_t whole = size / 8;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  // Byte i of the word is 0 or 1; the product moves it to bit 56 + i, or 63 - i, without carries.
  const uint64_t gather = little ? 0x0102040810204080u : 0x8040201008040201u;
  for (int64_t i = 0; i < whole; ++i) {
    uint64_t word;
    std::memcpy(&word, x + 8 * i, sizeof(word));
    out[i] = static_cast<uint8_t>(word * gather >> 56);
  }
#else
  for (int64_t i = 0; i < whole; ++i) out[i] = pack_byte(x + 8 * i, 8, little);
#endif
  if (size % 8 != 0) out[whole] = pack_byte(x + 8 * whole, size % 8, little);
}

// Pack every segment x[indptr[s], indptr[s + 1]) to out + out_indptr[s].
inline void segment_packbits(const uint8_t* x, const int64_t* indptr, const int64_t* out_indptr,
                             int64_t num_segments, uint8_t* out, bool little, int num_threads) {
  constexpr int64_t kMinBytesPerWorker = 256 << 10;
  const int64_t size = num_segments > 0 ? indptr[num_segments] - indptr[0] : 0;
  const int64_t min_segments = kMinBytesPerWorker / (size / (num_segments + 1) + 1) + 1;
  parallel_for(num_segments, min_segments, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      packbits(x + indptr[s], indptr[s + 1] - indptr[s], out + out_indptr[s], little);
    }
  });
}

}  // namespace fi::cpu
