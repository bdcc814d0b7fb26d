// InFlight: who may still use a host cluster that the mapping no longer names. Requests enter before they look a
// mapping up and leave when their data I/O has ended; `drain` returns when all that were inside before it are gone. So
// a freed cluster can be punched and given out again. It is SRCU with suspending readers.
//
// Thread-safety: enter/leave from any reactor, lock-free, a cache line a reactor. drain: one caller at a time.
#pragma once

#include <array>
#include <atomic>

#include "src/io/sync.h"

namespace spillway::qcow2 {

class InFlight {
 public:
  using Ticket = std::atomic<int64_t>*;

  Ticket enter() {
    Shard& s = shards_[Reactor::current().index() % kShards];
    Ticket t = &s.count[current_.load(std::memory_order_relaxed) & 1];
    // seq_cst: before the caller's lookup. Dekker with drain(): it changes the mapping, then reads the counts; either
    // it sees this count or the lookup sees the change.
    t->fetch_add(1, std::memory_order_seq_cst);
    return t;
  }
  void leave(Ticket t) {
    t->fetch_sub(1, std::memory_order_seq_cst);
    // seq_cst: Dekker with drain(), which announces itself and then reads the counts.
    if (draining_.load(std::memory_order_seq_cst)) changed_.set();
  }
  // Two phases: stragglers that read `current_` before the last flip sit in the other half.
  Task<void> drain() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    co_await wait_half((current_.load(std::memory_order_relaxed) & 1) ^ 1);
    const uint32_t old = current_.fetch_add(1, std::memory_order_seq_cst) & 1;
    co_await wait_half(old);
  }

 private:
  static constexpr size_t kShards = 16;
  struct alignas(64) Shard {
    std::atomic<int64_t> count[2] = {0, 0};
  };

  bool idle(uint32_t half) const {
    for (const Shard& s : shards_)
      if (s.count[half].load(std::memory_order_seq_cst) != 0) return false;
    return true;
  }
  Task<void> wait_half(uint32_t half) {
    if (idle(half)) co_return;
    draining_.store(true, std::memory_order_seq_cst);
    for (;;) {
      changed_.reset();
      std::atomic_thread_fence(std::memory_order_seq_cst);
      if (idle(half)) break;
      co_await changed_.wait();
    }
    draining_.store(false, std::memory_order_relaxed);
  }

  std::array<Shard, kShards> shards_;
  std::atomic<uint32_t> current_{0};
  std::atomic<bool> draining_{false};
  AsyncEvent changed_;
};

}  // namespace spillway::qcow2
