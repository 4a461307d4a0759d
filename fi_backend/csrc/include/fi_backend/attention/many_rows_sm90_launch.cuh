// Launch the many-row kernel for sm_90a.
#pragma once

#include <fi_backend/attention/many_rows_launch.h>

#include <fi_backend/attention/many_rows_sm90.cuh>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/common/tensor_map_launch.cuh>

namespace fi {

template <class Traits>
struct ManyRowsSm90Kernel {
  using Q = typename Traits::Q;
  static constexpr auto kKernel = many_rows_sm90_kernel<Traits>;
  static constexpr int kSharedBytes = int(sizeof(Sm90Memory<Traits>));
  static_assert(kSharedBytes <= 227 * 1024, "more than a block may have");

  // What is found out once per thread and device. num_sms is 0 where this module has no code for
  // the device's own instructions.
  static cudaError_t prepare(int& num_sms) {
    thread_local int prepared_device = -1;
    thread_local int prepared_sms = 0;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device != prepared_device) {
      cudaFuncAttributes attributes = {};
      error = cudaFuncGetAttributes(&attributes, kKernel);
      if (error != cudaSuccess) return error;
      int sms = 0;
      if (attributes.maxThreadsPerBlock >= kSm90Threads) {
        error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
        if (error != cudaSuccess) return error;
        error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     kSharedBytes);
        if (error != cudaSuccess) return error;
      }
      prepared_sms = sms;
      prepared_device = device;
    }
    num_sms = prepared_sms;
    return cudaSuccess;
  }

  static cudaError_t run(const AttentionParams& params, const ManyRowsLaunch& l, int num_sms,
                         cudaStream_t stream) {
    ManyRowsSm90Params p = {params, {}, {}, 0};
    set_maps(p, l.num_pages);
    const int num_blocks = l.num_workers < num_sms ? l.num_workers : num_sms;
    return launch(kKernel, num_blocks, dim3(kSm90Threads), kSharedBytes, stream, l.enable_pdl, p);
  }

 private:
  // Boxes hold as many rows as divide both a page and a tile; smaller ones than 16 rows would take
  // the copy engine longer than the products take.
  static void set_maps(ManyRowsSm90Params& p, int64_t num_pages) {
    const AttentionParams& a = p.attention;
    const bool is_ragged = a.pages.indices == nullptr && a.pages.block_table == nullptr;
    int32_t rows = Traits::kTokens < kMaxBoxRows ? Traits::kTokens : kMaxBoxRows;
    while (!is_ragged && a.pages.page_size % rows != 0) rows /= 2;
    if (rows < kMinBoxRows) return;
    const auto& entry = TensorMapCache::find<Q>(
        shape(a.k_cache, Traits::kQk, a.k_strides, a, is_ragged, num_pages, rows),
        shape(a.v_cache, Traits::kVo, a.v_strides, a, is_ragged, num_pages, rows));
    if (!entry.is_valid) return;
    p.k_map = entry.maps[0];
    p.v_map = entry.maps[1];
    p.box_tokens = rows;
  }

  // Workers cut items at multiples of 64 tokens: larger boxes would load tokens of others.
  static constexpr int kMaxBoxRows = 64;
  static constexpr int kMinBoxRows = 16;

  static TensorMapShape shape(const void* cache, int dim, const KvStrides& strides,
                              const AttentionParams& a, bool is_ragged, int64_t num_pages,
                              int32_t rows) {
    constexpr int64_t kBytes = sizeof(Q);
    const int64_t heads = a.num_kv_heads;
    if (is_ragged) {
      return {cache,
              {dim, num_pages, heads, 1},
              {strides.page * kBytes, strides.head * kBytes, 0},
              rows,
              kPartColumns};
    }
    return {cache,
            {dim, a.pages.page_size, heads, num_pages},
            {strides.token * kBytes, strides.head * kBytes, strides.page * kBytes},
            rows,
            kPartColumns};
  }
};

}  // namespace fi
