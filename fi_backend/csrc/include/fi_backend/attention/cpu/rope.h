// Rotary embedding inside attention, half-rotation layout: pairs are (d, d + head_dim / 2).
#pragma once

#include <cmath>
#include <cstdint>

namespace fi::cpu {

// Cosines and sines of consecutive positions. Each position follows from the one before by one
// rotation, so that a tile of keys costs the library's sine only once.
template <int kHeadDim>
struct RotaryAngles {
  static constexpr int kHalf = kHeadDim / 2;
  float cosine[kHalf];
  float sine[kHalf];
  float step_cosine[kHalf];
  float step_sine[kHalf];
  double frequency[kHalf];  // radians per position

  void init(float rope_scale, float rope_theta) {
    for (int d = 0; d < kHalf; ++d) {
      frequency[d] = std::pow(double{rope_theta}, -2.0 * d / kHeadDim) / rope_scale;
      step_cosine[d] = static_cast<float>(std::cos(frequency[d]));
      step_sine[d] = static_cast<float>(std::sin(frequency[d]));
    }
  }
  void seek(int64_t position) {
    for (int d = 0; d < kHalf; ++d) {
      const double angle = frequency[d] * static_cast<double>(position);
      cosine[d] = static_cast<float>(std::cos(angle));
      sine[d] = static_cast<float>(std::sin(angle));
    }
  }
  void next() {
    for (int d = 0; d < kHalf; ++d) {
      const float c = cosine[d] * step_cosine[d] - sine[d] * step_sine[d];
      sine[d] = sine[d] * step_cosine[d] + cosine[d] * step_sine[d];
      cosine[d] = c;
    }
  }
  void rotate(float* x) const {
    for (int d = 0; d < kHalf; ++d) {
      const float low = x[d] * cosine[d] - x[d + kHalf] * sine[d];
      x[d + kHalf] = x[d + kHalf] * cosine[d] + x[d] * sine[d];
      x[d] = low;
    }
  }
};

}  // namespace fi::cpu
