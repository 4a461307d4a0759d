// Binding of the few-row attention kernel.
#pragma once

#include <bindings/cpu/attention.h>

namespace fi::bindings {

template <class Q_, class Kv_, class Out_, int kHeadDimQk_, int kHeadDimVo_, class Variant_>
struct DecodeTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr int kLine = kFewRows;
};

}  // namespace fi::bindings
