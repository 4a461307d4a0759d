// Binding of what only a module that traces the kernel for both lines has.
#pragma once

#include <bindings/cuda/mixed.h>
#include <fi_backend/attention/mixed_rows_trace_launch.h>

namespace fi::bindings {

// Copy what the last launch on this device recorded, and forget it. This waits for the device.
// traces int64 [num_blocks, 5], on the CPU; see BlockTrace.
inline void take_block_traces(TensorView traces) {
  check_tensor("traces", traces, kDtypeOf<int64_t>, {kAnySize, 5}, kCpu);
  const auto num_blocks = static_cast<int>(traces.size(0));
  check_launch("mixed",
               fi::take_block_traces(static_cast<BlockTrace*>(traces.data_ptr()), num_blocks));
}

}  // namespace fi::bindings
