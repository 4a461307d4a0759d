// Runs of an attention layer, counted where native code starts them, for the life of the module.
#pragma once

#include <atomic>
#include <cstdint>

namespace fi::bindings {

inline std::atomic<int64_t>& attention_runs() {
  static std::atomic<int64_t> count{0};
  return count;
}
inline void count_attention_run() { attention_runs().fetch_add(1, std::memory_order_relaxed); }
inline int64_t attention_call_count() { return attention_runs().load(); }

}  // namespace fi::bindings
