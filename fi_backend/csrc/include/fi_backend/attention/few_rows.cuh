// Attention of requests with few query rows: bound by reading K and V once.
//
// One CTA per worker of the plan, several CTAs an SM. A CTA computes its units one after the other;
// the tiles of a unit are dealt to its warps, each of which runs alone on its own ring of copies
// and keeps its own softmax state. At the end of a unit the states of the warps are merged in order
// of their first tiles: the bits of a unit depend on nothing but the unit.
#pragma once

#include <fi_backend/attention/few_rows_softmax.cuh>
#include <fi_backend/attention/kv_ring.cuh>
#include <fi_backend/attention/partials.cuh>
#include <fi_backend/attention/query_rows.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

struct FewRowsParams {
  AttentionParams attention;
  const WorkGeometry* geometry;
  const LinePosition* starts;  // [num_workers + 1], of the few-row line
  int32_t* finished;           // [num_workers], 0 between launches
  PartialArea partials;
  int32_t num_slots;  // of a warp's ring
};

template <class Traits>
class FewRowsWorker {
  using Shared = FewRowsShared<Traits>;
  using Ring = KvRing<Traits>;
  static constexpr int kAccesses = Traits::kVo / kValuesPerAccess;  // of a row of values

 public:
  __device__ __forceinline__ FewRowsWorker(const FewRowsParams& p, uint8_t* shared_memory)
      : p_(p),
        shared_(*reinterpret_cast<Shared*>(shared_memory)),
        warp_(threadIdx.x / kWarpSize),
        queries_(p.attention, shared_.geometry, warp_) {}

  __device__ __forceinline__ void run() {
    constexpr int kGeometryInts = sizeof(WorkGeometry) / sizeof(int32_t);
    if (threadIdx.x < kGeometryInts) {
      reinterpret_cast<int32_t*>(&shared_.geometry)[threadIdx.x] =
          reinterpret_cast<const int32_t*>(p_.geometry)[threadIdx.x];
    }
    const LinePosition begin = p_.starts[blockIdx.x];
    const LinePosition end = p_.starts[blockIdx.x + 1];
    if (!comes_before(begin, end)) return;
    if (threadIdx.x < kFewRowsWarps) shared_.turn[threadIdx.x] = 0;
    __syncthreads();
    if (shared_.geometry.split > 0 && p_.partials.chunks < kMaxChunks) __trap();

    const AttentionParams& a = p_.attention;
    shared_.units_to_load[warp_].start(begin, end, Traits::kUnitRows);
    Ring ring(a, shared_.geometry, shared_.units_to_load[warp_], shared_.pages[warp_],
              ring_address(), p_.num_slots, warp_);
    units().start(begin, end, Traits::kUnitRows);
    load_next();
    store_next();
    __syncthreads();
    while (has_next_) {
      take_turn();
      const int blocks = (units().num_rows() + kRowBlock - 1) / kRowBlock;
      if constexpr (Traits::kUnitRows == kRowBlock) {
        compute<1>(ring);
      } else if (blocks == 1) {
        compute<1>(ring);
      } else if (Traits::kUnitRows == 2 * kRowBlock || blocks == 2) {
        compute<2>(ring);
      } else {
        compute<Traits::kUnitRows / kRowBlock>(ring);
      }
      finish_unit();
    }
  }

 private:
  __device__ __forceinline__ uint32_t ring_address() const {
    return ptx::shared_address(&shared_) + uint32_t(sizeof(Shared)) +
           warp_ * p_.num_slots * Traits::kSlotBytes;
  }

  // Which half of double buffers is the current unit's.
  __device__ __forceinline__ int turn() const { return shared_.turn[warp_]; }
  __device__ __forceinline__ void take_turn() const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) shared_.turn[warp_] ^= 1;
    __syncwarp();
  }

  // The current unit, and the one after it.
  __device__ __forceinline__ WorkUnits& units() const { return shared_.units[turn()][warp_]; }
  __device__ __forceinline__ WorkUnits& next_units() const {
    return shared_.units[turn() ^ 1][warp_];
  }
  __device__ __forceinline__ const LogitRow* rows() const { return shared_.rows[turn()]; }

  // Step to the next unit and start loading its queries, well before they are stored.
  __device__ __forceinline__ void load_next() {
    const AttentionParams& a = p_.attention;
    next_units().copy_from(units());
    has_next_ = next_units().next(shared_.geometry, a.qo_indptr, a.kv_lens);
    if (has_next_) queries_.load_first(next_units());
  }
  __device__ __forceinline__ void store_next() const {
    if (has_next_) queries_.store(next_units(), shared_.q, shared_.rows[turn() ^ 1]);
  }

  // Compute a unit of up to kBlocks blocks of rows. All but the last block is written, the last is
  // in shared memory, before a barrier.
  template <int kBlocks>
  __device__ __forceinline__ void compute(Ring& ring) const {
    const WorkPiece& piece = units().piece;
    FewRowsSoftmax<Traits, kBlocks> softmax(
        ptx::shared_address(shared_.q), rows(), make_logit_transform(p_.attention, piece),
        keys_all_see(p_.attention, shared_.geometry, kFewRows, piece));
    const int32_t end = units().tokens.end;
    int32_t token = units().tokens.begin + units().first_tile(warp_) * kTileTokens;
    for (; token < end; token += kFewRowsWarps * kTileTokens) {
      const uint32_t keys = ring.next_keys();
      softmax.attend(keys, token, end, [&ring] { return ring.next_values(); });
    }
    softmax.finish();
    for (int block = 0;; ++block) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n == block) softmax.store(n, shared_.states[warp_], shared_.values[warp_]);
      }
      if ((block + 1) * kRowBlock >= units().num_rows()) return;
      __syncthreads();
      write_block(block * kRowBlock);
      __syncthreads();
    }
  }

  // Write the last block of rows while the next unit's queries are on their way.
  __device__ __forceinline__ void finish_unit() {
    load_next();
    const bool is_shared = !units().is_whole_item() && units().ends_piece();
    if (is_shared && warp_ == kFewRowsWarps - 1) find_item_partials();
    __syncthreads();
    write_block((units().num_rows() - 1) / kRowBlock * kRowBlock);
    store_next();
    __syncthreads();
    if (is_shared) finish_piece();
  }

  // Merge what the warps have of some rows, 8 from the unit's row `first` on, and write it.
  __device__ __forceinline__ void write_block(int first) const {
    const WorkUnits& units = this->units();
    const int num_rows = min(kRowBlock, units.num_rows() - first);
    const int num_warps = min(kFewRowsWarps, units.num_tiles());
    for (int i = threadIdx.x; i < num_rows * kAccesses; i += kFewRowsThreads) {
      const int row = i / kAccesses;
      const int column = i % kAccesses * kValuesPerAccess;
      RowPart merged = empty_part();
#pragma unroll
      for (int w = 0; w < kFewRowsWarps; ++w) {
        const int warp = (units.first_warp() + w) % kFewRowsWarps;
        if (w >= num_warps) break;
        const SoftmaxState state = shared_.states[warp][row];
        const float* values = &shared_.values[warp][row][column];
        merge_part(merged, {state.max, state.sum, *reinterpret_cast<const float4*>(values)});
      }
      if (units.is_whole_item()) {
        write_output(units.piece, rows()[first + row], column, merged);
      } else {
        const int end = partial_end(units.piece, units.piece.tokens);
        const int64_t slot = p_.partials.slot(blockIdx.x, end, units.chunk_index());
        PartialSlot<Traits>(p_.attention.partials + slot)
            .store(units.first_row + first + row, column, merged);
      }
    }
  }

  __device__ __forceinline__ void write_output(const WorkPiece& piece, const LogitRow& logit_row,
                                               int column, const RowPart& part) const {
    using Out = typename Traits::Out;
    const AttentionParams& a = p_.attention;
    const RowResult result = finish_row(a, piece, logit_row, part.max, part.sum);
    const int64_t token = int64_t{piece.qo_begin} + logit_row.qo_idx;
    const float f = result.factor;
    const float x[kValuesPerAccess] = {part.values.x * f, part.values.y * f, part.values.z * f,
                                       part.values.w * f};
    Vec<Out, kValuesPerAccess>::from_floats(x).store(static_cast<Out*>(a.out) +
                                                     token * a.out_row_stride +
                                                     logit_row.head * a.out_head_stride + column);
    if (column == 0 && a.lse != nullptr) {
      a.lse[token * a.lse_row_stride + logit_row.head * a.lse_head_stride] = result.lse;
    }
  }

  __device__ __forceinline__ void find_item_partials() const {
    const ItemPartials item = find_partials(units().piece, units().chunk, p_.starts, gridDim.x,
                                            blockIdx.x, shared_.holders);
    if (threadIdx.x % kWarpSize == 0) shared_.partials = item;
  }

  // The last worker to finish its piece of an item merges them all.
  __device__ __forceinline__ void finish_piece() const {
    const ItemPartials& item = shared_.partials;
    if (threadIdx.x == 0) {
      // The barrier before, this fence and the one after order all partials of the item before the
      // merge, across CTAs.
      __threadfence();
      shared_.is_last = item.num_holders == 1;
      if (item.num_holders > 1) {
        int32_t* finished = p_.finished + item.first_holder;
        shared_.is_last = atomicAdd(finished, 1) + 1 == item.num_holders;
        if (shared_.is_last) *finished = 0;  // for the next launch
        __threadfence();
      }
    }
    __syncthreads();
    if (shared_.is_last) {
      const WorkPiece& piece = units().piece;
      for (int i = threadIdx.x; i < piece.num_rows * kAccesses; i += kFewRowsThreads) {
        const int row = i / kAccesses;
        const int column = i % kAccesses * kValuesPerAccess;
        const RowPart merged =
            merge_partials<Traits>(p_.attention.partials, p_.partials, shared_.holders,
                                   item.num_partials, units().chunk != 0, row, column);
        write_output(piece, make_logit_row(p_.attention, shared_.geometry, kFewRows, piece, row),
                     column, merged);
      }
    }
    __syncthreads();
  }

  const FewRowsParams& p_;
  Shared& shared_;
  int warp_;
  QueryRows<Traits> queries_;  // of the next unit
  bool has_next_ = false;
};

template <class Traits>
__global__ void __launch_bounds__(kFewRowsThreads, Traits::kCtasPerSm)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  ptx::grid_dependency_wait();
  FewRowsWorker<Traits>(p, shared_memory).run();
  ptx::grid_dependency_launch();
}

}  // namespace fi
