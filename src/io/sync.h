// What coroutines on several reactors wait on. A waiter is always resumed on the reactor it waited on, through
// Reactor::post when that is another one. The spin lock inside guards a few list operations and is never held across
// a resume or a suspension.
//
// Thread-safety: internally synchronised.
#pragma once

#include <atomic>
#include <coroutine>
#include <cstdint>

#include "src/io/reactor.h"

namespace spillway {

class SpinLock {
 public:
  void lock() {
    // acquire: pairs with the release in unlock.
    while (locked_.exchange(true, std::memory_order_acquire))
      while (locked_.load(std::memory_order_relaxed)) __builtin_ia32_pause();
  }
  bool try_lock() { return !locked_.exchange(true, std::memory_order_acquire); }
  void unlock() { locked_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> locked_{false};
};

// A waiting coroutine; lives in its frame.
struct Waiter : Message {
  std::coroutine_handle<> handle;
  Reactor* reactor = nullptr;
  Waiter* next_waiter = nullptr;
  uint64_t tag = 0;
  // Resumes the coroutine on its reactor. The node may be gone when this returns.
  void wake() {
    if (Reactor::current_or_null() == reactor) {
      reactor->schedule(handle);
    } else {
      run = [](Message* m) { static_cast<Waiter*>(m)->handle.resume(); };
      reactor->post(static_cast<Message*>(this));
    }
  }
};

// FIFO of waiters; the caller holds a lock of its own around it.
class WaiterList {
 public:
  bool empty() const { return head_ == nullptr; }
  void push(Waiter* w) {
    w->next_waiter = nullptr;
    (tail_ != nullptr ? tail_->next_waiter : head_) = w;
    tail_ = w;
  }
  Waiter* pop() {
    Waiter* w = head_;
    if (w != nullptr) {
      head_ = w->next_waiter;
      if (head_ == nullptr) tail_ = nullptr;
    }
    return w;
  }
  WaiterList take() {
    WaiterList all = *this;
    head_ = tail_ = nullptr;
    return all;
  }
  void wake_all() {
    while (Waiter* w = pop()) w->wake();
  }

 private:
  Waiter* head_ = nullptr;
  Waiter* tail_ = nullptr;
};

// Mutual exclusion between coroutines, fair (FIFO hand-over). Not recursive.
//   co_await m.lock(); ... m.unlock();    or    auto guard = co_await m.guard();
class AsyncMutex {
 public:
  struct [[nodiscard]] Lock {
    AsyncMutex& m;
    Waiter w;
    bool await_ready() const noexcept { return m.try_lock(); }
    bool await_suspend(std::coroutine_handle<> h) {
      w.handle = h;
      w.reactor = &Reactor::current();
      m.spin_.lock();
      if (!m.held_) {
        m.held_ = true;
        m.spin_.unlock();
        return false;
      }
      m.waiters_.push(&w);
      m.spin_.unlock();
      return true;
    }
    void await_resume() const noexcept {}
  };
  class [[nodiscard]] Guard {
   public:
    explicit Guard(AsyncMutex* m) : m_(m) {}
    Guard(Guard&& o) noexcept : m_(std::exchange(o.m_, nullptr)) {}
    ~Guard() {
      if (m_ != nullptr) m_->unlock();
    }

   private:
    AsyncMutex* m_;
  };
  struct [[nodiscard]] GuardLock : Lock {
    Guard await_resume() noexcept { return Guard(&m); }
  };

  Lock lock() { return Lock{*this, {}}; }
  GuardLock guard() { return GuardLock{{*this, {}}}; }
  bool try_lock() {
    spin_.lock();
    const bool got = !held_;
    held_ = true;
    spin_.unlock();
    return got;
  }
  void unlock() {
    spin_.lock();
    Waiter* w = waiters_.pop();
    if (w == nullptr) held_ = false;
    spin_.unlock();
    if (w != nullptr) w->wake();  // ownership passes with the wake
  }

 private:
  SpinLock spin_;
  bool held_ = false;
  WaiterList waiters_;
};

// Manual-reset event.
class AsyncEvent {
 public:
  struct [[nodiscard]] Wait {
    AsyncEvent& e;
    Waiter w;
    // Always under the lock: who waits may destroy the event next, and set() must be done with it by then.
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
      w.handle = h;
      w.reactor = &Reactor::current();
      e.spin_.lock();
      const bool suspend = !e.set_.load(std::memory_order_relaxed);
      if (suspend) e.waiters_.push(&w);
      e.spin_.unlock();
      return suspend;
    }
    void await_resume() const noexcept {}
  };
  bool is_set() const { return set_.load(std::memory_order_acquire); }  // pairs with the release in set()
  void set() {
    spin_.lock();
    set_.store(true, std::memory_order_release);
    WaiterList all = waiters_.take();
    spin_.unlock();
    all.wake_all();
  }
  void reset() { set_.store(false, std::memory_order_relaxed); }
  Wait wait() { return Wait{*this, {}}; }

 private:
  SpinLock spin_;
  std::atomic<bool> set_{false};
  WaiterList waiters_;
};

// Counts work in flight; wait_idle() resumes when it is zero. Add before the work starts.
class AsyncCounter {
 public:
  void add(uint64_t n = 1) {
    spin_.lock();
    count_ += n;
    spin_.unlock();
  }
  void done(uint64_t n = 1) {
    spin_.lock();
    SPILLWAY_ASSERT(count_ >= n);
    count_ -= n;
    WaiterList all = count_ == 0 ? waiters_.take() : WaiterList{};
    spin_.unlock();
    all.wake_all();
  }
  struct [[nodiscard]] Wait {
    AsyncCounter& c;
    Waiter w;
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
      w.handle = h;
      w.reactor = &Reactor::current();
      c.spin_.lock();
      const bool suspend = c.count_ != 0;
      if (suspend) c.waiters_.push(&w);
      c.spin_.unlock();
      return suspend;
    }
    void await_resume() const noexcept {}
  };
  Wait wait_idle() { return Wait{*this, {}}; }

 private:
  SpinLock spin_;
  uint64_t count_ = 0;
  WaiterList waiters_;
};

// Runs several tasks at once on this reactor and waits for all:
//   std::vector<Task<Status>> parts; ...; Status s = co_await all_of(std::move(parts));   first error wins
Task<Status> all_of(std::vector<Task<Status>> tasks);

}  // namespace spillway
