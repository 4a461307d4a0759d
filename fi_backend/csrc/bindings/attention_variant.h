// The arguments that a custom attention variant adds to a run: its tensors and scalars.
#pragma once

#include <bindings/attention_checks.h>
#include <fi_backend/attention/variant.h>

#include <cstring>

namespace fi::bindings {

// A member of type T: what it arrives as, and how it is read.
template <class T>
struct Member;
template <>
struct Member<float> {
  using Argument = double;
  static float read(const char* /*name*/, double value, DLDevice /*device*/) {
    return static_cast<float>(value);
  }
};
template <>
struct Member<int32_t> {
  using Argument = int64_t;
  static int32_t read(const char* name, int64_t value, DLDevice /*device*/) {
    if (value != static_cast<int32_t>(value)) {
      TVM_FFI_THROW(ValueError) << name << ": must fit 32 bits, got " << value;
    }
    return static_cast<int32_t>(value);
  }
};
template <class T>
struct Member<const T*> {
  using Argument = TensorView;
  static const T* read(const char* name, const TensorView& tensor, DLDevice device) {
    check_dtype(name, tensor, kDtypeOf<T>);
    check_device(name, tensor, device);
    if (!tensor.IsContiguous()) {
      TVM_FFI_THROW(ValueError) << name << ": must be contiguous, got strides "
                                << shape_text(tensor.strides().data(), tensor.strides().size())
                                << "; pass " << name << ".contiguous()";
    }
    return static_cast<const T*>(tensor.data_ptr());
  }
};

// Refuse what a variant has no place for: ALiBi, which it would add itself, and what is made of
// softmax's denominators where there are none.
template <class Variant>
void check_variant_options(const AttentionArguments& a) {
  if constexpr (kHasScores<Variant>) {
    if (a.alibi_slopes.has_value()) {
      TVM_FFI_THROW(ValueError) << "alibi_slopes: must be None with a custom variant; add the bias "
                                << "in its logit()";
    }
  }
  if constexpr (!Variant::kUsesSoftmax) {
    if (a.lse.has_value() || a.sinks.has_value()) {
      TVM_FFI_THROW(ValueError) << (a.lse.has_value() ? "lse" : "sinks")
                                << ": must be None with a variant that does not use softmax";
    }
  }
}

// Set params.variant from the arguments of a run.
template <class Variant, class... Members>
void set_variant(AttentionParams& params, DLDevice device,
                 const typename Member<Members>::Argument&... arguments) {
  if constexpr (sizeof...(Members) > 0) {
    const char* const* name = Variant::kMemberNames;
    const Variant variant = {Member<Members>::read(*name++, arguments, device)...};
    std::memcpy(params.variant, &variant, sizeof(variant));
  }
}

}  // namespace fi::bindings
