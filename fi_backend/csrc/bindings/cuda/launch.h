// Steps 2 and 4 of every CUDA binding: the device and stream to launch on, and the error check.
#pragma once

#include <bindings/checks.h>
#include <cuda_runtime_api.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

namespace fi::bindings {

inline void check_cuda(const char* name, const TensorView& tensor) {
  if (tensor.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << name << ": must be a CUDA tensor, got one on "
                              << device_text(tensor.device()) << "; pass " << name << ".cuda()";
  }
}

// The caller's current stream, torch's too.
inline cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here: the next unrelated call must not report it again
  TVM_FFI_THROW(RuntimeError) << kernel << ": launch failed with " << cudaGetErrorName(error)
                              << ": " << cudaGetErrorString(error);
}

}  // namespace fi::bindings
