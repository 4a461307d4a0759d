// Binding of the kernel that runs both lines of a plan.
#pragma once

#include <bindings/cuda/attention.h>
#include <bindings/run_count.h>
#include <fi_backend/attention/few_rows_shape.h>
#include <fi_backend/attention/many_rows_shape.h>
#include <fi_backend/attention/mixed_rows_launch.h>

namespace fi::bindings {

template <class Q_, class Kv_, class Out_, int kHeadDimQk_, int kHeadDimVo_, class Variant_>
struct MixedTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr const char* kName = "mixed";
  static constexpr bool kHasRope = false;
  static constexpr bool kTakesQueryRows = false;

  // Both lines write theirs at the same time.
  static int64_t many_floats(int64_t num_workers) {
    return many_rows_partial_floats(kHeadDimQk, kHeadDimVo, num_workers);
  }
  static int64_t few_floats(int64_t num_workers, int32_t chunks) {
    return few_rows_partial_floats(kHeadDimQk, kHeadDimVo, num_workers, chunks);
  }
  static int64_t partial_floats(int64_t num_workers) {
    return many_floats(num_workers) + few_floats(num_workers, 1);
  }
  static int64_t invariant_partial_floats(int64_t num_workers) {
    return many_floats(num_workers) + few_floats(num_workers, kMaxChunks);
  }
  static cudaError_t launch(const AttentionParams& params, const AttentionLaunch& launch,
                            cudaStream_t stream) {
    const MixedRowsLaunch mixed = {launch.num_reqs,       launch.num_workers,
                                   launch.num_rows,       launch.num_pages,
                                   launch.partial_floats, many_floats(launch.num_workers),
                                   launch.enable_pdl};
    const cudaError_t status = launch_mixed_rows(params, mixed, stream);
    if (status == cudaSuccess) count_attention_run();
    return status;
  }
};

// True if the module has code for a device.
inline bool mixed_is_available(int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  bool result = false;
  return has_mixed_rows(result) == cudaSuccess && result;
}

}  // namespace fi::bindings
