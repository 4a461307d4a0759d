// Arguments of the many-row kernel for sm_90a.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/common/div.h>
#include <fi_backend/common/tensor_map.h>

namespace fi {

// How the copy engine sees K or V. Where a box has all columns of its tokens (Sm90Tile), the map is
//   paged:  [page, token / 8, head and part of 64 columns, token % 8, column], or
//   ragged: [1, 1, head and part, token, column];
// else, with boxes of a part, [page, head, 1, token, column].
struct Sm90Cache {
  TensorMap map;
  int32_t box_tokens;  // 0 = rows are copied one by one, of K and V
  int32_t head_parts;  // from a head to the next, where a box has all columns
};

struct ManyRowsSm90Params {
  AttentionParams attention;
  Sm90Cache k;
  Sm90Cache v;
  FastDivider group_size;
  FastDivider page_size;
  int32_t num_reqs;     // as planned
  int32_t num_workers;  // as planned

  FI_HOST_DEVICE bool has_maps() const { return k.box_tokens > 0; }
};

}  // namespace fi
