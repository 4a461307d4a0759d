// Conversion of a row between storage types that are known only at run time.
#pragma once

#include <cstring>

#include "fi_backend/cpu/rows.h"

namespace fi::cpu {

enum class Storage { kFloat, kHalf, kBf16, kE4m3, kE5m2 };

inline int64_t storage_bytes(Storage type) {
  switch (type) {
    case Storage::kFloat:
      return 4;
    case Storage::kHalf:
    case Storage::kBf16:
      return 2;
    default:
      return 1;
  }
}

// Write `size` values of x to out. An fp8 out stores saturate(x / scale).
using ConvertRow = void (*)(const void* x, void* out, int64_t size, float scale);

template <int kBytes>
void copy_row(const void* x, void* out, int64_t size, float) {
  std::memcpy(out, x, size * kBytes);
}

template <class In, class Out>
void convert_row(const void* x, void* out, int64_t size, float scale) {
  const In* from = static_cast<const In*>(x);
  Out* to = static_cast<Out*>(out);
  for_each_vector(size, [=](int64_t i, auto io) {
    const VecF v = io.read(from + i);
    io.write(to + i, sizeof(Out) == 1 ? v / scale : v);
  });
}

template <class In>
ConvertRow conversion_from(Storage out) {
  switch (out) {
    case Storage::kFloat:
      return convert_row<In, float>;
    case Storage::kHalf:
      return convert_row<In, half>;
    case Storage::kBf16:
      return convert_row<In, bf16>;
    case Storage::kE4m3:
      return convert_row<In, e4m3>;
    case Storage::kE5m2:
      return convert_row<In, e5m2>;
  }
  return nullptr;
}

// The conversion between two types, or nullptr: fp8 rows are stored only as they are.
inline ConvertRow find_conversion(Storage in, Storage out) {
  if (in == out) {
    return storage_bytes(in) == 4   ? copy_row<4>
           : storage_bytes(in) == 2 ? copy_row<2>
                                    : copy_row<1>;
  }
  switch (in) {
    case Storage::kFloat:
      return conversion_from<float>(out);
    case Storage::kHalf:
      return conversion_from<half>(out);
    case Storage::kBf16:
      return conversion_from<bf16>(out);
    default:
      return nullptr;
  }
}

}  // namespace fi::cpu
