// Gated activations of rows; see activation_params.h for the formula.
#pragma once

#include <fi_backend/activation/activation_params.h>
#include <fi_backend/common/div.h>
#include <fi_backend/common/grid.h>

#include <fi_backend/activation/gates.cuh>
#include <fi_backend/common/vec.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kActivationThreads = 128;

// T stores the values; kVecSize elements move as one access.
template <class T_, template <class> class Gate_, int kVecSize_>
struct ActivationTraits {
  using T = T_;
  using Gate = Gate_<T>;
  static constexpr int kVecSize = kVecSize_;
};

// A thread takes one access of each half of a row. Grid: [rows, blocks of a row].
// NOTE: with two accesses a thread it is 7 % slower on an H200, and no faster at any size.
template <class Traits>
__global__ void __launch_bounds__(kActivationThreads)
    gate_and_mul_kernel(const __grid_constant__ GatedActivationParams p) {
  using T = typename Traits::T;
  constexpr int kVecSize = Traits::kVecSize;
  using VecT = Vec<T, kVecSize>;
  ptx::grid_dependency_wait();

  const int64_t index = outer_block_index();
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVecSize;
  if (index >= p.num_outer * p.num_inner || i >= p.hidden_size) return;
  const QuotRem row = p.num_inner == 1 ? QuotRem{index, 0} : divide_index(index, p.num_inner);
  const T* gate = static_cast<const T*>(p.input) + row.quot * p.input_strides.outer +
                  row.rem * p.input_strides.inner + i;
  T* out =
      static_cast<T*>(p.out) + row.quot * p.out_strides.outer + row.rem * p.out_strides.inner + i;

  const VecT x = VecT::load_once(gate);
  const VecT factor = VecT::load_once(gate + p.hidden_size);
  float a[kVecSize], b[kVecSize];
  x.to_floats(a);
  factor.to_floats(b);
#pragma unroll
  for (int e = 0; e < kVecSize; ++e) a[e] = typename Traits::Gate{}(a[e]) * b[e];
  VecT::from_floats(a).store(out);
  ptx::grid_dependency_launch();
}

}  // namespace fi
