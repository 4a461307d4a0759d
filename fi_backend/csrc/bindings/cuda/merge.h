// Bindings of the merge kernels: validate, device and stream, params, launch.
#pragma once

#include <bindings/cuda/launch.h>
#include <bindings/merge_checks.h>
#include <fi_backend/attention/merge_launch.h>

namespace fi::bindings {

// See checked_pair_params.
template <class Types>
void merge_pair(TensorView v_a, TensorView lse_a, TensorView v_b, TensorView lse_b,
                TensorView v_out, Optional<TensorView> lse_out, Optional<TensorView> mask,
                bool enable_pdl) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  check_cuda("v_a", v_a);
  const DLDevice device = v_a.device();
  MergePairParams params =
      checked_pair_params<In, Out>(v_a, lse_a, v_b, lse_b, v_out, lse_out, mask, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("merge_pair", launch_merge_pair(params, current_stream(device)));
}

// See checked_states_params.
template <class Types>
void merge_states(TensorView v, TensorView lse, TensorView v_out, Optional<TensorView> lse_out,
                  bool enable_pdl) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  check_cuda("v", v);
  const DLDevice device = v.device();
  MergeStatesParams params = checked_states_params<In, Out>(v, lse, v_out, lse_out, device);
  params.enable_pdl = enable_pdl;

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  check_launch("merge_states", launch_merge_states(params, current_stream(device)));
}

}  // namespace fi::bindings
