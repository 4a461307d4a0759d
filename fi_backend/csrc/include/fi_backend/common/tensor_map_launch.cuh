// Tensor maps for the copy engine of sm_90, made by the host.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <fi_backend/common/tensor_map.h>

#include <cstring>

namespace fi {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) <= 64);

// A tensor of five dimensions, the innermost one first and contiguous, and a box of it.
// Dimensions may overlap in memory.
struct TensorMapShape {
  static constexpr int kDims = 5;

  const void* base;            // aligned to 16 bytes
  int64_t sizes[kDims];        // in elements
  int64_t strides[kDims - 1];  // of dimensions 1 to 4, in bytes; multiples of 16
  int64_t box[kDims];          // in elements; 64 or 128 bytes of dimension 0

  bool operator==(const TensorMapShape& other) const {
    return std::memcmp(this, &other, sizeof(*this)) == 0;
  }
};
static_assert(sizeof(TensorMapShape) == 15 * sizeof(int64_t), "padding would be compared");

template <class T>
inline constexpr CUtensorMapDataType kTensorMapType =
    sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// The driver's encoder, without linking the driver; nullptr where it has none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Encode a map. Boxes lie swizzled in shared memory as SwizzledRows of 128 or 64 bytes do. False
// where the copy engine cannot take the tensor.
template <class T>
bool encode_tensor_map(const TensorMapShape& shape, TensorMap& map) {
  static const auto encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  constexpr int kDims = TensorMapShape::kDims;
  cuuint64_t sizes[kDims];
  cuuint64_t strides[kDims - 1];
  cuuint32_t box[kDims];
  cuuint32_t steps[kDims];
  for (int i = 0; i < kDims; ++i) {
    sizes[i] = static_cast<cuuint64_t>(shape.sizes[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    steps[i] = 1;
  }
  // A dimension of size 1 may have any stride, which nothing uses.
  for (int i = 0; i + 1 < kDims; ++i) {
    strides[i] = shape.sizes[i + 1] > 1 ? static_cast<cuuint64_t>(shape.strides[i]) : 16;
  }
  const auto swizzle =
      shape.box[0] * sizeof(T) == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&map), kTensorMapType<T>, kDims, const_cast<void*>(shape.base),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS;
}

// Maps of a pair of caches that this thread has encoded before: an engine's layers take turns.
class TensorMapCache {
 public:
  struct Entry {
    TensorMapShape shapes[2];
    TensorMap maps[2];
    bool is_valid;
  };

  template <class T>
  static const Entry& find(const TensorMapShape& k, const TensorMapShape& v) {
    thread_local Entry entries[kSize] = {};
    Entry& entry = entries[reinterpret_cast<uintptr_t>(k.base) / kGranularity % kSize];
    if (!(entry.shapes[0] == k && entry.shapes[1] == v)) {
      entry.is_valid =
          encode_tensor_map<T>(k, entry.maps[0]) && encode_tensor_map<T>(v, entry.maps[1]);
      entry.shapes[0] = k;
      entry.shapes[1] = v;
    }
    return entry;
  }

 private:
  static constexpr int kSize = 127;
  static constexpr uintptr_t kGranularity = 512;  // of allocations
};

}  // namespace fi
