// The search for shared prefixes on the device: finds what find_match() of host_shared_prefix.h
// finds. Blocks take requests in turn; each block looks at all requests first.
#pragma once

#include <fi_backend/plan/prefix_groups.h>

#include <fi_backend/common/reduce.cuh>

namespace fi {

struct SearchMemory {
  int32_t pages[kMaxSharing];  // that each request may share
  int32_t keys[kMaxSharing];   // its page at the first depth
  KeyCounts counts;
  int32_t least;
};

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

  // Sort in place by a bitonic network; `keys` has room for the next power of two. A warp's threads
  // look at 64 keys that are theirs alone while those that are compared are no further apart.
  __device__ __forceinline__ void sort(uint64_t* keys, int32_t count) const {
    const int32_t size = count < 2 ? 1 : 1 << (kWarpSize - __clz(count - 1));
    for_each(size - count, [&](int32_t i) { keys[count + i] = ~uint64_t{0}; });
    FI_NO_UNROLL
    for (int32_t ordered = 2; ordered <= size; ordered *= 2) {
      FI_NO_UNROLL
      for (int32_t apart = ordered / 2; apart > 0; apart /= 2) {
        for (int32_t i = threadIdx.x; i < size / 2; i += blockDim.x) {
          const int32_t low = 2 * i - (i & (apart - 1));
          const uint64_t a = keys[low], b = keys[low + apart];
          const bool ascends = (low & ordered) == 0;
          if ((a > b) != ascends) continue;
          keys[low] = b;
          keys[low + apart] = a;
        }
        const int32_t next = apart > 1 ? apart / 2 : ordered;
        if (max(apart, next) > kWarpSize) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      }
    }
    __syncthreads();
  }

  // Replace values by the sums of those before each; values[count] gets the sum of all.
  __device__ __forceinline__ void sums_before(uint64_t* values, int32_t count) const {
    if (threadIdx.x < kWarpSize) {
      const int32_t each = (count + kWarpSize - 1) / kWarpSize;
      const int32_t begin = min(int32_t(threadIdx.x) * each, count);
      const int32_t end = min(begin + each, count);
      uint64_t sum = 0;
      for (int32_t i = begin; i < end; ++i) sum += values[i];
      uint64_t through = sum;
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint64_t before = __shfl_up_sync(kFullWarp, through, offset);
        if (threadIdx.x >= offset) through += before;
      }
      uint64_t before = through - sum;
      for (int32_t i = begin; i < end; ++i) {
        const uint64_t value = values[i];
        values[i] = before;
        before += value;
      }
      if (threadIdx.x == kWarpSize - 1) values[count] = before;
    }
    __syncthreads();
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

// All threads of the block call this, as what is below.
__device__ __forceinline__ void load_keys(const SharedPrefixParams& p, SearchMemory& memory) {
  for (int32_t r = threadIdx.x; r < num_searched(p.geometry.num_reqs); r += blockDim.x) {
    const int32_t pages = sharable_pages(p, r);
    memory.pages[r] = pages;
    memory.keys[r] = pages > 0 ? p.pages.pages_of(r)[key_depth(p, 0) - 1] : 0;
  }
  __syncthreads();
}

__device__ __forceinline__ PrefixMatch find_match(const SharedPrefixParams& p, int32_t request,
                                                  SearchMemory& memory) {
  const int32_t mine = memory.pages[request];
  if (mine == 0) return {-1, 0};
  KeyCounts& counts = memory.counts;
  __syncthreads();  // nobody reads what they were
  if (threadIdx.x < kKeyDepths) {
    counts.count[threadIdx.x] = 0;
    counts.first[threadIdx.x] = request;
  }
  __syncthreads();
  const int32_t* table = p.pages.pages_of(request);
  for (int32_t r = threadIdx.x; r < num_searched(p.geometry.num_reqs); r += blockDim.x) {
    if (memory.pages[r] == 0 || memory.keys[r] != memory.keys[request]) continue;
    const int depths = num_like_keys(p, table, mine, r);
    for (int depth = 0; depth < depths; ++depth) {
      atomicAdd(&counts.count[depth], 1);
      atomicMin(&counts.first[depth], r);
    }
  }
  __syncthreads();
  const int32_t leader = choose_leader(p, counts, request);
  if (leader == request) return {request, mine};
  const int32_t end = min(mine, memory.pages[leader]);
  const int32_t differs = first_difference(p.pages.pages_of(leader), table, end);
  const int32_t common = least_of_block(differs, memory.least);
  return common < p.min_pages ? PrefixMatch{request, mine} : PrefixMatch{leader, common};
}

// Search for block `block` of num_blocks. True if one of its requests has something in common with
// another.
__device__ __forceinline__ bool find_matches(const SharedPrefixParams& p, int32_t block,
                                             int32_t num_blocks, SearchMemory& memory) {
  const int32_t num_reqs = p.geometry.num_reqs;
  // What requests are that share nothing.
  for (int32_t r = block * int32_t(blockDim.x) + int32_t(threadIdx.x); r < num_reqs;
       r += num_blocks * int32_t(blockDim.x)) {
    p.own_lens[r] = p.kv_lens[r];
    p.first_pages[r] = 0;
    p.first_rows[r] = 0;
  }
  load_keys(p, memory);
  bool has_match = false;
  for (int32_t request = block; request < num_searched(num_reqs); request += num_blocks) {
    const PrefixMatch match = find_match(p, request, memory);
    if (threadIdx.x == 0) p.matches[request] = match;
    has_match |= match.leader >= 0 && match.leader != request;
  }
  return has_match;
}

}  // namespace fi
