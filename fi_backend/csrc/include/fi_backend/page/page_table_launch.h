// Entry point of the page table module.
#pragma once

#include <cuda_runtime_api.h>
#include <fi_backend/page/page_table_params.h>

namespace fi {

cudaError_t launch_page_table(const PageTableParams& params, cudaStream_t stream);

}  // namespace fi
