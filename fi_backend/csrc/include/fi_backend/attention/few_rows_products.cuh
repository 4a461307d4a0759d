// The two matrix products of a tile of 16 tokens, tokens and value columns being the rows of the
// tensor cores' matrices (m), packed query rows their columns (n):
//   S^T [16 tokens, 8 rows] += K [16 tokens, qk] Q^T, O^T [16 values, 8 rows] += V^T P^T.
// Few rows then cost no more than they must: an mma has 16 rows but only 8 columns.
#pragma once

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/convert.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>
#include <fi_backend/ptx/mma.cuh>

namespace fi {

template <class Traits>
struct FewRowsProducts {
  using Compute = typename ComputeType<Traits::kComputesInHalf>::type;
  using Kv = typename Traits::Kv;
  using QRows = typename Traits::QRows;
  using KRows = typename Traits::KRows;
  using VRows = typename Traits::VRows;

  // An fp8 pair is the element that ldmatrix moves: one load serves two products.
  static constexpr int kPerLoad = Traits::kIsFp8Cache ? 2 : 1;
  static constexpr int kVoBlocks = Traits::kVo / 16;

  // Blocks of 8 rows of Q. One block stays in registers; more are read again for every tile.
  template <int kBlocks>
  class Queries {
   public:
    // q: shared address of the rows.
    __device__ __forceinline__ explicit Queries(uint32_t q) {
      const int lane = threadIdx.x % kWarpSize;
      address_ = q + QRows::offset(lane % 8, lane / 8);
      if constexpr (kBlocks == 1) {
#pragma unroll
        for (int step = 0; step < Traits::kQk / 32; ++step) load(0, step, fragments_[step]);
      }
    }
    // Fragments of dims 32 * step and on of block n, for two products.
    __device__ __forceinline__ void get(int n, int step, uint32_t (&b)[4]) const {
      if constexpr (kBlocks == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = fragments_[step][i];
      } else {
        load(n, step, b);
      }
    }

   private:
    __device__ __forceinline__ void load(int n, int step, uint32_t (&b)[4]) const {
      ptx::ldmatrix_x4(b, QRows::skip(address_ + n * kStride, 4 * step));
    }

    static constexpr int kStride = Traits::kRowGroups * kRowBlock * QRows::kRowBytes;

    uint32_t address_;
    uint32_t fragments_[kBlocks == 1 ? Traits::kQk / 32 : 1][4];
  };

  // Where a lane begins to read a tile of K, and one of V, from the tile's first row on.
  __device__ __forceinline__ static uint32_t first_key() {
    const int lane = threadIdx.x % kWarpSize;
    // Matrices of a load: tokens 0 to 7 and 8 to 15 of one chunk, then of the next.
    return KRows::offset(lane % 16, lane / 16);
  }
  __device__ __forceinline__ static uint32_t first_value() {
    const int lane = threadIdx.x % kWarpSize;
    // Matrices of a load: one chunk and the next of tokens 0 to 7, then of tokens 8 to 15.
    return VRows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // s[t][n] = 16 rows of K, tile t of those from the lane's place `k` on, times block n of Q. Two
  // chains of products take half the time of one. K is read again for every two blocks, which saves
  // registers where there are many.
  template <int kTiles, int kBlocks>
  __device__ __forceinline__ static void scores(const Queries<kBlocks>& q, uint32_t k,
                                                float (&s)[kTiles][kBlocks][4]) {
    constexpr int kPass = kBlocks < 2 ? kBlocks : 2;
#pragma unroll
    for (int first = 0; first < kBlocks; first += kPass) {
      float odd[kTiles][kPass][4] = {};
#pragma unroll
      for (int step = 0; step < Traits::kQk / 32; ++step) {  // 32 dims at a time
        uint32_t a[kTiles][2][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          load_keys(k, t, step, a[t]);
        }
#pragma unroll
        for (int n = 0; n < kPass; ++n) {
          uint32_t b[4];
          q.get(first + n, step, b);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            ptx::mma_m16n8k16<Compute>(s[t][first + n], a[t][0], {b[0], b[1]});
            ptx::mma_m16n8k16<Compute>(odd[t][n], a[t][1], {b[2], b[3]});
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int n = 0; n < kPass; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[t][first + n][i] += odd[t][n][i];
        }
      }
    }
  }

  // o[m][n] += values 16 * m and on (see value_column) of 16 rows of V, tile t of those from the
  // lane's place `v` on, times weights p[n].
  template <int kBlocks>
  __device__ __forceinline__ static void values(uint32_t v, int t, const uint32_t (&p)[kBlocks][2],
                                                float (&o)[kVoBlocks][kBlocks][4]) {
#pragma unroll
    for (int load = 0; load < kVoBlocks / kPerLoad; ++load) {
      uint32_t a[kPerLoad][4];
      load_values(v, t, load, a);
#pragma unroll
      for (int i = 0; i < kPerLoad; ++i) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          ptx::mma_m16n8k16<Compute>(o[load * kPerLoad + i][n], a[i], p[n]);
        }
      }
    }
  }

  // Weights of 16 tokens and 8 rows, in the layout that scores() gives, as values() takes them.
  __device__ __forceinline__ static void pack_weights(const float (&s)[4], uint32_t (&p)[2]) {
    p[0] = ptx::transpose_8x8(ptx::pack_pair<Compute>(s[0], s[1]));
    p[1] = ptx::transpose_8x8(ptx::pack_pair<Compute>(s[2], s[3]));
  }

  // The column of V in o[m][n][i]. Of fp8, a pair of neighbours comes as one element of ldmatrix.
  __device__ __forceinline__ static int value_column(int m, int i) {
    const int g = threadIdx.x % kWarpSize / 4;
    return m * 16 + (Traits::kIsFp8Cache ? 2 * g + i / 2 : g + i / 2 * 8);
  }
  // The row, within block n, in o[m][n][i] and s[n][i].
  __device__ __forceinline__ static int row_in_block(int i) { return threadIdx.x % 4 * 2 + i % 2; }
  // The token of s[n][i].
  __device__ __forceinline__ static int token_in_tile(int i) {
    return threadIdx.x % kWarpSize / 4 + i / 2 * 8;
  }

 private:
  // Fragments of dims 32 * step to 32 * step + 31 of tile t, for two products. Dims of an fp8 chunk
  // take the places in which their bytes come; Q's are stored to match (few_rows_queries.cuh).
  __device__ __forceinline__ static void load_keys(uint32_t k, int t, int step,
                                                   uint32_t (&a)[2][4]) {
    const int tile = t * kTileTokens * KRows::kRowBytes;
    if constexpr (Traits::kIsFp8Cache) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, KRows::skip(k, 2 * step) + tile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::widen_fp8x4<Kv>(r[2 * i], a[i][0], a[i][2]);
        ptx::widen_fp8x4<Kv>(r[2 * i + 1], a[i][1], a[i][3]);
      }
    } else {
      ptx::ldmatrix_x4(a[0], KRows::skip(k, 4 * step) + tile);
      ptx::ldmatrix_x4(a[1], KRows::skip(k, 4 * step + 2) + tile);
    }
  }

  __device__ __forceinline__ static void load_values(uint32_t v, int t, int load,
                                                     uint32_t (&a)[kPerLoad][4]) {
    const int tile = t * kTileTokens * VRows::kRowBytes;
    if constexpr (Traits::kIsFp8Cache) {
      uint32_t r[4];
      ptx::ldmatrix_x4_transposed(r, VRows::skip(v, 2 * load) + tile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A word has two columns of one token, then of the next: pair tokens instead.
        ptx::widen_fp8x4<Kv>(ptx::permute_bytes(r[i], 0, 0x3120), a[i][0], a[i][1]);
        ptx::widen_fp8x4<Kv>(ptx::permute_bytes(r[i + 2], 0, 0x3120), a[i][2], a[i][3]);
      }
    } else {
      ptx::ldmatrix_x4_transposed(a[0], VRows::skip(v, 2 * load) + tile);
    }
  }
};

}  // namespace fi
