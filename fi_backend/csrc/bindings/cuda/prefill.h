// Binding of the many-row attention kernel.
#pragma once

#include <bindings/cuda/attention.h>
#include <bindings/run_count.h>
#include <fi_backend/attention/many_rows_launch.h>
#include <fi_backend/attention/many_rows_shape.h>

namespace fi::bindings {

template <class Q_, class Kv_, class Out_, int kHeadDimQk_, int kHeadDimVo_, class Variant_>
struct PrefillTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr const char* kName = "prefill";
  static constexpr bool kHasRope = false;
  static constexpr bool kTakesQueryRows = true;

  static int64_t partial_floats(int64_t num_workers) {
    return many_rows_partial_floats(kHeadDimQk, kHeadDimVo, num_workers);
  }
  static int64_t invariant_partial_floats(int64_t num_workers) {
    return partial_floats(num_workers);
  }
  static cudaError_t launch(const AttentionParams& params, const AttentionLaunch& launch,
                            cudaStream_t stream) {
    const ManyRowsLaunch many = {launch.num_reqs, launch.num_workers, launch.num_pages,
                                 launch.enable_pdl};
    const cudaError_t status = launch_many_rows(params, many, stream);
    if (status == cudaSuccess) count_attention_run();
    return status;
  }
};

}  // namespace fi::bindings
