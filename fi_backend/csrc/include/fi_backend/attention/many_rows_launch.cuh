// Choose the many-row kernel for the device, and launch it.
#pragma once

#include <fi_backend/attention/many_rows_launch.h>

#include <fi_backend/attention/many_rows.cuh>
#include <fi_backend/attention/many_rows_sm90_launch.cuh>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/common/per_device_launch.cuh>

namespace fi {

inline constexpr int kLargeSharedMemory = 227 * 1024;  // a block's, on sm_90 and sm_100
inline constexpr int kSmallSharedMemory = 99 * 1024;   // on sm_86, sm_89 and sm_120

template <class Q, class Kv, class Out, int kHeadDimQk, int kHeadDimVo, class Variant = NoVariant>
struct ManyRowsKernels {
  template <int kTokens, int kGroups>
  using Traits = ManyRowsTraits<Q, Kv, Out, kHeadDimQk, kHeadDimVo, kTokens, kGroups, Variant>;
  template <int kTokens, int kGroups>
  static constexpr int kBytes = int(sizeof(ManyRowsMemory<Traits<kTokens, kGroups>>));

  // The largest tile that fits; more tokens would not leave a warp the registers for their scores,
  // of which the functions of a variant take some.
  template <int kGroups>
  static constexpr int tokens_that_fit(int bytes) {
    if (kBytes<64, kGroups> <= bytes && !kHasScores<Variant>) return 64;
    return kBytes<32, kGroups> <= bytes ? 32 : 16;
  }
  static constexpr int kLarge = tokens_that_fit<2>(kLargeSharedMemory);
  static constexpr int kSmall = tokens_that_fit<1>(kSmallSharedMemory);
  static_assert(kBytes<kSmall, 1> <= kSmallSharedMemory, "no tile fits");

  using Kernel = void (*)(const AttentionParams);
  struct Choice {
    Kernel kernel;
    int shared_bytes;
  };

  // Choose and set up the kernel for a device.
  static cudaError_t choose(int device, Choice& choice) {
    int max_bytes = 0;
    const cudaError_t error =
        cudaDeviceGetAttribute(&max_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    choice = max_bytes >= kBytes<kLarge, 2>
                 ? Choice{many_rows_kernel<Traits<kLarge, 2>>, kBytes<kLarge, 2>}
                 : Choice{many_rows_kernel<Traits<kSmall, 1>>, kBytes<kSmall, 1>};
    return cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                choice.shared_bytes);
  }

  static cudaError_t run(const AttentionParams& params, const ManyRowsLaunch& l,
                         cudaStream_t stream) {
    if (l.num_reqs == 0) return cudaSuccess;
    if constexpr (has_sm90_head_dims(kHeadDimQk, kHeadDimVo, sizeof(Kv))) {
      using Sm90 = ManyRowsSm90Kernel<Sm90Traits<Q, Out, kHeadDimQk, kHeadDimVo, Variant, Kv>>;
      int num_sms = 0;
      const cudaError_t error = Sm90::prepare(num_sms);
      if (error != cudaSuccess) return error;
      if (num_sms > 0) return Sm90::run(params, l, num_sms, stream);
    }
    static thread_local PerDevice<Choice> choices;
    Choice choice;
    const cudaError_t error = choices.get(choice, choose);
    if (error != cudaSuccess) return error;
    return launch(choice.kernel, l.num_workers, dim3(kManyRowsThreads), choice.shared_bytes, stream,
                  l.enable_pdl, params);
  }
};

}  // namespace fi
