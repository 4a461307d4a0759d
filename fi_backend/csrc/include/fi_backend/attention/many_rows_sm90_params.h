// Arguments of the many-row kernel for sm_90a.
#pragma once

#include <fi_backend/attention/params.h>
#include <fi_backend/common/tensor_map.h>

namespace fi {

struct ManyRowsSm90Params {
  AttentionParams attention;
  // Of the caches, where box_tokens > 0: [page, head, token in page, dim], the last one innermost;
  // of ragged K and V [1, head, token, dim].
  TensorMap k_map;
  TensorMap v_map;
  int32_t box_tokens;  // rows of a box; 0 = rows are copied one by one
};

}  // namespace fi
