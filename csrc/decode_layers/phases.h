// Work in phases that several threads do together without a fork and a join for each: whoever is free takes the next item, and nobody
// begins a phase before the one before is done. Which thread does an item does not matter to its result. No thread waits for one that
// has not taken an item, so threads may come late, or never.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace dreamkernels {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Phases {
 public:
  explicit Phases(int64_t most) : phases_(most) {}

  // What went wrong in an item first. Only after all threads have left.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  friend class Worker;
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::vector<Phase> phases_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
};

// One thread. All of them ask for the same phases in the same order.
class Worker {
 public:
  explicit Worker(Phases& shared) : shared_(shared) {}

  // f(item) for some of the items; when it returns, all are done.
  template <class F>
  void phase(int64_t items, F&& f) {
    Phases::Phase& now = shared_.phases_[number_++];
    for (int64_t item; (item = now.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      try {
        f(item);
      } catch (...) {
        if (!shared_.failed_.exchange(true)) shared_.error_ = std::current_exception();
      }
      now.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; now.done.load(std::memory_order_acquire) < items; ++spins) {
      spins < 4096 ? relax() : std::this_thread::yield();
    }
  }

 private:
  Phases& shared_;
  int64_t number_ = 0;
};

}  // namespace dreamkernels
