// From global to shared memory: query rows, tiles of K and V, and where their tokens lie.
#pragma once

#include <fi_backend/attention/seen_blocks.h>

#include <fi_backend/attention/logits.cuh>
#include <fi_backend/attention/many_rows_shape.cuh>
#include <fi_backend/ptx/convert.cuh>
#include <fi_backend/ptx/cp_async.cuh>
#include <fi_backend/ptx/ldmatrix.cuh>

namespace fi {

// The query token, within the request, of the packed row `row` of an item's tile.
__device__ __forceinline__ int32_t tile_token(const ManyRowsItem& item, int row) {
  return item.first_token + static_cast<int32_t>(item.group_size(item.first_head + row));
}

// The row of q that a query token of a piece's request is.
__device__ __forceinline__ int64_t query_row(const AttentionParams& p, const WorkPiece& piece,
                                             int32_t qo_idx) {
  const int32_t row = piece.qo_begin + qo_idx;
  return p.q_rows == nullptr ? row : p.q_rows[row];
}

// The packed row `row` of an item's tile.
__device__ __forceinline__ LogitRow tile_row(const AttentionParams& p, const WorkGeometry& g,
                                             const ManyRowsItem& item, int row) {
  const WorkPiece& piece = item.piece;
  const int packed = item.first_head + row;
  const auto token = static_cast<int32_t>(item.group_size(packed));
  const int32_t qo_idx = item.first_token + token;
  const int head = packed - token * g.group_size;
  const KvRange seen = visible_tokens(g, piece.qo_len, piece.kv_len, qo_idx);
  const float k_scale = p.k_scale != nullptr ? p.k_scale[piece.kv_head] : p.k_scale_value;
  LogitRow r;
  r.qo_idx = qo_idx;
  r.head = piece.kv_head * g.group_size + head;
  r.scale = p.sm_scale * k_scale * (p.soft_cap != 0.f ? 1.f / p.soft_cap : kLog2e);
  r.slope = p.alibi_slopes != nullptr ? p.alibi_slopes[r.head] * kLog2e : 0.f;
  r.begin = seen.begin;
  r.end = seen.end;
  r.position = piece.kv_len - piece.qo_len + qo_idx;
  return r;
}

// Rows [first, last] of an item's tile, as a mask is asked for them.
__device__ __forceinline__ SeeingRows tile_rows(const WorkGeometry& g, const ManyRowsItem& item,
                                                int first, int last) {
  const int first_token = tile_token(item, first), last_token = tile_token(item, last);
  // The head of a row of query token 0, were it the tile's first one.
  const int head =
      item.piece.kv_head * g.group_size + item.first_head + item.first_token * g.group_size;
  return seeing_rows(first_token, head + first - first_token * g.group_size, last_token,
                     head + last - last_token * g.group_size, item.piece.kv_head, g.group_size);
}

// Fill in what follows from an item's piece and its group_size.
template <class Variant>
__device__ __forceinline__ void describe_item(const AttentionParams& p, const WorkGeometry& g,
                                              ManyRowsItem& item) {
  // More rows than 32 bits count would not fit any memory.
  const uint32_t first_row = uint32_t(item.piece.q_tile) * g.tile_rows;
  item.first_token = static_cast<int32_t>(item.group_size(first_row));
  item.first_head = static_cast<int32_t>(first_row) - item.first_token * g.group_size;
  item.scale = tile_row(p, g, item, 0).scale;
  if (p.soft_cap == 0.f) item.scale *= logit_unit<Variant>() / kLog2e;
  // A positive factor can wait until after the maximum is taken.
  item.is_scale_only = kScalesLate<Variant> && item.scale > 0.f && is_scale_only(p);
}

// The tokens of an item's piece that rows [first_row, first_row + num_rows) of its tile see.
__device__ __forceinline__ RowsRange rows_range(const AttentionParams& p, const WorkGeometry& g,
                                                const ManyRowsItem& item, int first_row,
                                                int num_rows) {
  const WorkPiece& piece = item.piece;
  if (first_row >= piece.num_rows) return {{0, 0}, {0, 0}};
  const int last_row = min(first_row + num_rows, piece.num_rows) - 1;
  const auto seen_by = [&](int row) {
    return visible_tokens(g, piece.qo_len, piece.kv_len, tile_token(item, row));
  };
  const KvRange first = seen_by(first_row);
  const KvRange last = seen_by(last_row);
  const int all_end = p.custom_mask != nullptr ? 0 : min(first.end, piece.tokens.end);
  return {{max(first.begin, piece.tokens.begin), min(last.end, piece.tokens.end)},
          {max(last.begin, piece.tokens.begin), all_end}};
}

// Start copying this warp's query rows; those that do not exist become zeros. first_row: of the
// warp, in the tile.
template <class Traits>
__device__ __forceinline__ void copy_queries(const AttentionParams& p, const WorkGeometry& g,
                                             const ManyRowsItem& item, int first_row, uint8_t* to) {
  using T = typename Traits::Q;
  using Rows = typename Traits::QRows;
  const uint32_t rows = ptx::shared_address(to);
  const int lane = fresh_thread() % 32;
#pragma unroll 4
  for (int n = lane; n < Traits::kWarpRows * Rows::kChunks; n += 32) {
    const int i = n / Rows::kChunks, chunk = n % Rows::kChunks;
    const bool exists = first_row + i < item.piece.num_rows;
    const LogitRow row = tile_row(p, g, item, exists ? first_row + i : 0);
    const T* from = static_cast<const T*>(p.q) +
                    query_row(p, item.piece, row.qo_idx) * p.q_row_stride +
                    row.head * p.q_head_stride + chunk * (kChunkBytes / int(sizeof(T)));
    ptx::cp_async_16(rows + Rows::offset(i, chunk), from, exists);
  }
}

// Start reading the id of the page that holds a token of a request, if it is one of the piece's.
__device__ __forceinline__ void copy_page_id(const PageTable& table, int32_t request, int32_t token,
                                             const KvRange& tokens, int32_t* to) {
  if (token < tokens.begin || token >= tokens.end) return;
  const int32_t page = static_cast<uint32_t>(token) / static_cast<uint32_t>(table.page_size);
  const int32_t* pages = table.pages_of(request);
  if (pages != nullptr) {
    ptx::cp_async_4(ptx::shared_address(to), pages + page);
  } else {
    *to = table.indptr[request] + page;
  }
}

__device__ __forceinline__ RowOffsets row_offsets(const AttentionParams& p, int32_t page,
                                                  int32_t token, const KvRange& tokens) {
  if (token < tokens.begin || token >= tokens.end) return {-1, -1};
  const int32_t in_page = static_cast<uint32_t>(token) % static_cast<uint32_t>(p.pages.page_size);
  return {page * p.k_strides.page + in_page * p.k_strides.token,
          page * p.v_strides.page + in_page * p.v_strides.token};
}

// Start copying a tile of K (kIsKey) or V; tokens of no piece become zeros, so that nothing
// unread, which may be NaN, is multiplied by a weight of 0.
template <class Traits, bool kIsKey>
__device__ __forceinline__ void copy_tile(const void* head_rows, const RowOffsets* offsets,
                                          uint8_t* to) {
  using Kv = typename Traits::Kv;
  constexpr int kDim = kIsKey ? Traits::kQk : Traits::kVo;
  using Rows = SwizzledRows<kDim* int(sizeof(Kv))>;
  const uint32_t tile = ptx::shared_address(to);
  const int thread = fresh_thread() % Traits::kGroupThreads;
#pragma unroll
  for (int n = 0; n < Traits::kTokens * Rows::kChunks; n += Traits::kGroupThreads) {
    const int i = n + thread;
    if (n + Traits::kGroupThreads > Traits::kTokens * Rows::kChunks &&
        i >= Traits::kTokens * Rows::kChunks) {
      break;
    }
    const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
    const int64_t offset = kIsKey ? offsets[row].k : offsets[row].v;
    const Kv* from =
        static_cast<const Kv*>(head_rows) + offset + chunk * (kChunkBytes / sizeof(Kv));
    // fp8 is widened by the thread that copied it, and needs no swizzle.
    const uint32_t place = Traits::kIsFp8Cache ? i * kChunkBytes : Rows::offset(row, chunk);
    ptx::cp_async_16(tile + place, from, offset >= 0);
  }
}

// Four fp8 values in q's type: exact, since both 16-bit types hold every fp8 value.
template <class T, class Kv>
__device__ __forceinline__ void widen_word(uint32_t word, uint32_t& low, uint32_t& high) {
  ptx::widen_fp8x4<Kv>(word, low, high);
  if constexpr (kIsSame<T, __nv_bfloat16>) {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&low));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&high));
    low = ptx::pack_pair<T>(a.x, a.y);
    high = ptx::pack_pair<T>(b.x, b.y);
  }
}

// Widen what this thread copied of a tile of K or V: no other thread's copies are touched.
template <class Traits, bool kIsKey>
__device__ __forceinline__ void widen_tile(const uint8_t* from, uint8_t* to) {
  using T = typename Traits::Q;
  using Kv = typename Traits::Kv;
  constexpr int kDim = kIsKey ? Traits::kQk : Traits::kVo;
  using Rows = SwizzledRows<kDim* int(sizeof(T))>;
  constexpr int kChunks = kDim / kChunkBytes;  // of fp8
#pragma unroll 1
  for (int i = fresh_thread() % Traits::kGroupThreads; i < Traits::kTokens * kChunks;
       i += Traits::kGroupThreads) {
    const uint4 chunk = reinterpret_cast<const uint4*>(from)[i];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    uint32_t wide[8];
#pragma unroll
    for (int w = 0; w < 4; ++w) widen_word<T, Kv>(words[w], wide[2 * w], wide[2 * w + 1]);
    const int row = i / kChunks, first = i % kChunks * 2;
    *reinterpret_cast<uint4*>(to + Rows::offset(row, first)) =
        make_uint4(wide[0], wide[1], wide[2], wide[3]);
    *reinterpret_cast<uint4*>(to + Rows::offset(row, first + 1)) =
        make_uint4(wide[4], wide[5], wide[6], wide[7]);
  }
}

}  // namespace fi
