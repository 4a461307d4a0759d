// Custom attention variants: what their functions may change, and when they are called.
//
// A variant is a struct whose members are a user's tensors (pointers to contiguous elements) and
// scalars, and which has one or more of these functions, all FI_HOST_DEVICE, so that one source
// serves every kernel of every target:
//
//   float logit(float logit, const Pair& at) const;   another logit for a row and a key
//   bool sees(const Pair& at) const;                  false hides the key from the row; beside it,
//                                                     static constexpr int kKeysSeenTogether = n
//                                                     says that it is the same for keys i * n to
//                                                     i * n + n - 1, and kQueriesSeeAlike = n that
//                                                     it is for all queries of a head of which
//                                                     position() / n is the same
//   float weight(float logit, const Pair& at) const;  with kUsesSoftmax = false alone: out is the
//                                                     sum of weight * v, which nothing normalises
//   float output(float value, const Row& row, int dim) const;  another value for out[row, dim]
//
// A logit is q . k * sm_scale * k_scale, soft-capped if the layer has a cap, in natural units. The
// masks of the layer (causal, window, custom mask) hold besides: for a key that they hide a
// function may be called, with valid indices, and what it returns is dropped. Weights are rounded
// to the 16-bit type that a GPU multiplies them in.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/attention/variant_math.h>

namespace fi {
namespace variants {

// A row of the output: one query head of one query token.
struct Row {
  int32_t request;  // of the batch
  int32_t qo_row;   // row of q
  int32_t qo_idx;   // query token, of the request's qo_len
  int32_t qo_len;
  int32_t kv_len;
  int32_t qo_head;
  int32_t kv_head;

  // The query token's own place among the keys.
  FI_HOST_DEVICE int32_t position() const { return kv_len - qo_len + qo_idx; }
};

struct Pair : Row {
  int32_t kv_idx;  // key, of the request's kv_len

  // How far the key is behind the query token; negative if it is ahead.
  FI_HOST_DEVICE int32_t distance() const { return position() - kv_idx; }
};

// The types of a variant's members, in order.
template <class... Types>
struct MemberList {};

}  // namespace variants

// Attention as params.h defines it.
struct NoVariant {
  static constexpr bool kUsesSoftmax = true;
  using Members = variants::MemberList<>;
};

// The same, by a kernel that keeps the parts of items (plan/kept_parts.h).
struct KeptParts : NoVariant {};

template <class Variant>
inline constexpr bool kKeepsParts = false;
template <>
inline constexpr bool kKeepsParts<KeptParts> = true;

namespace detail {
template <class...>
using Void = void;
}  // namespace detail

template <class Variant, class = void>
inline constexpr bool kHasLogit = false;
template <class Variant>
inline constexpr bool kHasLogit<Variant, detail::Void<decltype(&Variant::logit)>> = true;

template <class Variant, class = void>
inline constexpr bool kHasMask = false;
template <class Variant>
inline constexpr bool kHasMask<Variant, detail::Void<decltype(&Variant::sees)>> = true;

// Keys of an aligned block of which a row sees all or none.
template <class Variant, class = void>
inline constexpr int kSeenTogether = 1;
template <class Variant>
inline constexpr int kSeenTogether<Variant, detail::Void<decltype(Variant::kKeysSeenTogether)>> =
    Variant::kKeysSeenTogether;

// Queries of an aligned block, by position(), of which a head sees the same keys.
template <class Variant, class = void>
inline constexpr int kSeeAlike = 1;
template <class Variant>
inline constexpr int kSeeAlike<Variant, detail::Void<decltype(Variant::kQueriesSeeAlike)>> =
    Variant::kQueriesSeeAlike;

// Whether keys that no row of a tile sees are left out, which few questions must tell. Tiles are
// told of kSeenChunk keys at a time.
inline constexpr int kSeenChunk = 16;
template <class Variant>
inline constexpr bool kSkipsTiles = kHasMask<Variant> && kSeenTogether<Variant> % kSeenChunk == 0 &&
                                    kSeeAlike<Variant> >= kSeenChunk;

template <class Variant, class = void>
inline constexpr bool kHasWeight = false;
template <class Variant>
inline constexpr bool kHasWeight<Variant, detail::Void<decltype(&Variant::weight)>> = true;

template <class Variant, class = void>
inline constexpr bool kHasOutput = false;
template <class Variant>
inline constexpr bool kHasOutput<Variant, detail::Void<decltype(&Variant::output)>> = true;

// What logits are multiples of: softmax takes them in base 2, a variant's functions natural.
template <class Variant>
FI_HOST_DEVICE constexpr float logit_unit() {
  return kHasLogit<Variant> || kHasWeight<Variant> ? 1.0f : kLog2e;
}

// True where scores are more than the logits of params.h.
template <class Variant>
inline constexpr bool kHasScores = kHasLogit<Variant> || kHasMask<Variant> || kHasWeight<Variant>;

// True where a score that a row sees may be a product that is still to be scaled.
template <class Variant>
inline constexpr bool kScalesLate =
    !kHasScores<Variant> || (kSkipsTiles<Variant> && !kHasLogit<Variant> && !kHasWeight<Variant>);

// Rendered behind a variant's definition, so that mistakes are told in its author's terms.
template <class Variant>
constexpr bool check_variant() {
  static_assert(kHasScores<Variant> || kHasOutput<Variant>,
                "a variant has at least one of logit(), sees(), weight() and output()");
  static_assert(kHasWeight<Variant> == !Variant::kUsesSoftmax,
                "weight() takes the place of softmax: write it if, and only if, use_softmax=False");
  static_assert(kSeenTogether<Variant> > 0, "kKeysSeenTogether is a number of keys");
  static_assert(kSeeAlike<Variant> > 0, "kQueriesSeeAlike is a number of queries");
  static_assert(sizeof(Variant) <= kMaxVariantBytes, "too many tensors and scalars");
  return true;
}

// The members of this run's variant.
template <class Variant>
FI_HOST_DEVICE const Variant& variant_of(const AttentionParams& params) {
  return *reinterpret_cast<const Variant*>(params.variant);
}

// Softmax relates weights to a row's maximum, which begins below every logit. Without softmax there
// is none: it stays 0, so that the values of states that are merged simply add up.
template <class Variant>
FI_HOST_DEVICE float first_maximum() {
  return Variant::kUsesSoftmax ? -__builtin_inff() : 0.0f;
}

// The score of a key that a row does not see.
template <class Variant>
FI_HOST_DEVICE float hidden_score() {
  return Variant::kUsesSoftmax ? -__builtin_inff() : 0.0f;
}

// What an unscaled score is a multiple of.
template <class Variant>
FI_HOST_DEVICE constexpr float score_unit() {
  return kHasLogit<Variant> && !kHasWeight<Variant> ? kLog2e : 1.0f;
}

// From a logit in units of logit_unit() to the variant's score in units of score_unit(), for those
// who scale scores anyway.
template <class Variant>
FI_HOST_DEVICE float unscaled_score(const Variant& variant, float logit, const variants::Pair& at) {
  float score = logit;
  if constexpr (kHasLogit<Variant>) score = variant.logit(score, at);
  if constexpr (kHasWeight<Variant>) score = variant.weight(score, at);
  return score;
}

// The variant's score: a base-2 logit or, without softmax, a weight.
template <class Variant>
FI_HOST_DEVICE float variant_score(const Variant& variant, float logit, const variants::Pair& at) {
  return unscaled_score(variant, logit, at) * score_unit<Variant>();
}

template <class Variant>
FI_HOST_DEVICE bool variant_sees(const Variant& variant, const variants::Pair& at) {
  if constexpr (kHasMask<Variant>) return variant.sees(at);
  return true;
}

}  // namespace fi
