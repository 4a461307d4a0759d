// The planner on the device: writes the bytes that plan_work() of host_plan.h writes.
//
// The launch depends on capacities alone and the lengths are read on the device, so that a captured
// plan can be replayed with other lengths. A block, or a part of one, plans one line: a prefix sum
// over the costs of its requests, then each thread finds where workers begin.
#pragma once

#include <fi_backend/plan/device_plan_params.h>
#include <fi_backend/plan/kept_parts.h>
#include <fi_backend/plan/shared_sms.h>
#include <fi_backend/plan/whole_items.h>

#include <fi_backend/plan/device_cuts.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kPlanMaxThreads = 512;

struct PlanMemory {
  int64_t warp_cost[kWarpSize];      // cost of the requests of each warp
  int64_t warp_other[kWarpSize];     // that in the other line
  int64_t warp_chunks[kWarpSize];    // of their items, if those are cut at chunks of a fixed size
  int32_t warp_items[kWarpSize];     // those of them that are in the line
  uint32_t warp_largest[kWarpSize];  // cost of one of them
  int64_t warp_tiles[kWarpSize];     // their query tiles,
  int64_t warp_longest[kWarpSize];   // and the cost of one of these
  // prefix_cost of every sample_stride-th request: most of a search stays in shared memory.
  static constexpr int kMaxSamples = 1024;
  int64_t samples[kMaxSamples + 1];
  CutMemory cuts;
};

// x >= 0, in three parts whose sums fit 32 bits.
__device__ __forceinline__ int64_t sum_over_warp(int64_t x) {
  constexpr int kBits = 26;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const uint32_t low = __reduce_add_sync(kFullWarp, uint32_t(x) & kMask);
  const uint32_t middle = __reduce_add_sync(kFullWarp, uint32_t(x >> kBits) & kMask);
  const uint32_t high = __reduce_add_sync(kFullWarp, uint32_t(x >> 2 * kBits));
  return int64_t{low} + (int64_t{middle} << kBits) + (int64_t{high} << 2 * kBits);
}

// The sum of x over this lane and those before it.
__device__ __forceinline__ int64_t scan_over_warp(int64_t x, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t before = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

__device__ __forceinline__ int64_t max_over_warp(int64_t x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = max64(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

// Count the query tiles of the requests before each one. All threads call this.
template <class Team>
__device__ __forceinline__ void count_tiles(const Team& team, const PlannedBatch& p,
                                            PlanMemory& memory, int64_t* tiles_before) {
  const WorkGeometry& g = p.geometry;
  const int lane = team.thread() % kWarpSize;
  const int warp = team.thread() / kWarpSize;
  const int num_warps = team.num_threads() / kWarpSize;
  int64_t before = 0;
  FI_NO_UNROLL
  for (int32_t first = 0; first < g.num_reqs; first += team.num_threads()) {
    const int32_t r = first + int32_t(team.thread());
    const int32_t qo_len = request_span(p.qo_indptr, p.kv_lens, g.num_reqs, r).qo_len;
    const int64_t through = scan_over_warp(num_q_tiles(g, kManyRows, qo_len), lane);
    if (lane == kWarpSize - 1) memory.warp_tiles[warp] = through;
    team.sync();
    const int64_t of_lane = lane < num_warps ? memory.warp_tiles[lane] : 0;
    const int64_t of_warps = sum_over_warp(lane < warp ? of_lane : 0);
    if (r < g.num_reqs) tiles_before[r + 1] = before + of_warps + through;
    before += sum_over_warp(of_lane);
    team.sync();
  }
}

// All threads of the team call this.
template <int kLine, class Team>
__device__ __forceinline__ void plan_line(const Team& team, const PlannedBatch& p,
                                          PlanMemory& memory) {
  const WorkGeometry& g = p.geometry;
  const PlanView plan = view_plan(p.plan, g.num_reqs, g.num_workers);
  int64_t* prefix = plan.prefix_cost[kLine];
  const int lane = team.thread() % kWarpSize;
  const int warp = team.thread() / kWarpSize;
  const int num_warps = team.num_threads() / kWarpSize;

  // Scan the costs of each warp's requests, a whole number of rounds of 32 neighbours. The lengths
  // of a round are loaded while the round before is computed.
  const int32_t num_rounds = (g.num_reqs + team.num_threads() - 1) / team.num_threads();
  const int32_t begin = min(warp * num_rounds * kWarpSize, g.num_reqs);
  const int32_t end = min(begin + num_rounds * kWarpSize, g.num_reqs);
  const auto load_span = [&](int32_t r) { return request_span(p.qo_indptr, p.kv_lens, end, r); };
  int64_t through = 0;  // cost of the warp's requests up to this lane's
  int64_t of_warp = 0;
  int64_t other = 0;  // of this lane, as what follows
  int32_t items = 0;  // one for all heads
  uint32_t largest = 0;
  int64_t chunks = 0;
  ItemsLoad whole = {0, 0, 0, 0};
  const int32_t num_rows = p.qo_indptr[g.num_reqs];
  RequestSpan span = load_span(begin + lane);
  FI_NO_UNROLL
  for (int32_t first = begin; first < end; first += kWarpSize) {
    const RequestSpan upcoming = load_span(first + kWarpSize + lane);
    const RequestLens lens = {span.qo_len, span.kv_len};
    int64_t cost = 0;
    if constexpr (kLine == kManyRows) {
      const HeadCost head = make_head_cost(g, lens);
      cost = head.all() * g.num_kv_heads;
      whole.num_items += head.num_tiles;
      whole.longest = max64(whole.longest, head.longest());
    } else {
      cost = request_cost(g, kLine, lens);
      chunks += num_fixed_chunks(g, lens);
    }
    through = of_warp + scan_over_warp(cost, lane);
    of_warp = __shfl_sync(kFullWarp, through, kWarpSize - 1);
    largest = max(largest, clamp_cost(cost));
    items += num_q_tiles(g, kLine, span.qo_len) > 0;
    other += other_line_cost(g, kLine, lens);
    // The last round's stay in registers.
    if (first + kWarpSize < end) prefix[first + lane + 1] = through;
    span = upcoming;
  }
  items = __reduce_add_sync(kFullWarp, items);
  largest = __reduce_max_sync(kFullWarp, largest);
  if (g.shares_sms) other = sum_over_warp(other);
  if (g.split > 0) chunks = sum_over_warp(chunks);
  if (lane == 0) {
    memory.warp_cost[warp] = of_warp;
    memory.warp_other[warp] = other;
    memory.warp_chunks[warp] = chunks;
    memory.warp_items[warp] = items;
    memory.warp_largest[warp] = largest;
  }
  if constexpr (kLine == kManyRows) {
    whole.num_items = sum_over_warp(whole.num_items);
    whole.longest = max_over_warp(whole.longest);
    if (lane == 0) {
      memory.warp_tiles[warp] = whole.num_items;
      memory.warp_longest[warp] = whole.longest;
    }
  }
  team.sync();
  const int64_t of_lane = lane < num_warps ? memory.warp_cost[lane] : 0;
  int64_t total = sum_over_warp(of_lane);
  const int64_t before = sum_over_warp(lane < warp ? of_lane : 0);
  items = __reduce_add_sync(kFullWarp, lane < num_warps ? memory.warp_items[lane] : 0);
  largest = __reduce_max_sync(kFullWarp, lane < num_warps ? memory.warp_largest[lane] : 0u);
  if (g.shares_sms) other = sum_over_warp(lane < num_warps ? memory.warp_other[lane] : 0);
  if (g.split > 0) chunks = sum_over_warp(lane < num_warps ? memory.warp_chunks[lane] : 0);
  const LineLoad load = {items, total, chunks, largest, num_rows, other};
  const int32_t sharing = num_sharing_blocks(g, kLine, load);
  int32_t active = active_workers(g, kLine, load, sharing);
  int32_t has_work = total > 0 ? kCutLine : kNoWork;
  if constexpr (kLine == kManyRows) {
    whole.cost = total;
    whole.num_items = sum_over_warp(lane < num_warps ? memory.warp_tiles[lane] : 0);
    whole.num_items *= g.num_kv_heads;
    whole.longest = max_over_warp(lane < num_warps ? memory.warp_longest[lane] : 0);
    whole.num_heads = int64_t{items} * g.num_kv_heads;
    active = kept_part_workers(g, whole, num_rows, active);
    if (deals_whole_items(g, whole, active)) has_work = kWholeItems;
  }

  // Add what other warps have before.
  const int32_t sample_stride =
      g.num_reqs <= PlanMemory::kMaxSamples ? 1 : g.num_reqs / PlanMemory::kMaxSamples + 1;
  FI_NO_UNROLL
  for (int32_t first = begin; first < end; first += kWarpSize) {
    const int32_t next = first + lane + 1;
    if (next > end) break;
    const int64_t cost = before + (first + kWarpSize < end ? prefix[next] : through);
    prefix[next] = cost;
    if (sample_stride == 1) {
      memory.samples[next] = cost;
    } else if (next % sample_stride == 0) {
      memory.samples[next / sample_stride] = cost;
    }
  }
  if (team.thread() == 0) {
    prefix[0] = 0;
    memory.samples[0] = 0;
    plan.has_work[kLine] = has_work;
    if constexpr (kLine == kFewRows) {
      *plan.geometry = g;
      *plan.few_row_blocks = few_row_blocks(g, load, sharing);
      *plan.num_parts = 1;
    }
  }
  team.sync();
  if (has_work == kWholeItems) count_tiles(team, p, memory, prefix);

  // Find where workers begin.
  const bool keeps_starts = g.num_workers < CutMemory::kMaxStarts;
  const int32_t num_samples =
      sample_stride == 1 ? g.num_reqs : (g.num_reqs + sample_stride - 1) / sample_stride;
  FI_NO_UNROLL
  for (int32_t w = team.thread(); w <= g.num_workers; w += team.num_threads()) {
    plan.finished[kLine][w] = 0;
    const auto keep = [&](const LinePosition& start) {
      if (keeps_starts) memory.cuts.starts[w] = start;
    };
    const auto find_span = [&](int32_t request) {
      return request_span(p.qo_indptr, p.kv_lens, g.num_reqs, request, p.first_pages);
    };
    if (has_work == kWholeItems) {
      keep(plan_whole_item(g, prefix, find_span, w, plan));
      continue;
    }
    const int64_t at = w < active ? worker_cost(total, active, w) : total;
    if (at >= total) {
      keep(plan_end(g, kLine, w, plan));
      continue;
    }
    const int32_t sample = last_at_most(memory.samples, 0, num_samples, at) * sample_stride;
    const int32_t r = last_at_most(prefix, sample, min(sample + sample_stride, g.num_reqs), at);
    const int64_t cost_before = sample_stride == 1 ? memory.samples[r] : prefix[r];
    keep(plan_start(g, kLine, r, find_span(r), find_span(r + 1), at - cost_before, w, plan));
  }
  team.sync();
  write_cuts(team, keeps_starts ? memory.cuts.starts : plan.starts[kLine], g.num_workers,
             memory.cuts, plan.cuts[kLine]);
}

// Grid: kNumLines blocks of whole warps, up to kPlanMaxThreads.
__global__ void __launch_bounds__(kPlanMaxThreads, 1)
    device_plan_kernel(const __grid_constant__ DevicePlanParams p) {
  ptx::grid_dependency_wait();
  // What runs the plan may be set up while the plan is made; it waits for it before it reads it.
  ptx::grid_dependency_launch();
  __shared__ PlanMemory memory;
  if (blockIdx.x == kFewRows) {
    plan_line<kFewRows>(WholeBlock(), p.batch, memory);
  } else {
    plan_line<kManyRows>(WholeBlock(), p.batch, memory);
  }
}

}  // namespace fi
