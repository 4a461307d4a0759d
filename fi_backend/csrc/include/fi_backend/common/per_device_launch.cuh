// What is found out about a kernel on a device before its first launch there.
#pragma once

#include <cuda_runtime_api.h>

namespace fi {

// Keeps a result of find() for each device, for `static thread_local` variables: nobody locks.
template <class Result>
class PerDevice {
 public:
  // Set `result` to what find(device, result) set it to on the current device, which is called once
  // unless it fails.
  template <class Find>
  cudaError_t get(Result& result, const Find& find) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device >= kMaxDevices) return find(device, result);
    if (!is_known_[device]) {
      error = find(device, results_[device]);
      if (error != cudaSuccess) return error;
      is_known_[device] = true;
    }
    result = results_[device];
    return cudaSuccess;
  }

 private:
  static constexpr int kMaxDevices = 16;  // of later ones nothing is kept

  Result results_[kMaxDevices];
  bool is_known_[kMaxDevices];
};

}  // namespace fi
