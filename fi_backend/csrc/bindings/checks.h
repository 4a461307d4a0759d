// Checks of tensor arguments. Each message names the argument, what it must be and what it is.
#pragma once

#include <fi_backend/common/dtypes.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace fi::bindings {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// DLPack's name of a C++ storage type.
template <class T>
inline constexpr DLDataType kDtypeOf = {};
template <>
inline constexpr DLDataType kDtypeOf<float> = {kDLFloat, 32, 1};
template <>
inline constexpr DLDataType kDtypeOf<half> = {kDLFloat, 16, 1};
template <>
inline constexpr DLDataType kDtypeOf<bf16> = {kDLBfloat, 16, 1};
template <>
inline constexpr DLDataType kDtypeOf<e4m3> = {kDLFloat8_e4m3fn, 8, 1};
template <>
inline constexpr DLDataType kDtypeOf<e5m2> = {kDLFloat8_e5m2, 8, 1};
template <>
inline constexpr DLDataType kDtypeOf<int32_t> = {kDLInt, 32, 1};
template <>
inline constexpr DLDataType kDtypeOf<int64_t> = {kDLInt, 64, 1};
template <>
inline constexpr DLDataType kDtypeOf<int8_t> = {kDLInt, 8, 1};
template <>
inline constexpr DLDataType kDtypeOf<uint8_t> = {kDLUInt, 8, 1};
template <>
inline constexpr DLDataType kDtypeOf<bool> = {kDLBool, 8, 1};

inline constexpr int64_t kAnySize = -1;
inline constexpr DLDevice kCpu = {kDLCPU, 0};

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::ostringstream os;
  os << '[';
  for (size_t i = 0; i < rank; ++i) {
    os << (i > 0 ? ", " : "");
    sizes[i] == kAnySize ? os << '*' : os << sizes[i];
  }
  os << ']';
  return os.str();
}

inline std::string device_text(DLDevice device) {
  if (device.device_type == kDLCPU) return "cpu";
  const std::string id = ":" + std::to_string(device.device_id);
  if (device.device_type == kDLCUDA) return "cuda" + id;
  return "DLPack device " + std::to_string(static_cast<int>(device.device_type)) + id;
}

inline void check_dtype(const char* name, const TensorView& tensor, DLDataType dtype) {
  if (tensor.dtype() != dtype) {
    TVM_FFI_THROW(TypeError) << name << ": dtype must be " << tvm::ffi::DLDataTypeToString(dtype)
                             << ", got " << tvm::ffi::DLDataTypeToString(tensor.dtype());
  }
}

inline void check_device(const char* name, const TensorView& tensor, DLDevice device) {
  const DLDevice got = tensor.device();
  if (got.device_type != device.device_type || got.device_id != device.device_id) {
    TVM_FFI_THROW(ValueError) << name << ": must be on device " << device_text(device) << ", got "
                              << device_text(got) << "; move it with .to(\"" << device_text(device)
                              << "\")";
  }
}

// The rank must be that of `sizes`; kAnySize accepts any size.
inline void check_sizes(const char* name, const TensorView& tensor,
                        std::initializer_list<int64_t> sizes) {
  bool matches = size_t(tensor.ndim()) == sizes.size();
  for (size_t i = 0; matches && i < sizes.size(); ++i) {
    const int64_t size = sizes.begin()[i];
    matches = size == kAnySize || size == tensor.size(int64_t(i));
  }
  if (!matches) {
    TVM_FFI_THROW(ValueError) << name << ": shape must be "
                              << shape_text(sizes.begin(), sizes.size()) << ", got "
                              << shape_text(tensor.shape().data(), tensor.shape().size());
  }
}

// As check_sizes, and the last dimension of a tensor of rank 1 or more must be contiguous: kernels
// take strides for all dimensions but that.
inline void check_shape(const char* name, const TensorView& tensor,
                        std::initializer_list<int64_t> sizes) {
  check_sizes(name, tensor, sizes);
  if (tensor.ndim() > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    TVM_FFI_THROW(ValueError) << name << ": the last dimension must be contiguous, got stride "
                              << tensor.stride(-1) << "; pass " << name << ".contiguous()";
  }
}

inline void check_tensor(const char* name, const TensorView& tensor, DLDataType dtype,
                         std::initializer_list<int64_t> sizes, DLDevice device) {
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, sizes);
  check_device(name, tensor, device);
}

// As check_tensor, for a tensor whose last dimension may have any stride too.
inline void check_strided(const char* name, const TensorView& tensor, DLDataType dtype,
                          std::initializer_list<int64_t> sizes, DLDevice device) {
  check_dtype(name, tensor, dtype);
  check_sizes(name, tensor, sizes);
  check_device(name, tensor, device);
}

// As check_tensor, for pages of K or V. A copy would not do: it misses what is appended later.
inline void check_cache(const char* name, const TensorView& tensor, DLDataType dtype,
                        std::initializer_list<int64_t> sizes, DLDevice device) {
  check_strided(name, tensor, dtype, sizes, device);
  if (tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    TVM_FFI_THROW(ValueError) << name << ": the last dimension must be contiguous, got strides "
                              << shape_text(tensor.strides().data(), tensor.strides().size())
                              << "; allocate the cache so (other dimensions may have any strides)";
  }
}

// Refuse, as torch does, to write a tensor several of whose elements are one place in memory.
inline void check_written(const char* name, const TensorView& tensor) {
  for (int64_t i = 0; i < tensor.ndim(); ++i) {
    if (tensor.stride(i) == 0 && tensor.size(i) > 1 && tensor.numel() > 0) {
      TVM_FFI_THROW(ValueError) << name << ": is written, so no dimension may have stride 0, got "
                                << "strides "
                                << shape_text(tensor.strides().data(), tensor.strides().size())
                                << "; pass a tensor of its own, not one from expand()";
    }
  }
}
inline void check_written(const char* name, const Optional<TensorView>& tensor) {
  if (tensor.has_value()) check_written(name, tensor.value());
}

// A vector of indices of either integer width; says whether it is int64.
inline bool check_index_tensor(const char* name, const TensorView& tensor, int64_t size,
                               DLDevice device) {
  const bool is_int64 = tensor.dtype() == kDtypeOf<int64_t>;
  if (!is_int64 && tensor.dtype() != kDtypeOf<int32_t>) {
    TVM_FFI_THROW(TypeError) << name << ": dtype must be int32 or int64, got "
                             << tvm::ffi::DLDataTypeToString(tensor.dtype());
  }
  check_shape(name, tensor, {size});
  check_device(name, tensor, device);
  return is_int64;
}

// The data of an optional tensor, or nullptr.
template <class T>
T* data_or_null(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor.value().data_ptr()) : nullptr;
}

}  // namespace fi::bindings
