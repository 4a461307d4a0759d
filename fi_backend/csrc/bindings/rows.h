// Checks of tensors that are a set of rows: [size], [outer, size] or [outer, inner, size].
#pragma once

#include <bindings/checks.h>

#include <limits>

namespace fi::bindings {

struct Rows {
  int64_t num_outer;
  int64_t num_inner;
  int64_t size;
};

inline Rows check_rows(const char* name, const TensorView& tensor, DLDataType dtype,
                       DLDevice device) {
  const int rank = tensor.ndim();
  if (rank < 1 || rank > 3) {
    TVM_FFI_THROW(ValueError) << name << ": rank must be 1, 2 or 3, got shape "
                              << shape_text(tensor.shape().data(), tensor.shape().size());
  }
  if (rank == 1) check_tensor(name, tensor, dtype, {kAnySize}, device);
  if (rank == 2) check_tensor(name, tensor, dtype, {kAnySize, kAnySize}, device);
  if (rank == 3) check_tensor(name, tensor, dtype, {kAnySize, kAnySize, kAnySize}, device);
  if (tensor.size(-1) > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << name << ": the last dimension must be below 2^31, got "
                              << tensor.size(-1);
  }
  return {rank > 1 ? tensor.size(0) : 1, rank > 2 ? tensor.size(1) : 1, tensor.size(-1)};
}

// `tensor` must have the shape of `model`, but for a last dimension of `size` where given.
inline void check_like(const char* name, const TensorView& tensor, DLDataType dtype,
                       const TensorView& model, int64_t size = kAnySize) {
  const int64_t last = size == kAnySize ? model.size(-1) : size;
  const DLDevice device = model.device();
  if (model.ndim() == 1) check_tensor(name, tensor, dtype, {last}, device);
  if (model.ndim() == 2) check_tensor(name, tensor, dtype, {model.size(0), last}, device);
  if (model.ndim() == 3) {
    check_tensor(name, tensor, dtype, {model.size(0), model.size(1), last}, device);
  }
}

// Strides of the dimensions before the last, as a struct {outer, inner}.
template <class Strides>
Strides row_strides(const TensorView& tensor) {
  return {tensor.ndim() > 1 ? tensor.stride(0) : 0, tensor.ndim() > 2 ? tensor.stride(1) : 0};
}

}  // namespace fi::bindings
