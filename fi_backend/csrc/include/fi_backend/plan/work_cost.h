// What work items cost: integers, so that host and device agree bit for bit, and closed forms, so
// that a request of a million rows costs the planner no more than one of ten.
#pragma once

#include <fi_backend/plan/geometry.h>

namespace fi {

constexpr int kCostTokens = 16;  // kv tokens per unit of cost
constexpr int kCostRows = 16;    // packed query rows per unit of cost

// Cost of one unit of kv tokens of an item: memory traffic counts as one more unit of rows.
FI_HOST_DEVICE int32_t unit_cost(int32_t num_rows) {
  return (num_rows + kCostRows - 1) / kCostRows + 1;
}

// The same of a query tile. On sm_90a all warpgroups compute a tile, whether they have rows of it
// or not; warps of the portable kernel that have none idle, while the others take as long as
// before.
FI_HOST_DEVICE int32_t tile_unit_cost(const WorkGeometry& g, int line, int32_t num_rows) {
  const bool is_in_full = line == kManyRows && g.teams_per_sm > 0;
  return unit_cost(is_in_full ? g.tile_rows : num_rows);
}

// Cost of a single item: a few-row request's, or the last and shorter tile of a many-row request.
FI_HOST_DEVICE int64_t item_cost(const WorkGeometry& g, int line, int32_t qo_len, int32_t kv_len,
                                 int32_t q_tile) {
  const KvRange tokens = item_tokens(g, line, qo_len, kv_len, q_tile);
  const int32_t rows = num_tile_rows(g, line, qo_len, q_tile);
  // Causal kernels skip what a tile's early rows do not see: half of the triangle at its end.
  const int32_t num_tokens = tokens.end - tokens.begin;
  const int32_t height = line == kFewRows ? qo_len : rows / g.group_size;
  const int32_t triangle = !g.causal ? 0 : (height < num_tokens ? height : num_tokens) / 2;
  const uint32_t units = (uint32_t(num_tokens - triangle) + kCostTokens - 1) / kCostTokens;
  return g.item_overhead + int64_t{units} * tile_unit_cost(g, line, rows);
}

// One end of the key range of a request's full tiles, which moves by the same number of keys from
// tile to tile but stops at 0. Counted in keys times group size, where that number is whole:
// tile_rows.
struct TileEdge {
  int64_t first;       // edge of the first tile that has one above 0
  int32_t num_hidden;  // tiles before that one
  int32_t step;

  // Sum of the edges of the first n tiles.
  FI_HOST_DEVICE int64_t sum(int32_t n) const {
    const int64_t seen = n > num_hidden ? n - num_hidden : 0;
    return seen * first + step * (seen * (seen - 1) / 2);
  }
};

FI_HOST_DEVICE TileEdge make_tile_edge(int64_t first, int32_t step) {
  const int64_t num_hidden = first >= 0 ? 0 : ceil_div64(-first, step);
  return {first + num_hidden * step, static_cast<int32_t>(min64(num_hidden, 0x7fffffff)), step};
}

// Costs of the query tiles of one head of a request. Sums fit 64 bits for requests of up to 2^27
// rows and 2^27 keys at 64 heads a group, and accordingly.
struct HeadCost {
  TileEdge key_end;
  TileEdge key_begin;
  int64_t last;  // cost of the tile after the full ones
  int32_t item_overhead;
  int32_t full_unit_cost;
  int32_t full_unit_keys;  // kv tokens of a unit, times group size
  int32_t num_full;        // tiles of tile_rows rows
  int32_t num_tiles;

  // Cost of the first n tiles. Grows with every tile.
  FI_HOST_DEVICE int64_t before(int32_t n) const {
    const int32_t full = n < num_full ? n : num_full;
    const int64_t units = divide_index(full_cost(full), full_unit_keys).quot;
    return int64_t{item_overhead} * full + units + (n > num_full ? last : 0);
  }
  // before(n) <= cost for n <= num_full, without the division: a search asks this often.
  FI_HOST_DEVICE bool is_before_at_most(int32_t n, int64_t cost) const {
    return full_cost(n) < (cost - int64_t{item_overhead} * n + 1) * full_unit_keys;
  }
  FI_HOST_DEVICE int64_t all() const { return before(num_tiles); }

  // Cost of the most expensive tile. Masks let the keys of a tile grow or shrink from tile to tile,
  // never both.
  FI_HOST_DEVICE int64_t longest() const {
    if (num_full == 0) return last;
    const int64_t last_full = before(num_full) - before(num_full - 1);
    return max64(max64(before(1), last_full), last);
  }

  // Cost of the keys of the first n full tiles, times full_unit_keys.
  FI_HOST_DEVICE int64_t full_cost(int32_t n) const {
    return (key_end.sum(n) - key_begin.sum(n)) * full_unit_cost;
  }
};

// Of a request in the many-row line; nothing costs nothing of another.
FI_HOST_DEVICE HeadCost make_head_cost(const WorkGeometry& g, const RequestLens& lens) {
  HeadCost cost = {};
  cost.item_overhead = g.item_overhead;
  cost.full_unit_keys = 1;
  if (lens.qo_len <= 0 || line_of(g, lens.qo_len) != kManyRows) return cost;
  const int64_t rows = int64_t{lens.qo_len} * g.group_size;
  const int64_t diagonal = (int64_t{lens.kv_len} - lens.qo_len) * g.group_size;  // of the first row
  const QuotRem tiles = divide_index(rows, g.tile_rows);
  cost.num_full = static_cast<int32_t>(tiles.quot);
  cost.num_tiles = cost.num_full + (tiles.rem > 0);
  cost.full_unit_cost = unit_cost(g.tile_rows);
  cost.full_unit_keys = kCostTokens * g.group_size;
  // Causal kernels skip half of the triangle at a tile's end: the middle row counts.
  cost.key_end = g.causal ? make_tile_edge(diagonal + g.tile_rows / 2, g.tile_rows)
                          : TileEdge{int64_t{lens.kv_len} * g.group_size, 0, 0};
  if (g.window_left >= 0) {
    cost.key_begin = make_tile_edge(diagonal - int64_t{g.window_left} * g.group_size, g.tile_rows);
  }
  if (cost.num_full < cost.num_tiles) {
    cost.last = item_cost(g, kManyRows, lens.qo_len, lens.kv_len, cost.num_full);
  }
  return cost;
}

FI_HOST_DEVICE int64_t request_cost(const WorkGeometry& g, int line, const RequestLens& lens) {
  if (line == kFewRows) {
    const bool is_in_line = num_q_tiles(g, line, lens.qo_len) > 0;
    return is_in_line ? item_cost(g, line, lens.qo_len, lens.kv_len, 0) * g.num_kv_heads : 0;
  }
  return make_head_cost(g, lens).all() * g.num_kv_heads;
}

}  // namespace fi
