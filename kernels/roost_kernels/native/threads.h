// A fixed team of threads that runs one function together, with barriers inside.
//
// Why not OpenMP: its threads go on spinning between two steps, on cores that the event loop
// needs, and torch may bring a second OpenMP into the process.
//
// Work is shared out item by item (`share`): each thread has a range of its own, of neighbouring
// items, and helps the others when it is through. So a thread that the system has taken off its
// core holds up the others by one item at most. Results do not depend on who computes what, so
// where the system grants fewer threads than asked for, the team is smaller.
//
// A run can be interrupted: items that nobody has begun are left out, to the end of the run. Who
// sees the flag brings it to the others with the next barrier, so that nothing is computed from
// what was left out.
#pragma once

#include <sched.h>

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.h"

namespace roost {

ROOST_INLINE void relax() {
#if defined(ROOST_AVX512) || defined(ROOST_AVX2)
  _mm_pause();
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

class Team {
 public:
  explicit Team(int num_threads) {
    helpers_.reserve(num_threads - 1);  // so that only a refused thread can throw below
    try {
      for (; num_threads_ < num_threads; num_threads_++)
        helpers_.emplace_back([this, index = num_threads_] { help(index); });
    } catch (const std::system_error&) {
    }
  }

  ~Team() {
    stopping_ = true;
    start_.fetch_add(1);
    start_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }

  // Call body(thread index) on every thread; returns when all have, true unless interrupted. One
  // caller at a time.
  template <class Body>
  bool run(int num_shares, Body&& body) {
    is_interrupted_.store(false, std::memory_order_relaxed);
    const int num_cursors = num_shares * num_threads_;
    if (num_cursors > num_cursors_) {
      num_cursors_ = num_cursors;
      cursors_ = std::make_unique<Cursor[]>(num_cursors);
    }
    for (int i = 0; i < num_cursors; i++) cursors_[i].taken.store(0, std::memory_order_relaxed);
    context_ = &body;
    call_ = [](void* context, int index) { (*static_cast<std::decay_t<Body>*>(context))(index); };
    start_.fetch_add(1, std::memory_order_release);
    start_.notify_all();
    call_(context_, 0);
    barrier();
    return !is_interrupted_.load(std::memory_order_relaxed);
  }

  // Leave out the rest of the run under way, if there is one. From any thread.
  void interrupt() { is_interrupted_.store(true, std::memory_order_relaxed); }

  // Every thread of the team must come here before any goes on.
  void barrier() {
    if (num_threads_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
      if (spins < kSpinsBeforeYield) relax();
      else sched_yield();
    }
  }

  // Inside `run`: body(item) for items 0 .. num_items - 1, each on some thread, then a barrier.
  // `share_index` counts the calls in one run, the same on every thread, below `num_shares`.
  template <class Body>
  ROOST_INLINE void share(int share_index, int thread, int num_items, Body&& body) {
    for (int i = 0; i < num_threads_; i++) {
      const int owner = (thread + i) % num_threads_;
      const int first = static_cast<int64_t>(num_items) * owner / num_threads_;
      const int end = static_cast<int64_t>(num_items) * (owner + 1) / num_threads_;
      std::atomic<int>& taken = cursors_[share_index * num_threads_ + owner].taken;
      for (int item; (item = first + taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (is_interrupted_.load(std::memory_order_relaxed)) break;
        body(item);
      }
    }
    barrier();
  }

 private:
  struct alignas(64) Cursor {
    std::atomic<int> taken{0};
  };
  static constexpr int kSpinsBeforeYield = 4000;  // about 100 us
  static constexpr int kSpinsBeforeSleep = 500;

  void help(int index) {
    unsigned seen = 0;
    for (;;) {
      for (int spins = 0; spins < kSpinsBeforeSleep; spins++) {
        if (start_.load(std::memory_order_acquire) != seen) break;
        relax();
      }
      start_.wait(seen, std::memory_order_acquire);
      seen++;
      if (stopping_) return;
      call_(context_, index);
      barrier();
    }
  }

  int num_threads_ = 1;  // read by the helpers inside `run` only
  std::vector<std::thread> helpers_;
  std::unique_ptr<Cursor[]> cursors_;
  int num_cursors_ = 0;
  void* context_ = nullptr;
  void (*call_)(void*, int) = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<bool> is_interrupted_{false};
  alignas(64) std::atomic<unsigned> start_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};  // wraps after a day
};

}  // namespace roost
