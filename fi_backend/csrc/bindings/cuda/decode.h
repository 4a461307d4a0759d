// Binding of the few-row attention kernel.
#pragma once

#include <bindings/cuda/attention.h>
#include <bindings/run_count.h>
#include <fi_backend/attention/few_rows_launch.h>
#include <fi_backend/attention/few_rows_shape.h>

namespace fi::bindings {

template <class Q_, class Kv_, class Out_, int kHeadDimQk_, int kHeadDimVo_, class Variant_>
struct DecodeTraits {
  using Q = Q_;
  using Kv = Kv_;
  using Out = Out_;
  using Variant = Variant_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr const char* kName = "decode";
  static constexpr bool kHasRope = false;
  static constexpr bool kTakesQueryRows = false;

  static int64_t few_rows_limit() { return cuda_few_rows_limit(kHeadDimQk, kHeadDimVo); }
  static int64_t small_item_rows() { return kSmallItemRows; }

  static int64_t partial_floats(int64_t num_workers) {
    return few_rows_partial_floats(kHeadDimQk, kHeadDimVo, num_workers, 1);
  }
  static int64_t invariant_partial_floats(int64_t num_workers) {
    return few_rows_partial_floats(kHeadDimQk, kHeadDimVo, num_workers, kMaxChunks);
  }
  static cudaError_t launch(const AttentionParams& params, const AttentionLaunch& launch,
                            cudaStream_t stream) {
    const FewRowsLaunch few = {launch.num_reqs, launch.num_workers, launch.num_rows,
                               launch.partial_floats, launch.enable_pdl};
    const cudaError_t status = launch_few_rows(params, few, stream);
    // Every run of a layer launches this kernel, whether or not the plan has work for it.
    if (status == cudaSuccess) count_attention_run();
    return status;
  }
};

}  // namespace fi::bindings
