// Attention of requests with many query rows, on tensor cores from sm_80 up.
//
// A CTA is one worker of the plan and walks its share of the many-row line. It works on one tile of
// query rows at a time, each warp on rows of its own, and on tiles of tokens that the warps of a
// group share: while one tile is computed on, cp.async brings the next, and the page ids of the one
// after that are on their way.
#pragma once

#include <fi_backend/attention/many_rows_loads.cuh>
#include <fi_backend/attention/many_rows_output.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/named_barrier.cuh>
#include <fi_backend/ptx/wgmma.cuh>

namespace fi {

template <class Traits>
class ManyRowsWorker {
 public:
  using Memory = ManyRowsMemory<Traits>;
  using Variant = typename Traits::Variant;
  static constexpr bool kSkips = kSkipsTiles<Variant>;
  static constexpr int kTokens = Traits::kTokens;

  __device__ __forceinline__ ManyRowsWorker(const AttentionParams& params, Memory& memory)
      : p_(params), g_(*reinterpret_cast<const WorkGeometry*>(params.plan)), memory_(memory) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      memory_.group_size = make_fast_divider(g_.group_size);
      memory_.walk.begin(p_, ManyRowsWalk::plan_of(p_, g_), g_.num_reqs, blockIdx.x, 0);
      find_item(memory_.item);
    }
    __syncthreads();
    while (memory_.item.exists) {
      begin_item(memory_.item);
      attend(memory_.item);
      end_item(memory_.item);
      // The next item takes the place of this one, of its tiles and of what describes it.
      __syncthreads();
      if (threadIdx.x == 0) memory_.item = memory_.next_item;
      __syncthreads();
    }
  }

 private:
  // One thread finds items for all, ahead of time: that takes several dependent loads.
  __device__ __forceinline__ void find_item(ManyRowsItem& item) {
    item.exists = memory_.walk.next(p_, g_, memory_.group_size, item.piece, item.holders);
    item.group_size = memory_.group_size;
    if (item.exists) describe_item<typename Traits::Variant>(p_, g_, item);
  }

  // This warp's first row in a tile, and where its rows lie.
  __device__ __forceinline__ static int first_row() {
    return fresh_thread() / 32 * Traits::kWarpRows;
  }
  __device__ __forceinline__ uint8_t* warp_rows() const {
    return memory_.rows[fresh_thread() / 32];
  }

  // The first token of tile n. Where pieces are never cut, tiles begin at multiples of their size,
  // or those of a windowed row would lie where the rows beside it want them.
  __device__ __forceinline__ int tile_begin(const WorkPiece& piece, int n) const {
    const int first = g_.split < 0 ? piece.tokens.begin & -kTokens : piece.tokens.begin;
    return first + n * kTokens;
  }
  __device__ __forceinline__ bool has_tile(const WorkPiece& piece, int n) const {
    return tile_begin(piece, n) < piece.tokens.end;
  }

  using Group = typename Memory::Group;
  __device__ __forceinline__ Group& group() const {
    return memory_.groups[fresh_thread() / Traits::kGroupThreads];
  }
  __device__ __forceinline__ static void sync_group() {
    ptx::named_barrier_sync<Traits::kGroupThreads>(1 + fresh_thread() / Traits::kGroupThreads);
  }

  __device__ __forceinline__ static int thread_in_group() {
    return fresh_thread() % Traits::kGroupThreads;
  }
  // The token of tile n that this thread looks up for its group. Threads past kTokens look up none.
  __device__ __forceinline__ int thread_token(const WorkPiece& piece, int n) const {
    return tile_begin(piece, n) + thread_in_group();
  }
  __device__ __forceinline__ void copy_pages(const WorkPiece& piece, int n) {
    const int i = thread_in_group();
    if (i >= kTokens) return;
    copy_page_id(p_.pages, piece.request, thread_token(piece, n), piece.tokens, &group().pages[i]);
  }
  // The page must have arrived.
  __device__ __forceinline__ void set_offsets(const WorkPiece& piece, int n) {
    const int i = thread_in_group();
    if (i >= kTokens) return;
    group().offsets[n % kTileStages][i] =
        row_offsets(p_, group().pages[i], thread_token(piece, n), piece.tokens);
    if constexpr (kSkips) {
      RowOffsets& offsets = group().offsets[n % kTileStages][i];
      if (offsets.k >= 0 && !is_seen(thread_token(piece, n))) offsets = {-1, -1};
    }
  }
  // Whether some row of the item sees a token.
  __device__ __forceinline__ bool is_seen(int token) const {
    const ManyRowsItem& item = memory_.item;
    const SeeingRows rows = tile_rows(g_, item, 0, item.piece.num_rows - 1);
    return sight_of(variant_of<Variant>(p_), item.piece, rows, token).some;
  }
  // Whether some row of the warp sees some token of a tile: a lane asks for a row.
  __device__ __forceinline__ bool sees_tile(const ManyRowsItem& item, int begin) const {
    bool sees = !kSkips;
    if constexpr (kSkips) {
      constexpr int kBlock = kSeenTogether<Variant>;
      const int in_warp = fresh_thread() % Traits::kWarpRows;
      const int row = min(first_row() + in_warp, item.piece.num_rows - 1);
      const SeeingRows rows = tile_rows(g_, item, row, row);
      const int end = min(begin + kTokens, item.piece.tokens.end);
      int key = max(begin, item.piece.tokens.begin);
#pragma unroll 1
      for (; key < end; key = (key / kBlock + 1) * kBlock) {
        sees |= sight_of(variant_of<Variant>(p_), item.piece, rows, key).some;
      }
      sees = __any_sync(kFullWarp, sees);
    }
    return sees;
  }

  __device__ __forceinline__ void copy_tiles(const WorkPiece& piece, int n) {
    using Kv = typename Traits::Kv;
    const int stage = n % kTileStages;
    Group& to = group();
    const Kv* k = static_cast<const Kv*>(p_.k_cache) + piece.kv_head * p_.k_strides.head;
    const Kv* v = static_cast<const Kv*>(p_.v_cache) + piece.kv_head * p_.v_strides.head;
    copy_tile<Traits, true>(k, to.offsets[stage], to.k[stage]);
    copy_tile<Traits, false>(v, to.offsets[stage], to.v[stage]);
    ptx::cp_async_commit();
  }

  // Start loading the first tile, and find out what comes after this item meanwhile.
  __device__ __forceinline__ void begin_item(const ManyRowsItem& item) {
    const WorkPiece& piece = item.piece;
    copy_pages(piece, 0);
    ptx::cp_async_commit();
    copy_queries<Traits>(p_, g_, item, first_row(), warp_rows());
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    set_offsets(piece, 0);
    sync_group();
    copy_pages(piece, 1);
    copy_tiles(piece, 0);
    if (threadIdx.x == 0) find_item(memory_.next_item);
    if (threadIdx.x % 32 == 0) {
      memory_.ranges[threadIdx.x / 32] = rows_range(p_, g_, item, first_row(), Traits::kWarpRows);
    }
    rows_.clear();
  }

  __device__ __forceinline__ void attend(const ManyRowsItem& item) {
    const WorkPiece& piece = item.piece;
#pragma unroll 1
    for (int n = 0; has_tile(piece, n); ++n) {
      const int stage = n % kTileStages;
      ptx::cp_async_wait<0>();
      set_offsets(piece, n + 1);
      sync_group();
      copy_pages(piece, n + 2);
      if constexpr (Traits::kIsFp8Cache) {
        widen_tile<Traits, true>(group().k[stage], group().k_wide);
        widen_tile<Traits, false>(group().v[stage], group().v_wide);
      }
      if (has_tile(piece, n + 1)) copy_tiles(piece, n + 1);
      if constexpr (Traits::kIsFp8Cache) sync_group();
      const int begin = tile_begin(piece, n);
      const RowsRange& range = memory_.ranges[fresh_thread() / 32];
      if (begin < range.some.end && begin + kTokens > range.some.begin && sees_tile(item, begin)) {
        const uint8_t* k = Traits::kIsFp8Cache ? group().k_wide : group().k[stage];
        ScoreTile<Traits> s;
        multiply_keys<Traits>(ptx::shared_address(warp_rows()), ptx::shared_address(k), s);
        make_scores<Traits>(p_, g_, item, range.all, first_row(), begin, s);
        const float scale =
            item.is_scale_only ? item.scale : score_unit<typename Traits::Variant>();
        move_maxima<Traits>(
            s, scale, rows_, [](int, int) { return true; },
            [&](int m, int h, float factor) { scale_output<Traits>(rows_.o, m, h, factor); });
        add_weights<Traits>(s, scale, rows_);
        const uint8_t* v = Traits::kIsFp8Cache ? group().v_wide : group().v[stage];
        add_values<Traits>(s, ptx::shared_address(v), rows_.o);
      }
    }
  }

  __device__ __forceinline__ void end_item(const ManyRowsItem& item) {
    // An item without tokens has not waited for its queries, whose place the next ones take.
    ptx::cp_async_wait<0>();
    __syncwarp();
    rows_.sums.add_lanes();
    const WorkPiece& piece = item.piece;
    if (kKeepsParts<typename Traits::Variant> || piece.whole()) {
      write_output<Traits>(p_, g_, item, first_row(), rows_);
      return;
    }
    write_partial<Traits>(PartialItem<Traits>(p_, item.holders, item.holders.rank), piece.num_rows,
                          first_row(), rows_);
    end_part<Traits>(p_, g_, item, &memory_.is_last_holder, [] { __syncthreads(); });
  }

  const AttentionParams& p_;
  const WorkGeometry& g_;
  Memory& memory_;
  RowStates<Traits> rows_;
};

// Grid: one CTA per worker of the plan. Dynamic shared memory: sizeof(ManyRowsMemory<Traits>).
template <class Traits>
__global__ void __launch_bounds__(kManyRowsThreads, 1)
    many_rows_kernel(const __grid_constant__ AttentionParams p) {
  ptx::grid_dependency_wait();
  // Code for sm_90a that nothing would run is not worth its compile time.
  if constexpr (!(FI_HAS_WGMMA && Traits::kHasSm90)) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    auto& memory = *reinterpret_cast<ManyRowsMemory<Traits>*>(shared_memory);
    ManyRowsWorker<Traits>(p, memory).run();
  }
  ptx::grid_dependency_launch();
}

}  // namespace fi
