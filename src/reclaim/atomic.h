// Atomics, mutex, futex and allocation as the library uses them.
//
// With SPILLWAY_RECLAIM_INTERLEAVE (tests/reclaim/interleave) every atomic access, lock and wait is a
// point where a seeded scheduler may switch threads; otherwise these are the std ones.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

#if defined(__clang__)
#define SPILLWAY_TSA(x) __attribute__((x))
#else
#define SPILLWAY_TSA(x)
#endif

namespace spillway::reclaim {

#ifdef SPILLWAY_RECLAIM_INTERLEAVE
void interleave_point() noexcept;   // may switch
void interleave_wait() noexcept;    // nothing to do until somebody else moved: must switch

template <class T>
class Atomic {
 public:
  constexpr Atomic(T v = T()) noexcept : v_(v) {}
  T load(std::memory_order o = std::memory_order_seq_cst) const noexcept {
    interleave_point();
    return v_.load(o);
  }
  void store(T v, std::memory_order o = std::memory_order_seq_cst) noexcept {
    interleave_point();
    v_.store(v, o);
  }
  T exchange(T v, std::memory_order o = std::memory_order_seq_cst) noexcept {
    interleave_point();
    return v_.exchange(v, o);
  }
  bool compare_exchange_weak(T& e, T d, std::memory_order s, std::memory_order f) noexcept {
    interleave_point();
    return v_.compare_exchange_strong(e, d, s, f);
  }
  bool compare_exchange_strong(T& e, T d, std::memory_order s, std::memory_order f) noexcept {
    interleave_point();
    return v_.compare_exchange_strong(e, d, s, f);
  }
#define SPILLWAY_RMW(name)                                                       \
  T name(T v, std::memory_order o = std::memory_order_seq_cst) noexcept {        \
    interleave_point();                                                          \
    return v_.name(v, o);                                                        \
  }
  SPILLWAY_RMW(fetch_add)
  SPILLWAY_RMW(fetch_sub)
  SPILLWAY_RMW(fetch_or)
  SPILLWAY_RMW(fetch_and)
#undef SPILLWAY_RMW

 private:
  std::atomic<T> v_;
};
#else
template <class T>
using Atomic = std::atomic<T>;
inline void interleave_point() noexcept {}
#endif

class SPILLWAY_TSA(capability("mutex")) Mutex {
 public:
  void lock() SPILLWAY_TSA(acquire_capability()) {
#ifdef SPILLWAY_RECLAIM_INTERLEAVE
    interleave_point();
    while (!m_.try_lock()) interleave_wait();
#else
    m_.lock();
#endif
  }
  void unlock() SPILLWAY_TSA(release_capability()) { m_.unlock(); }
  bool try_lock() SPILLWAY_TSA(try_acquire_capability(true)) {
    interleave_point();
    return m_.try_lock();
  }

 private:
  std::mutex m_;
};

class SPILLWAY_TSA(scoped_lockable) Lock {
 public:
  explicit Lock(Mutex& m) SPILLWAY_TSA(acquire_capability(m)) : m_(m) { m_.lock(); }
  ~Lock() SPILLWAY_TSA(release_capability()) { m_.unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  Mutex& m_;
};

/// Sleeps while `word` is `value`; returns on a wake, a change, a signal or the timeout (ns, <0 none).
void futex_wait(Atomic<std::uint32_t>& word, std::uint32_t value, std::int64_t timeout_ns = -1) noexcept;
void futex_wake(Atomic<std::uint32_t>& word, int count) noexcept;

/// All internal allocations. Zeroed, cache-line aligned; null when memory is short or a test says so.
void* allocate(std::size_t size) noexcept;
void release(void* p, std::size_t size) noexcept;
/// Tests: returns true to make this allocation fail. Null = never.
void set_allocation_fault(bool (*fault)(std::size_t)) noexcept;

template <class T, class... A>
T* make(A&&... a) noexcept {
  static_assert(alignof(T) <= 64);
  void* p = allocate(sizeof(T));
  return p != nullptr ? new (p) T(std::forward<A>(a)...) : nullptr;
}
template <class T>
void destroy(T* p) noexcept {
  if (p == nullptr) return;
  p->~T();
  release(p, sizeof(T));
}

/// Small number of the calling thread, stable for its life; picks shards and stocks.
unsigned thread_slot() noexcept;
/// Number of the CPU this thread runs on now; picks shards of what is written by every walker.
unsigned cpu_slot() noexcept;
unsigned cores() noexcept;

}  // namespace spillway::reclaim
