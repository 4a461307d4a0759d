// Launch the kernel that runs both lines of a plan.
#pragma once

#include <fi_backend/attention/mixed_rows_launch.h>

#include <fi_backend/attention/few_rows_launch.cuh>
#include <fi_backend/attention/many_rows_sm90_launch.cuh>
#include <fi_backend/attention/mixed_rows.cuh>

namespace fi {

template <class Q, class Kv, class Out, int kQk, int kVo, class Variant, class Trace = NoTrace>
struct MixedRowsKernel {
  static_assert(kIsSame<Q, Kv> && has_mixed_rows_dims(kQk, kVo), "not served");
  // A block alone on an SM: the few-row instance for any number of rows.
  using Few = StreamingFewRows<typename FewRowsInstances<Q, Kv, Out, kQk, kVo, Variant>::AllBlocks>;
  using Many = Sm90Traits<Q, Out, kQk, kVo, Variant>;
  static constexpr auto kKernel = mixed_rows_kernel<Few, Many, Trace>;
  static constexpr FewRowsShape kFewShape = mixed_few_rows_shape<Few>();
  static constexpr int kSharedBytes = mixed_rows_bytes<Few, Many>(kFewShape.shared_bytes);

  static cudaError_t exists(bool& result) {
    int num_sms = 0;
    const cudaError_t error = prepare_sm90_kernel<kKernel, Many::kThreads, kSharedBytes>(num_sms);
    result = num_sms > 0;
    return error;
  }

  static cudaError_t run(const AttentionParams& params, const MixedRowsLaunch& l,
                         cudaStream_t stream) {
    if (l.num_reqs == 0) return cudaSuccess;
    int num_sms = 0;
    const cudaError_t error = prepare_sm90_kernel<kKernel, Many::kThreads, kSharedBytes>(num_sms);
    if (error != cudaSuccess) return error;
    if (num_sms == 0) return cudaErrorNoKernelImageForDevice;
    AttentionParams few = params;
    few.partials += l.many_floats;
    const FewRowsLaunch few_launch = {l.num_reqs, l.num_workers, l.num_rows,
                                      l.partial_floats - l.many_floats, l.enable_pdl};
    const ManyRowsLaunch many_launch = {l.num_reqs, l.num_workers, l.num_pages, l.enable_pdl};
    const MixedRowsParams p = {ManyRowsSm90Kernel<Many>::make_params(params, many_launch),
                               make_few_rows_params<Few>(few, few_launch, kFewShape.num_stages)};
    return launch(kKernel, min64(l.num_workers, num_sms), dim3(Many::kThreads), kSharedBytes,
                  stream, l.enable_pdl, p);
  }
};

}  // namespace fi
