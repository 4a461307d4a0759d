// A variant's functions in the CUDA kernels.
#pragma once

#include <fi_backend/attention/variant.h>

#include <fi_backend/attention/logits.cuh>

namespace fi {

// For the rows of one piece of work.
template <class Variant>
class PieceVariant {
 public:
  __device__ __forceinline__ PieceVariant(const AttentionParams& params, const WorkPiece& piece)
      : params_(params), piece_(piece) {}

  __device__ __forceinline__ variants::Row row(int32_t qo_idx, int32_t head) const {
    return {piece_.request, piece_.qo_begin + qo_idx, qo_idx, piece_.qo_len, piece_.kv_len, head,
            piece_.kv_head};
  }

  // kIsMasked: of a tile with keys that a mask hides. Their logits are -inf, and some may be past
  // the last key.
  template <bool kIsMasked>
  __device__ __forceinline__ static variants::Pair pair(const variants::Row& row, int32_t key) {
    return {row, kIsMasked ? min(key, row.kv_len - 1) : key};
  }

  // The score of a key that the variant lets the row see, from its logit in units of logit_unit().
  template <bool kIsMasked>
  __device__ __forceinline__ float score(float logit, const variants::Pair& at) const {
    return unscaled<kIsMasked>(logit, at) * score_unit<Variant>();
  }
  // The same in units of score_unit().
  template <bool kIsMasked>
  __device__ __forceinline__ float unscaled(float logit, const variants::Pair& at) const {
    const float score = unscaled_score(variant(), logit, at);
    return kIsMasked && logit == minus_infinity() ? hidden_score<Variant>() : score;
  }
  __device__ __forceinline__ bool sees(const variants::Pair& at) const {
    return variant_sees(variant(), at);
  }

  __device__ __forceinline__ float output(float value, const variants::Row& row, int dim) const {
    if constexpr (kHasOutput<Variant>) return variant().output(value, row, dim);
    return value;
  }

 private:
  __device__ __forceinline__ const Variant& variant() const { return variant_of<Variant>(params_); }

  const AttentionParams& params_;
  const WorkPiece& piece_;
};

}  // namespace fi
