// A loop over the threads that XLA computes with.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls body(i) for every i below `count`, in any order, on any thread; returns when all have returned.
//
// The caller works too, and waits for items rather than for workers: a pool whose threads are all busy, or
// one that runs a worker long after the loop has ended, is as good as any.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  auto progress = std::make_shared<Progress>();
  // Body is gone when the loop has ended, and is not touched then. Out of memory is the end, not an unwinding
  // under the other threads' feet.
  auto work = [progress, count, &body]() noexcept {
    for (int64_t i; (i = progress->next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace jaxserve
