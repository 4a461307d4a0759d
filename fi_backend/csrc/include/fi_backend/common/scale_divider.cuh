// Division of many values by one scale, for quantised stores.
#pragma once

#include <fi_backend/common/macros.h>

namespace fi {

// Gives the bits of x / scale, which is what other targets store, without its 10 instructions and
// its branch for each value: a quotient from the reciprocal, corrected by its own remainder. At
// magnitudes below 2^-85 or above 2^126 it may be 1 ulp off.
class ScaleDivider {
 public:
  __device__ __forceinline__ explicit ScaleDivider(float scale)
      : scale_(scale), reciprocal_(1.f / scale) {}

  __device__ __forceinline__ float operator()(float x) const {
    const float quotient = x * reciprocal_;
    const float remainder = fmaf(-quotient, scale_, x);
    // The sum of a zero and its remainder loses its sign, and an infinity has no remainder.
    const float corrected = copysignf(fmaf(remainder, reciprocal_, quotient), quotient);
    return corrected == corrected ? corrected : quotient;
  }

 private:
  float scale_;
  float reciprocal_;
};

}  // namespace fi
