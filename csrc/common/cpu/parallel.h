// Tasks handed out one by one to ATen's threads: even where cores are unequally fast, none waits long for another.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace rk {

// Calls make_worker() once a thread (for its scratch) and the worker it returns with each task in [0, tasks).
// Which thread runs a task must not matter to the result.
template <class MakeWorker>
void parallel_tasks(int64_t tasks, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      int64_t task = next++;
      if (task >= tasks) return;
      auto worker = make_worker();
      for (; task < tasks; task = next++) worker(task);
    }
  });
}

}  // namespace rk
