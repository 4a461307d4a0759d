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
#include <fi_backend/ptx/atomic.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>
#include <fi_backend/ptx/load_global.cuh>

namespace fi {

struct FewRowsParams {
  AttentionParams attention;
  const WorkGeometry* geometry;
  const LinePosition* starts;  // [num_workers + 1], of the few-row line
  const RequestSpan* spans;    // [num_workers]
  int32_t* finished;           // [num_workers], 0 between launches
  PartialArea partials;
  PageStep page_step;
  int32_t num_slots;  // of a warp's ring
};

template <class Traits>
class FewRowsWorker {
  using Shared = FewRowsShared<Traits>;
  using Ring = KvRing<Traits>;
  static constexpr int kAccesses = Traits::kVo / kValuesPerAccess;  // of a row of values
  // Queries are loaded a whole unit ahead, but where accumulators need every register.
  static constexpr bool kLoadsQueriesEarly = Traits::kUnitRows == kRowBlock;

 public:
  __device__ __forceinline__ FewRowsWorker(const FewRowsParams& p, uint8_t* shared_memory)
      : p_(p),
        shared_(*reinterpret_cast<Shared*>(shared_memory)),
        queries_(p.attention, shared_.geometry) {}

  __device__ __forceinline__ void run() {
    constexpr int kGeometryInts = sizeof(WorkGeometry) / sizeof(int32_t);
    if (threadIdx.x < kGeometryInts) {
      reinterpret_cast<int32_t*>(&shared_.geometry)[threadIdx.x] =
          reinterpret_cast<const int32_t*>(p_.geometry)[threadIdx.x];
    }
    const int4 span = *reinterpret_cast<const int4*>(p_.spans + blockIdx.x);
    const WorkerRange range = {load_position(p_.starts + blockIdx.x),
                               load_position(p_.starts + blockIdx.x + 1),
                               {span.x, span.y, span.z, span.w}};
    if (!comes_before(range.begin, range.end)) return;
    if (threadIdx.x < kFewRowsWarps) shared_.turn[threadIdx.x] = 0;
    __syncthreads();
    if (shared_.geometry.split > 0 && p_.partials.chunks < kMaxChunks) __trap();

    // Page ids, then queries, then tiles: in the order in which something waits for them.
    const AttentionParams& a = p_.attention;
    WorkUnits& first = shared_.units_to_load[this_warp()];
    if (!first.start(shared_.geometry, range, Traits::kUnitRows, a.qo_indptr, a.kv_lens)) return;
    next_units().copy_from(first);
    __syncwarp();
    Ring ring(a, shared_.geometry, p_.page_step, first, shared_.pages[this_warp()], ring_address(),
              p_.num_slots);
    queries_.load_first(next_units());
    ring.fill();
    store_next();
    __syncthreads();
    while (next_units().exists) {
      begin_unit();
      const int blocks = Traits::num_blocks(units().num_rows());
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
           this_warp() * p_.num_slots * Traits::kSlotBytes;
  }

  // Which half of double buffers is the current unit's.
  __device__ __forceinline__ int turn() const { return shared_.turn[this_warp()]; }
  __device__ __forceinline__ void take_turn() const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) shared_.turn[this_warp()] ^= 1;
    __syncwarp();
  }

  // The current unit, and the one after it.
  __device__ __forceinline__ WorkUnits& units() const { return shared_.units[turn()][this_warp()]; }
  __device__ __forceinline__ WorkUnits& next_units() const {
    return shared_.units[turn() ^ 1][this_warp()];
  }
  __device__ __forceinline__ const LogitRow* rows() const { return shared_.rows[turn()]; }

  // Step to the next unit. While its tiles are on their way, start loading the queries of the one
  // after it, and find who else holds keys of a cut item.
  __device__ __forceinline__ void begin_unit() {
    take_turn();
    const AttentionParams& a = p_.attention;
    next_units().copy_from(units());
    next_units().next(shared_.geometry, a.qo_indptr, a.kv_lens);
    if (kLoadsQueriesEarly) queries_.load_first(next_units());
    const bool is_last_to_start = units().first_tile() == kFewRowsWarps - 1;
    if (!units().is_whole_item() && units().begins_piece() && is_last_to_start) {
      const ItemPartials item =
          find_partials(units().piece, units().chunk, p_.starts, gridDim.x, blockIdx.x);
      if (threadIdx.x % kWarpSize == 0) {
        shared_.partials = item;
        ptx::prefetch_to_l2(p_.finished + item.first_holder);
      }
    }
  }
  __device__ __forceinline__ void store_next() const {
    if (next_units().exists) queries_.store(next_units(), shared_.q, shared_.rows[turn() ^ 1]);
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
    int32_t token = units().tokens.begin + units().first_tile() * kTileTokens;
    for (; token < end; token += kFewRowsWarps * kTileTokens) {
      const uint32_t keys = ring.next_keys();
      softmax.attend(keys, token, end, [&ring] { return ring.next_values(); });
    }
    softmax.finish();
    for (int block = 0;; ++block) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n == block) softmax.store(n, shared_.states[this_warp()], shared_.values[this_warp()]);
      }
      if ((block + 1) * kRowBlock >= units().num_rows()) return;
      __syncthreads();
      write_block(block * kRowBlock);
      __syncthreads();
    }
  }

  // Write the last block of rows.
  __device__ __forceinline__ void finish_unit() {
    if (!kLoadsQueriesEarly) queries_.load_first(next_units());
    __syncthreads();
    write_block((units().num_rows() - 1) / kRowBlock * kRowBlock);
    store_next();
    __syncthreads();
    if (!units().is_whole_item() && units().ends_piece()) finish_piece();
  }

  // Merge what the warps have of some rows, 8 from the unit's row `first` on, and write it.
  __device__ __forceinline__ void write_block(int first) const {
    const WorkUnits& units = this->units();
    const int num_rows = min(kRowBlock, units.num_rows() - first);
    const int num_warps = min(kFewRowsWarps, units.num_tiles());
    for (int i = threadIdx.x; i < num_rows * kAccesses; i += kFewRowsThreads) {
      const int row = i / kAccesses;
      const int column = i % kAccesses * kValuesPerAccess;
      RowPart parts[kFewRowsWarps];
#pragma unroll
      for (int w = 0; w < kFewRowsWarps; ++w) {
        const int warp = (units.first_warp() + w) % kFewRowsWarps;
        const SoftmaxState state = shared_.states[warp][row];
        const float* values = &shared_.values[warp][row][column];
        parts[w] = {w < num_warps ? state.max : minus_infinity(), state.sum,
                    *reinterpret_cast<const float4*>(values)};
      }
      RowPart merged = empty_part();
      merge_parts(merged, parts);
      if (units.is_whole_item()) {
        write_output(units.piece, rows()[first + row], column, merged);
      } else {
        const ItemPartials& item = shared_.partials;
        const int64_t slot =
            item.slot(p_.partials, item.is_chunked ? units.chunk_index() : item.rank);
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

  // The last worker to finish its piece of an item merges them all.
  __device__ __forceinline__ void finish_piece() const {
    const ItemPartials& item = shared_.partials;
    if (threadIdx.x == 0) {
      // Between two barriers, this orders all partials of the item before the merge, across CTAs.
      // The last count leaves 0 for the next launch.
      const uint32_t last = item.num_holders - 1;
      int32_t* finished = p_.finished + item.first_holder;
      shared_.is_last = last == 0 || ptx::atomic_count_acq_rel(finished, last) == last;
    }
    __syncthreads();
    if (shared_.is_last) {
      const WorkPiece& piece = units().piece;
      for (int i = threadIdx.x; i < piece.num_rows * kAccesses; i += kFewRowsThreads) {
        const int row = i / kAccesses;
        const int column = i % kAccesses * kValuesPerAccess;
        const RowPart merged =
            merge_partials<Traits>(p_.attention.partials, p_.partials, item, row, column);
        write_output(piece, make_logit_row(p_.attention, shared_.geometry, kFewRows, piece, row),
                     column, merged);
      }
    }
    __syncthreads();
  }

  const FewRowsParams& p_;
  Shared& shared_;
  QueryRows<Traits> queries_;  // of the next unit
};

template <class Traits>
__global__ void __launch_bounds__(kFewRowsThreads, Traits::kCtasPerSm)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  ptx::grid_dependency_wait();
  // Workers with little to do make room early. The next kernel waits for all of this one.
  ptx::grid_dependency_launch();
  FewRowsWorker<Traits>(p, shared_memory).run();
}

}  // namespace fi
