// Items whose parts are kept: a kernel writes the state of every part of an item beside each other,
// and whoever reads them merges. That suits the groups of shared_prefix.h, whose states are read by
// many thread blocks anyway: the one that ends an item last need not merge it alone.
#pragma once

#include <fi_backend/plan/whole_items.h>

namespace fi {

constexpr int kMostKeptParts = 16;    // of an item: what its readers can merge in little time
constexpr int kKeptPartTokens = 256;  // keys that are worth a part

// The first so many of `workers` get work, such that no item has more parts than there is room for:
// kept_states over num_rows. 0 = there is none for parts, and items are dealt whole.
FI_HOST_DEVICE int32_t kept_part_workers(const WorkGeometry& g, const ItemsLoad& load,
                                         int64_t num_rows, int32_t workers) {
  if (g.kept_states == 0 || load.num_items == 0) return workers;
  const int64_t room = divide_index(g.kept_states, max64(num_rows, 1)).quot;
  const int64_t most = min64(room, kMostKeptParts);
  if (most < 2) return 0;
  // Shares so large that no more than most - 1 of them begin inside of an item.
  const int64_t smallest = divide_index(load.longest - 1, most - 1).quot + 1;
  const int64_t worth = kKeptPartTokens / kCostTokens * unit_cost(g.tile_rows);
  const int64_t count = divide_index(load.cost, max64(smallest, worth)).quot;
  const int64_t active = max64(1, min64(workers, count));
  // As many for each item, if that leaves few without work: then nobody has parts of two items.
  const int64_t in_full = active - divide_index(active, load.num_items).rem;
  return static_cast<int32_t>(in_full * 8 >= active * 7 ? in_full : active);
}

}  // namespace fi
