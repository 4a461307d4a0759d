// Cosines and sines of rotary angles at one position, on float vectors.
//
// The angle is formed in double and reduced to a quarter turn before it becomes a float, so the
// error is that of the float result (1e-7) at every position, not that of a float angle (0.01
// radians at position 100000).
#pragma once

#include <cmath>
#include <cstring>

#include "fi_backend/cpu/simd.h"
#include "fi_backend/rope/rope_params.h"

namespace fi::cpu {

typedef double VecD __attribute__((vector_size(kLanes * 8)));
typedef int64_t VecL __attribute__((vector_size(kLanes * 8)));

struct RotaryFrequencies {
  // Quarter turns per position of every pair, zero behind the last one.
  double quarter_turns[kMaxRotaryDim / 2 + kLanes] = {};

  void set(const RopeParams& p) {
    constexpr double kQuarterTurnsPerRadian = 0.63661977236758134308;  // 2 / pi
    for (int i = 0; i < p.rotary_dim / 2; ++i) {
      const double base = std::exp2(-2.0 * i / p.rotary_dim * p.log2_theta);
      const double ramp = base * p.smooth_slope + p.smooth_offset;
      const double smooth = ramp < 0.0 ? 0.0 : ramp > 1.0 ? 1.0 : ramp;
      quarter_turns[i] = kQuarterTurnsPerRadian * base * (smooth + (1.0 - smooth) / p.rope_scale);
    }
  }
};

// cosine, sine: [num_pairs rounded up to kLanes].
inline void rotary_angles(const RotaryFrequencies& frequencies, int64_t position, int num_pairs,
                          float* cosine, float* sine) {
  constexpr double kRoundToInteger = 6755399441055744.0;  // 1.5 * 2^52
  constexpr float kHalfPi = 1.57079632679489662f;
  for (int i = 0; i < num_pairs; i += kLanes) {
    VecD angle;
    std::memcpy(&angle, frequencies.quarter_turns + i, sizeof(angle));
    angle *= static_cast<double>(position);
    const VecD shifted = angle + kRoundToInteger;
    const VecD nearest = shifted - kRoundToInteger;
    const VecI quadrant = __builtin_convertvector(reinterpret_cast<VecL>(shifted) & 3, VecI);
    const VecF x = __builtin_convertvector(angle - nearest, VecF) * kHalfPi;  // |x| <= pi / 4
    // Taylor series; the first terms left out are below 2e-9.
    const VecF x2 = x * x;
    VecF s = broadcast(1.0f / 362880.0f);
    s = fma(s, x2, broadcast(-1.0f / 5040.0f));
    s = fma(s, x2, broadcast(1.0f / 120.0f));
    s = fma(s, x2, broadcast(-1.0f / 6.0f));
    s = fma(s * x2, x, x);
    VecF c = broadcast(-1.0f / 3628800.0f);
    c = fma(c, x2, broadcast(1.0f / 40320.0f));
    c = fma(c, x2, broadcast(-1.0f / 720.0f));
    c = fma(c, x2, broadcast(1.0f / 24.0f));
    c = fma(c, x2, broadcast(-0.5f));
    c = fma(c, x2, broadcast(1.0f));
    // Odd quadrants swap the two; the sine is negative in 2 and 3, the cosine in 1 and 2.
    const VecI odd = (quadrant & 1) != 0;
    const VecF sine_size = select(odd, c, s);
    const VecF cosine_size = select(odd, s, c);
    store(sine + i, select((quadrant & 2) != 0, -sine_size, sine_size));
    store(cosine + i, select(((quadrant + 1) & 2) != 0, -cosine_size, cosine_size));
  }
}

}  // namespace fi::cpu
