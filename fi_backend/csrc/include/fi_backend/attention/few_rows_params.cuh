// Arguments of the few-row kernel.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>
#include <fi_backend/attention/params.h>
#include <fi_backend/common/div.h>
#include <fi_backend/plan/work_line.h>

namespace fi {

// Strides of a cache in chunks of 16 bytes, which rows begin at multiples of: from factors of 32
// bits, enough for pages of 64 GB, an address takes fewer instructions than from 64.
struct ChunkStrides {
  uint32_t page;
  uint32_t token;
  uint32_t head;
};

struct FewRowsParams {
  AttentionParams attention;
  const WorkGeometry* geometry;
  const LinePosition* starts;  // [num_workers + 1], of the few-row line
  const ItemCut* cuts;         // [num_workers + 1]
  const RequestSpan* spans;    // [num_workers + 1]
  int32_t* finished;           // [num_workers], 0 between launches
  PartialArea partials;
  ChunkStrides k_strides;
  ChunkStrides v_strides;
  FastDivider page_size;
  int32_t num_workers;
  int32_t ring_slots[2];  // stages of the ring of K and of that of V
};

}  // namespace fi
