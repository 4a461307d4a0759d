// The stages of a unit of the few-row line that some of its rows see.
#pragma once

#include <fi_backend/attention/seen_blocks.h>

#include <fi_backend/attention/few_rows_traits.cuh>
#include <fi_backend/common/reduce.cuh>

namespace fi {

struct SeenStage {
  static constexpr int32_t kNone = StageTokens<true>::kNone;

  int32_t token;    // kNone past the last stage
  uint32_t chunks;  // of kSeenChunk tokens that some row sees, a bit each

  // The token itself, or where nobody sees it one that somebody sees.
  __device__ __forceinline__ int32_t stand_in(int32_t mine, int32_t end) const {
    const int32_t first_chunk = token / kSeenChunk;
    if (chunks >> (mine / kSeenChunk - first_chunk) & 1) return mine;
    return min(max((first_chunk + __ffs(chunks) - 1) * kSeenChunk, token), end - 1);
  }
};

// A warp walks over them: each lane looks at a stage.
template <class Traits>
class SeenStages {
  using Variant = typename Traits::Variant;

 public:
  __device__ __forceinline__ SeenStages(const AttentionParams& params, const WorkGeometry& g,
                                        const WorkUnits& units)
      : params_(params),
        g_(g),
        units_(units),
        token_(units.tokens().begin - kWarpSize * Traits::kStageTokens) {}

  // The next one. Not to be called again after the last.
  __device__ __forceinline__ SeenStage take() {
    uint32_t seen = __ballot_sync(kFullWarp, chunks_ != 0);
#pragma unroll 1
    while (seen == 0) {
      token_ += kWarpSize * Traits::kStageTokens;
      if (token_ >= units_.tokens().end) return {SeenStage::kNone, 0};
      chunks_ = look_at(token_ + lane() * Traits::kStageTokens);
      seen = __ballot_sync(kFullWarp, chunks_ != 0);
    }
    const int first = __ffs(seen) - 1;
    const uint32_t chunks = __shfl_sync(kFullWarp, chunks_, first);
    if (lane() == first) chunks_ = 0;
    return {token_ + first * Traits::kStageTokens, chunks};
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }

  // The chunks that some row sees of the stage at `token`.
  __device__ __forceinline__ uint32_t look_at(int32_t token) const {
    constexpr int kBlock = kSeenTogether<Variant>;
    const SeeingRows rows = unit_rows();
    const int32_t end = min(token + Traits::kStageTokens, units_.tokens().end);
    const int32_t first_chunk = token / kSeenChunk;
    uint32_t chunks = 0;
#pragma unroll 1
    for (int32_t key = token, next; key < end; key = next) {
      next = (key / kBlock + 1) * kBlock;
      if (!sight_of(variant_of<Variant>(params_), units_.piece(), rows, key).some) continue;
      const int32_t last = min(next, end) - 1;
      chunks |=
          (2u << (last / kSeenChunk - first_chunk)) - (1u << (key / kSeenChunk - first_chunk));
    }
    return chunks;
  }
  __device__ __forceinline__ SeeingRows unit_rows() const {
    const auto group = static_cast<uint32_t>(g_.group_size);
    const uint32_t first = units_.first_row(), last = first + units_.num_rows() - 1;
    const int32_t kv_head = units_.piece().kv_head;
    const int32_t head = kv_head * g_.group_size;
    return seeing_rows(int32_t(first / group), head + int32_t(first % group), int32_t(last / group),
                       head + int32_t(last % group), kv_head, g_.group_size);
  }

  const AttentionParams& params_;
  const WorkGeometry& g_;
  const WorkUnits& units_;
  int32_t token_;        // where the stages begin that lanes have looked at
  uint32_t chunks_ = 0;  // of the lane's stage; 0 also once it has been taken
};

}  // namespace fi
