// Choose the access width and the grid of a gated activation, and launch it.
#pragma once

#include <fi_backend/activation/activation_launch.h>

#include <fi_backend/activation/activation.cuh>
#include <fi_backend/common/launch.cuh>

namespace fi {

template <class Traits>
cudaError_t launch_gate_and_mul(const GatedActivationParams& p, cudaStream_t stream) {
  // Short rows take fewer threads, whole warps.
  const int64_t threads = (p.hidden_size + Traits::kVecSize - 1) / Traits::kVecSize;
  const int64_t block =
      threads < kActivationThreads ? (threads + 31) / 32 * 32 : kActivationThreads;
  const GridShape grid = make_grid(p.num_outer * p.num_inner, (threads + block - 1) / block);
  return launch(gate_and_mul_kernel<Traits>, grid, dim3(unsigned(block)), 0, stream, p.enable_pdl,
                p);
}

template <class T, template <class> class Gate>
cudaError_t gate_and_mul(const GatedActivationParams& p, cudaStream_t stream) {
  if (p.num_outer == 0 || p.num_inner == 0 || p.hidden_size == 0) return cudaSuccess;
  constexpr int kVec = kVecSizeFor<T, T>;
  const bool is_vectorizable =
      is_aligned<T, kVec>(p.input, p.hidden_size, p.input_strides.outer, p.input_strides.inner) &&
      is_aligned<T, kVec>(p.out, p.out_strides.outer, p.out_strides.inner);
  return is_vectorizable ? launch_gate_and_mul<ActivationTraits<T, Gate, kVec>>(p, stream)
                         : launch_gate_and_mul<ActivationTraits<T, Gate, 1>>(p, stream);
}

}  // namespace fi
