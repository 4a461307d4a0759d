// From scores to weights in the layout that a wgmma takes, for the rows of one warp.
//
// The tensor cores wait while weights are computed, and a maximum over a tile takes a quarter of
// that time. So a tile's weights are computed under the maxima of the tiles before, and only where
// their sum says that one is far too large, once more.
#pragma once

#include <fi_backend/attention/many_rows_softmax.cuh>
#include <fi_backend/ptx/convert.cuh>
#include <fi_backend/ptx/wgmma.cuh>

namespace fi {

// The weights of a tile as a wgmma takes them: 16 tokens at a time.
template <class Traits>
using WeightTile = uint32_t[Traits::kTokens / 16][4];

// Turn s, times the scale the logits of a tile, into weights under the rows' maxima, and give the
// sums of this lane's. s stays what it is. wait() is called before the first weight is packed:
// until then a product may be reading those of the tile before.
template <class Traits, class Wait>
__device__ __forceinline__ void pack_weights(const ScoreTile<Traits>& s, float scale,
                                             const RowSums<Traits>& rows,
                                             WeightTile<Traits>& weights, float (&sums)[2],
                                             const Wait& wait) {
  using Weight = typename Traits::Weight;
  constexpr int kEarly = 2;  // blocks of tokens whose weights are computed before the wait
  float base[2];
  float sum[2][2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // Not -inf - -inf where a row has seen no key: its weights are 0 under any finite maximum.
    base[h] = -fmaxf(rows.max[0][h], kLowestFloat);
  }
  // Weight i of a block is of row i % 4 / 2.
  const auto weigh = [&](int t, float(&w)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = s[0][2 * t + i / 4][i % 4];
      w[i] = Traits::Variant::kUsesSoftmax ? ptx::exp2_approx(fmaf(x, scale, base[i % 4 / 2])) : x;
    }
  };
  const auto pack = [&](int t, const float(&w)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i % 4 / 2][i % 2] += w[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[t][i] = ptx::pack_pair<Weight>(w[2 * i], w[2 * i + 1]);
  };
  float early[kEarly][8];
#pragma unroll
  for (int t = 0; t < kEarly; ++t) weigh(t, early[t]);
  wait();
#pragma unroll
  for (int t = 0; t < kEarly; ++t) {
    ptx::wgmma_finished<8>(early[t]);
    pack(t, early[t]);
  }
#pragma unroll
  for (int t = kEarly; t < Traits::kTokens / 16; ++t) {
    float w[8];
    weigh(t, w);
    pack(t, w);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) sums[h] = sum[h][0] + sum[h][1];
}

}  // namespace fi
