// Choose the shape of the few-row kernel for the device, and launch it.
#pragma once

#include <fi_backend/attention/few_rows_launch.h>

#include <fi_backend/attention/few_rows.cuh>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/common/per_device_launch.cuh>

namespace fi {

// How the kernel runs on a device.
struct FewRowsSetup {
  FewRowsShape shape;
  int64_t num_sms;
  bool teams_are_one_cta;  // in the code that was compiled for the device
};

// Set up the kernel on a device.
template <class Traits>
cudaError_t set_up_few_rows(int device, FewRowsSetup& setup) {
  int sm_bytes = 0, reserved_bytes = 0, num_sms = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&reserved_bytes, cudaDevAttrReservedSharedMemoryPerBlock, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  setup.shape = few_rows_shape<Traits>(sm_bytes, reserved_bytes);
  setup.num_sms = num_sms;
  if (setup.shape.num_stages < kFewRowsMinStages) return cudaErrorInvalidConfiguration;
  cudaFuncAttributes attributes = {};
  error = cudaFuncGetAttributes(&attributes, few_rows_kernel<Traits>);
  if (error != cudaSuccess) return error;
  setup.teams_are_one_cta = attributes.maxThreadsPerBlock >= Traits::kThreads * Traits::kTeams;
  const int teams = setup.teams_are_one_cta ? setup.shape.teams : 1;
  return cudaFuncSetAttribute(few_rows_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              teams * setup.shape.shared_bytes);
}

// Strides of dimensions of size 1 may be anything; they are not used.
template <class Kv>
ChunkStrides chunk_strides(const KvStrides& strides) {
  constexpr int kElements = kChunkBytes / int(sizeof(Kv));
  return {uint32_t(strides.page / kElements), uint32_t(strides.token / kElements),
          uint32_t(strides.head / kElements)};
}

template <class Traits>
FewRowsParams make_few_rows_params(const AttentionParams& params, const FewRowsLaunch& l,
                                   int num_stages) {
  const PlanView plan = view_plan(params.plan, l.num_reqs, l.num_workers);
  PartialArea partials = {Traits::kItemRows, Traits::kVo, kMaxChunks};
  if (l.partial_floats < partials.floats(l.num_workers)) partials.chunks = 1;
  return {params,
          plan.geometry,
          plan.starts[kFewRows],
          plan.cuts[kFewRows],
          plan.spans[kFewRows],
          plan.finished[kFewRows],
          partials,
          chunk_strides<typename Traits::Kv>(params.k_strides),
          chunk_strides<typename Traits::Kv>(params.v_strides),
          make_fast_divider(params.pages.page_size),
          l.num_workers,
          {ring_slots(num_stages, kKeys), ring_slots(num_stages, kValues)}};
}

template <class Traits>
cudaError_t launch_units(const AttentionParams& params, const FewRowsLaunch& l,
                         cudaStream_t stream) {
  static thread_local PerDevice<FewRowsSetup> setups;
  FewRowsSetup setup;
  const cudaError_t error = setups.get(setup, set_up_few_rows<Traits>);
  if (error != cudaSuccess) return error;
  const FewRowsParams p = make_few_rows_params<Traits>(params, l, setup.shape.num_stages);
  // No team without a worker.
  const int64_t used_sms = min64(l.num_workers, setup.num_sms);
  const int64_t teams = min64(l.num_workers / used_sms, setup.shape.teams);
  const int64_t of_cta = setup.teams_are_one_cta ? teams : 1;
  return launch(few_rows_kernel<Traits>, used_sms * (teams / of_cta),
                dim3(Traits::kThreads, unsigned(of_cta)), int(of_cta) * setup.shape.shared_bytes,
                stream, l.enable_pdl, p);
}

// The instances of a module: for units of one block of rows, of as many as there are groups of
// warps to compute them side by side, and of all that an item may have. They take as long to
// compile, so each has a file of its own.
template <class Q, class Kv, class Out, int kQk, int kVo, class Variant = NoVariant>
struct FewRowsInstances {
  static constexpr int kAllBlocks = cuda_few_rows_limit(kQk, kVo) / kRowBlock;
  // Stages of narrow heads have little to compute for each of the groups that wait for them: a
  // third one cost more than it computed, when they were half as large.
  static constexpr int kRowGroups = kQk <= 64 && kVo <= 64 ? 2 : kMaxRowGroups;
  static constexpr int kSomeBlocks = kAllBlocks < kRowGroups ? kAllBlocks : kRowGroups;
  using OneBlock = FewRowsTraits<Q, Kv, Out, kQk, kVo, 1, Variant>;
  using SomeBlocks = FewRowsTraits<Q, Kv, Out, kQk, kVo, kSomeBlocks, Variant>;
  using AllBlocks = FewRowsTraits<Q, Kv, Out, kQk, kVo, kAllBlocks, Variant>;
};

// Lengths are on the device, so the number of rows that most requests have is guessed: the results
// are the same bits whatever the unit, but rows that need several units read K and V as often.
template <class Instances>
cudaError_t few_rows(const AttentionParams& params, const FewRowsLaunch& l, cudaStream_t stream) {
  if (l.num_reqs == 0) return cudaSuccess;
  const int64_t group_size = params.num_qo_heads / params.num_kv_heads;
  const int64_t typical_rows = group_size * ((l.num_rows + l.num_reqs - 1) / l.num_reqs);
  const bool has_one_block = typical_rows <= kRowBlock;
  if (has_one_block && !has_few_items(l.num_reqs, params.num_kv_heads, l.num_workers)) {
    return launch_units<typename Instances::OneBlock>(params, l, stream);
  }
  if (typical_rows <= Instances::kSomeBlocks * kRowBlock) {
    return launch_units<typename Instances::SomeBlocks>(params, l, stream);
  }
  return launch_units<typename Instances::AllBlocks>(params, l, stream);
}

}  // namespace fi
