// RCU in the shape of C++26's <rcu> (P2545), on liburcu's bp flavour, so that it can be replaced.
//
// Reader:   std::scoped_lock g(rcu());  T* p = ptr.load();        // about 1 ns, no registration
// Writer:   ptr.store(next); rcu_retire(old);                     // freed after a grace period
//
// Never hold it across a callback or a suspension point. `synchronize` waits for all readers of
// the process (tens of ms when idle threads poll): never on a path that somebody waits for.
//
// TSAN: liburcu 0.13 carries no annotations, so they are here: leaving a read section releases,
// the end of a grace period acquires. A missing retire is therefore still a reported race.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

#ifndef SPILLWAY_RECLAIM_INTERLEAVE
#ifndef _LGPL_SOURCE
#define _LGPL_SOURCE  // inline read side
#define SPILLWAY_UNDEF_LGPL_SOURCE
#endif
#include <urcu/urcu-bp.h>
#ifdef SPILLWAY_UNDEF_LGPL_SOURCE
#undef _LGPL_SOURCE
#undef SPILLWAY_UNDEF_LGPL_SOURCE
#endif
#endif

#if defined(__SANITIZE_THREAD__)
#define SPILLWAY_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPILLWAY_TSAN 1
#endif
#endif
#ifdef SPILLWAY_TSAN
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

namespace spillway::reclaim {

namespace rcu_detail {
#ifdef SPILLWAY_TSAN
extern char grace_period_tag;
#endif
struct Head {
  void* opaque[2] = {nullptr, nullptr};  // rcu_head
  void (*run)(Head*) noexcept = nullptr;
  std::size_t bytes = 0;
};
void enqueue(Head* h) noexcept;
#ifdef SPILLWAY_RECLAIM_INTERLEAVE
void interleave_read_lock() noexcept;
void interleave_read_unlock() noexcept;
void interleave_access() noexcept;
#else
inline void interleave_access() noexcept {}
#endif
}  // namespace rcu_detail

/// BasicLockable; recursion is fine.
class RcuDomain {
 public:
  void lock() noexcept {
#ifdef SPILLWAY_RECLAIM_INTERLEAVE
    rcu_detail::interleave_read_lock();
#else
    urcu_bp_read_lock();
#endif
  }
  void unlock() noexcept {
#ifdef SPILLWAY_TSAN
    __tsan_release(&rcu_detail::grace_period_tag);
#endif
#ifdef SPILLWAY_RECLAIM_INTERLEAVE
    rcu_detail::interleave_read_unlock();
#else
    urcu_bp_read_unlock();
#endif
  }
  bool try_lock() noexcept {
    lock();
    return true;
  }
};
inline RcuDomain& rcu() noexcept {
  static constinit RcuDomain d;
  return d;
}

class RcuGuard {
 public:
  RcuGuard() noexcept { rcu().lock(); }
  ~RcuGuard() { rcu().unlock(); }
  RcuGuard(const RcuGuard&) = delete;
  RcuGuard& operator=(const RcuGuard&) = delete;
};

/// Base of objects that retire themselves without allocating. `T` derives from RcuObject<T>.
template <class T, class D = std::default_delete<T>>
class RcuObject : private rcu_detail::Head {
 public:
  /// Deletes *this after a grace period. The object must be unreachable for new readers.
  void retire(std::size_t size = sizeof(T)) noexcept {
    this->bytes = size;
    this->run = [](rcu_detail::Head* h) noexcept { D()(static_cast<T*>(static_cast<RcuObject*>(h))); };
    rcu_detail::enqueue(this);
  }
};

/// A published pointer. store = release, load = acquire (consume is not to be had); exchanges are seq_cst,
/// so that an installer that looks at a flag afterwards has a partner in who sets the flag and looks here.
template <class T>
class RcuPtr {
 public:
  constexpr RcuPtr(T* p = nullptr) noexcept : p_(p) {}
  T* load(std::memory_order order = std::memory_order_acquire) const noexcept {
    rcu_detail::interleave_access();
    return p_.load(order);
  }
  void store(T* p) noexcept {
    rcu_detail::interleave_access();
    p_.store(p, std::memory_order_release);
  }
  T* exchange(T* p) noexcept {
    rcu_detail::interleave_access();
    return p_.exchange(p, std::memory_order_seq_cst);
  }
  bool compare_exchange(T*& expected, T* desired) noexcept {
    rcu_detail::interleave_access();
    return p_.compare_exchange_strong(expected, desired, std::memory_order_seq_cst,
                                      std::memory_order_acquire);
  }

 private:
  std::atomic<T*> p_;
};

/// Waits for a grace period: every reader that was inside has left. Not inside a read section.
void rcu_synchronize() noexcept;
/// Waits until everything retired before has been deleted.
void rcu_barrier() noexcept;

struct RcuStatus {
  bool membarrier = false;   ///< false: read sections cost like a full barrier (60 ns)
  std::uint64_t retired = 0, deleted = 0;
  std::uint64_t backlog_objects = 0, backlog_bytes = 0, backlog_objects_max = 0;
};
RcuStatus rcu_status() noexcept;
std::string to_text(const RcuStatus& s);

/// Called once by the first Registry: pthread_atfork handlers, so that a forked child can go on.
void rcu_enable_fork() noexcept;

}  // namespace spillway::reclaim
