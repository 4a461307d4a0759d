// Bindings of the merge kernels: validate, params, run.
#pragma once

#include <bindings/merge_checks.h>
#include <fi_backend/attention/cpu/merge.h>

namespace fi::bindings {

// See checked_pair_params.
template <class Types>
void merge_pair(TensorView v_a, TensorView lse_a, TensorView v_b, TensorView lse_b,
                TensorView v_out, Optional<TensorView> lse_out, Optional<TensorView> mask,
                int64_t num_threads) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  const MergePairParams params =
      checked_pair_params<In, Out>(v_a, lse_a, v_b, lse_b, v_out, lse_out, mask, kCpu);

  cpu::merge_pair<In, Out>(params, static_cast<int>(num_threads));
}

// See checked_states_params.
template <class Types>
void merge_states(TensorView v, TensorView lse, TensorView v_out, Optional<TensorView> lse_out,
                  int64_t num_threads) {
  using In = typename Types::In;
  using Out = typename Types::Out;
  const MergeStatesParams params = checked_states_params<In, Out>(v, lse, v_out, lse_out, kCpu);

  cpu::merge_states<In, Out>(params, static_cast<int>(num_threads));
}

}  // namespace fi::bindings
