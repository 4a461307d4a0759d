// The upper tail of the normal distribution, for GELU on every target.
#pragma once

namespace fi {

// Q(z) = 1 - Phi(z) for z >= 0 is e^(-z^2 / 2) * u / 2 * P(u) with u = 1 / (1 + kScale * z), P
// fitted for a relative error of 1e-7. Coefficients from the highest power down.
struct GeluTail {
  static constexpr float kScale = 0.233345238f;  // 0.33 / sqrt(2)
  static constexpr float kP7 = -0.1353430001f;
  static constexpr float kP6 = 0.4602260274f;
  static constexpr float kP5 = -0.3511304829f;
  static constexpr float kP4 = 0.4084818772f;
  static constexpr float kP3 = 0.04723063243f;
  static constexpr float kP2 = 0.2012206811f;
  static constexpr float kP1 = 0.1829564952f;
  static constexpr float kP0 = 0.1863577638f;
};

}  // namespace fi
