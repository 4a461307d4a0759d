// Arguments of the few-row kernel.
#pragma once

#include <fi_backend/attention/few_rows_shape.h>
#include <fi_backend/attention/params.h>
#include <fi_backend/common/div.h>
#include <fi_backend/plan/work_line.h>

namespace fi {

struct FewRowsParams {
  AttentionParams attention;
  const WorkGeometry* geometry;
  const LinePosition* starts;  // [num_workers + 1], of the few-row line
  const ItemCut* cuts;         // [num_workers + 1]
  const RequestSpan* spans;    // [num_workers + 1]
  int32_t* finished;           // [num_workers], 0 between launches
  PartialArea partials;
  FastDivider page_size;
  int32_t num_workers;
  int32_t num_stages;
};

}  // namespace fi
