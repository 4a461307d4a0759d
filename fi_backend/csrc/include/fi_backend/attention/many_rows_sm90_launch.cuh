// Launch the many-row kernel for sm_90a.
#pragma once

#include <fi_backend/attention/many_rows_launch.h>

#include <fi_backend/attention/many_rows_sm90.cuh>
#include <fi_backend/common/launch.cuh>
#include <fi_backend/common/per_device_launch.cuh>
#include <fi_backend/common/tensor_map_launch.cuh>

namespace fi {

// Set up a kernel on the current device, once. num_sms becomes 0 where its module has no code for
// the device's own instructions.
template <auto kKernel, int kThreads, int kSharedBytes>
cudaError_t prepare_sm90_kernel(int& num_sms) {
  static_assert(kSharedBytes <= 227 * 1024, "more than a block may have");
  static thread_local PerDevice<int> prepared;
  return prepared.get(num_sms, [](int device, int& sms) {
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel);
    sms = 0;
    if (error != cudaSuccess || attributes.maxThreadsPerBlock < kThreads) return error;
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  });
}

template <class Traits>
struct ManyRowsSm90Kernel {
  using Kv = typename Traits::Kv;
  static constexpr void (*kKernel)(ManyRowsSm90Params) = many_rows_sm90_kernel<Traits>;
  static constexpr int kSharedBytes = int(sizeof(Sm90Memory<Traits>));

  static cudaError_t prepare(int& num_sms) {
    return prepare_sm90_kernel<kKernel, Traits::kThreads, kSharedBytes>(num_sms);
  }

  static ManyRowsSm90Params make_params(const AttentionParams& params, const ManyRowsLaunch& l) {
    ManyRowsSm90Params p = {};
    p.attention = params;
    p.group_size = make_fast_divider(params.num_qo_heads / params.num_kv_heads);
    p.page_size = make_fast_divider(params.pages.page_size);
    p.num_reqs = l.num_reqs;
    p.num_workers = l.num_workers;
    set_maps(p, l.num_pages);
    return p;
  }

  static cudaError_t run(const AttentionParams& params, const ManyRowsLaunch& l, int num_sms,
                         cudaStream_t stream) {
    const ManyRowsSm90Params p = make_params(params, l);
    const int num_blocks = l.num_workers < num_sms ? l.num_workers : num_sms;
    return launch(kKernel, num_blocks, dim3(Traits::kThreads), kSharedBytes, stream, l.enable_pdl,
                  p);
  }

 private:
  // Boxes have as many tokens as divide both a page and a tile; fewer than 16 would take the copy
  // engine longer than the products take.
  static void set_maps(ManyRowsSm90Params& p, int64_t num_pages) {
    const AttentionParams& a = p.attention;
    const bool is_ragged = a.pages.is_ragged();
    int32_t tokens = kMaxBoxTokens;
    while (!is_ragged && a.pages.page_size % tokens != 0) tokens /= 2;
    if (tokens < kMinBoxTokens) return;
    using K = typename Traits::LoadedK;
    using V = typename Traits::LoadedV;
    if (!fits<K>(a.k_strides) || !fits<V>(a.v_strides)) return;
    const auto k_shape = shape<K>(a.k_cache, Traits::kQk, a.k_strides, a, num_pages, tokens);
    const auto v_shape = shape<V>(a.v_cache, Traits::kVo, a.v_strides, a, num_pages, tokens);
    const auto& entry = TensorMapCache::find<Kv>(k_shape, v_shape);
    if (!entry.is_valid) return;
    const auto cache = [](const TensorMap& map, const TensorMapShape& s, const KvStrides& strides) {
      return Sm90Cache{map, static_cast<int32_t>(s.box[1] * s.box[3]),
                       static_cast<int32_t>(strides.head / kPartColumns)};
    };
    p.k = cache(entry.maps[0], k_shape, a.k_strides);
    p.v = cache(entry.maps[1], v_shape, a.v_strides);
  }

  // Workers cut items at multiples of 64 tokens: larger boxes would load tokens of others. Where
  // tiles are left out, boxes are of tokens of which all are seen or none.
  static constexpr int kSeen = kSeenTogether<typename Traits::Variant>;
  static constexpr int kMaxBoxTokens =
      kSkipsTiles<typename Traits::Variant> && (kSeen & -kSeen) < 64 ? kSeen & -kSeen : 64;
  static_assert(kMaxBoxTokens <= Traits::kTokens);
  static constexpr int kMinBoxTokens = 16;

  // Heads and their parts are one dimension.
  template <class Tile>
  static bool fits(const KvStrides& strides) {
    return Tile::kBoxParts == 1 || strides.head % kPartColumns == 0;
  }

  template <class Tile>
  static TensorMapShape shape(const void* cache, int dim, const KvStrides& strides,
                              const AttentionParams& a, int64_t num_pages, int32_t tokens) {
    constexpr int64_t kBytes = sizeof(Kv);
    constexpr int64_t kParts = Tile::kBoxParts;
    const int64_t heads = a.num_kv_heads;
    const bool is_ragged = a.pages.is_ragged();
    // Ragged K and V are one page.
    const int64_t token = (is_ragged ? strides.page : strides.token) * kBytes;
    const int64_t page = is_ragged ? 0 : strides.page * kBytes;
    const int64_t num_tokens = is_ragged ? num_pages : a.pages.page_size;
    if (is_ragged) num_pages = 1;
    if (kParts == 1) {
      return {cache,
              {dim, num_tokens, 1, heads, num_pages},
              {token, 0, strides.head * kBytes, page},
              {Tile::kColumns, tokens, 1, 1, 1}};
    }
    const int64_t parts = (heads - 1) * (strides.head / kPartColumns) + kParts;
    constexpr int64_t kPartStride = kPartColumns * kBytes;
    if (is_ragged) {
      return {cache,
              {kPartColumns, num_tokens, parts, 1, 1},
              {token, kPartStride, 0, 0},
              {kPartColumns, kBlockRows, kParts, 1, 1}};
    }
    return {cache,
            {kPartColumns, kBlockRows, parts, num_tokens / kBlockRows, num_pages},
            {token, kPartStride, kBlockRows * token, page},
            {kPartColumns, kBlockRows, kParts, tokens / kBlockRows, 1}};
  }
};

}  // namespace fi
