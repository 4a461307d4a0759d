// The search for shared prefixes on the device: writes what find_shared_prefixes() of
// host_shared_prefix.h writes.
//
// A block for each request compares its pages with those of others; the last one to end forms the
// groups. The launch depends on the number of requests alone.
#pragma once

#include <fi_backend/plan/shared_prefix.h>

#include <fi_backend/common/reduce.cuh>
#include <fi_backend/ptx/atomic.cuh>
#include <fi_backend/ptx/grid_dependency.cuh>

namespace fi {

inline constexpr int kSearchThreads = 256;

// The threads of a block (form_groups).
struct BlockTeam {
  template <class Fn>
  __device__ __forceinline__ void for_each(int32_t count, const Fn& fn) const {
    for (int32_t i = threadIdx.x; i < count; i += blockDim.x) fn(i);
    __syncthreads();
  }
  __device__ __forceinline__ void add_into(int32_t& sum, int32_t x) const { atomicAdd(&sum, x); }
  __device__ __forceinline__ void add_into(int64_t& sum, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(x));
  }
  __device__ __forceinline__ void max_into(int32_t& largest, int32_t x) const {
    atomicMax(&largest, x);
  }
  __device__ __forceinline__ void max_into(uint64_t& largest, uint64_t x) const {
    atomicMax(reinterpret_cast<unsigned long long*>(&largest), static_cast<unsigned long long>(x));
  }
};

// The least x of a block's threads, all of which call this. `least` is in shared memory.
__device__ __forceinline__ int32_t least_of_block(int32_t x, int32_t& least) {
  __syncthreads();  // nobody reads what it was
  if (threadIdx.x == 0) least = x;
  __syncthreads();
  x = __reduce_min_sync(kFullWarp, x);
  if (threadIdx.x % kWarpSize == 0) atomicMin(&least, x);
  __syncthreads();
  return least;
}

// The first page, of those [0, end) that this thread looks at, in which two requests differ.
__device__ __forceinline__ int32_t first_difference(const int32_t* a, const int32_t* b,
                                                    int32_t end) {
  constexpr int kInFlight = 4;  // loads that cover each other's latency
  const int32_t step = blockDim.x;
  for (int32_t first = 0; first < end; first += kInFlight * step) {
    bool differs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int32_t page = min(first + i * step + int32_t(threadIdx.x), end - 1);
      differs[i] = a[page] != b[page];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (differs[i]) return min(first + i * step + int32_t(threadIdx.x), end - 1);
    }
  }
  return end;
}

// All threads of the block call this. `counts` and `least` are in shared memory.
__device__ __forceinline__ PrefixMatch find_match(const SharedPrefixParams& p, int32_t request,
                                                  KeyCounts& counts, int32_t& least) {
  const int32_t mine = request < kMaxSharing ? sharable_pages(p, request) : 0;
  if (mine == 0) return {-1, 0};
  if (threadIdx.x < kKeyDepths) {
    counts.count[threadIdx.x] = 0;
    counts.first[threadIdx.x] = request;
  }
  __syncthreads();
  const int32_t* table = p.pages.pages_of(request);
  for (int32_t r = threadIdx.x; r < num_searched(p.geometry.num_reqs); r += blockDim.x) {
    const int depths = num_like_keys(p, table, mine, r);
    for (int depth = 0; depth < depths; ++depth) {
      atomicAdd(&counts.count[depth], 1);
      atomicMin(&counts.first[depth], r);
    }
  }
  __syncthreads();
  const int32_t leader = choose_leader(p, counts, request);
  if (leader == request) return {request, mine};
  const int32_t end = min(mine, sharable_pages(p, leader));
  const int32_t differs = first_difference(p.pages.pages_of(leader), table, end);
  const int32_t common = least_of_block(differs, least);
  return common < p.min_pages ? PrefixMatch{request, mine} : PrefixMatch{leader, common};
}

// Grid: a block for each request.
__global__ void __launch_bounds__(kSearchThreads)
    shared_prefix_kernel(const __grid_constant__ SharedPrefixParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  __shared__ PrefixGroups groups;
  __shared__ KeyCounts counts;
  __shared__ int32_t least;
  __shared__ bool is_last;
  const int32_t request = blockIdx.x;
  const PrefixMatch match = find_match(p, request, counts, least);
  if (threadIdx.x == 0) {
    p.own_lens[request] = p.kv_lens[request];
    p.first_pages[request] = 0;
    p.first_rows[request] = 0;
    p.matches[request] = match;
    // Whoever counts last sees what all have written.
    is_last = ptx::atomic_count_acq_rel(p.finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) form_groups(BlockTeam(), p, groups);
}

}  // namespace fi
