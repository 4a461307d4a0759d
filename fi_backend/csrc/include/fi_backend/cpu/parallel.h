// Run a function on several threads of the OpenMP runtime that the process already has.
//
// A serving process has loaded an OpenMP runtime through its framework. A second runtime would own
// a second pool of threads that fights the first for the cores, so none is linked here: the entry
// point GOMP_parallel, whose ABI both libgomp and libiomp keep stable, is looked up at first use.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace fi::cpu {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned num_threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*max_threads)() = nullptr;
};

namespace detail {

inline int find_openmp(dl_phdr_info* info, size_t, void* result) {
  const char* path = info->dlpi_name;
  if (path == nullptr) return 0;
  const char* slash = std::strrchr(path, '/');
  const char* file = slash == nullptr ? path : slash + 1;
  const bool named_so = std::strncmp(file, "libgomp", 7) == 0 ||
                        std::strncmp(file, "libiomp", 7) == 0 ||
                        std::strncmp(file, "libomp", 6) == 0;
  if (!named_so) return 0;
  void* handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return 0;
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread_num =
      reinterpret_cast<decltype(found.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  found.max_threads =
      reinterpret_cast<decltype(found.max_threads)>(dlsym(handle, "omp_get_max_threads"));
  if (found.parallel == nullptr || found.thread_num == nullptr || found.max_threads == nullptr) {
    dlclose(handle);
    return 0;
  }
  *static_cast<OpenMP*>(result) = found;
  return 1;
}

}  // namespace detail

// The process's OpenMP runtime; null pointers where there is none. A preloaded runtime is found
// first, because the loader lists objects in load order and preloaded ones come before the rest.
inline const OpenMP& openmp() {
  static const OpenMP runtime = [] {
    OpenMP found;
    dl_iterate_phdr(detail::find_openmp, &found);
    return found;
  }();
  return runtime;
}

// Call body(worker, thread) once for every worker in [0, num_workers), in ascending order. A thread
// takes the next worker when it is done with one, so that a slow thread gets fewer of them; workers
// must not wait for one another. No two calls with one `thread`, below num_workers, run at a time.
// body must not throw.
template <class Body>
void parallel(int num_workers, const Body& body) {
  if (num_workers <= 1) {
    if (num_workers == 1) body(0, 0);
    return;
  }
  struct Task {
    const Body* body;
    int num_workers;
    std::atomic<int> next;

    void run(int thread) {
      for (int w; (w = next.fetch_add(1, std::memory_order_relaxed)) < num_workers;) {
        (*body)(w, thread);
      }
    }
  } task{&body, num_workers, {0}};
  const OpenMP& runtime = openmp();
  if (runtime.parallel != nullptr) {
    const int team_size = std::min(num_workers, runtime.max_threads());
    runtime.parallel(
        [](void* argument) { static_cast<Task*>(argument)->run(openmp().thread_num()); }, &task,
        static_cast<unsigned>(team_size), 0);
    return;
  }
  const int num_threads = std::min<int>(num_workers, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back([&task, t] { task.run(t); });
  task.run(0);
  for (std::thread& thread : threads) thread.join();
}

// Call body(begin, end) on contiguous shares of [0, count), at least min_share items each.
template <class Body>
void parallel_for(int64_t count, int64_t min_share, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int64_t max_workers = (count + min_share - 1) / min_share;
  const int num_workers = static_cast<int>(max_workers < num_threads ? max_workers : num_threads);
  parallel(num_workers < 1 ? 1 : num_workers, [&](int worker, int) {
    const int64_t workers = num_workers < 1 ? 1 : num_workers;
    body(count * worker / workers, count * (worker + 1) / workers);
  });
}

}  // namespace fi::cpu
