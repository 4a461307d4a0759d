// Run a function on several threads of the OpenMP runtime that the process already has.
//
// A serving process has loaded an OpenMP runtime through its framework. A second runtime would own
// a second pool of threads that fights the first for the cores, so none is linked here: the entry
// point GOMP_parallel, whose ABI both libgomp and libiomp keep stable, is looked up at first use.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <thread>
#include <vector>

namespace fi::cpu {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned num_threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*team_size)() = nullptr;
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
  found.team_size =
      reinterpret_cast<decltype(found.team_size)>(dlsym(handle, "omp_get_num_threads"));
  if (found.parallel == nullptr || found.thread_num == nullptr || found.team_size == nullptr) {
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

// Call body(worker) once for every worker in [0, num_workers). Workers may run on fewer threads
// than num_workers, so they must not wait for one another. body must not throw.
template <class Body>
void parallel(int num_workers, const Body& body) {
  if (num_workers <= 1) {
    if (num_workers == 1) body(0);
    return;
  }
  struct Task {
    const Body* body;
    int num_workers;
  } task{&body, num_workers};
  const OpenMP& runtime = openmp();
  if (runtime.parallel != nullptr) {
    runtime.parallel(
        [](void* argument) {
          const Task& t = *static_cast<const Task*>(argument);
          const int team_size = openmp().team_size();
          for (int w = openmp().thread_num(); w < t.num_workers; w += team_size) (*t.body)(w);
        },
        &task, static_cast<unsigned>(num_workers), 0);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(num_workers - 1);
  for (int w = 1; w < num_workers; ++w) threads.emplace_back([&body, w] { body(w); });
  body(0);
  for (std::thread& thread : threads) thread.join();
}

// Call body(begin, end) on contiguous shares of [0, count), at least min_share items each.
template <class Body>
void parallel_for(int64_t count, int64_t min_share, int num_threads, const Body& body) {
  if (count <= 0) return;
  const int64_t max_workers = (count + min_share - 1) / min_share;
  const int num_workers = static_cast<int>(max_workers < num_threads ? max_workers : num_threads);
  parallel(num_workers < 1 ? 1 : num_workers, [&](int worker) {
    const int64_t workers = num_workers < 1 ? 1 : num_workers;
    body(count * worker / workers, count * (worker + 1) / workers);
  });
}

}  // namespace fi::cpu
