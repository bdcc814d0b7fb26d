// Task<T>: a lazily started coroutine, or a value that is already there.
//
// A function that returns Task<T> may answer at once without a coroutine (`return Task<T>::ready(v)`): no frame,
// no allocation, no suspension. That is how a cache hit stays cheap. A coroutine starts when awaited and resumes
// its awaiter by symmetric transfer. Frames come from a per-thread free list (see frame_alloc).
//
// Thread-confined: a Task starts, suspends and ends on the reactor that awaits it. What another reactor must wake
// goes through io/sync.h, which resumes a waiter on its own reactor.
//
// GCC 12 pitfalls to avoid in coroutines: no temporaries with non-trivial destructors built by brace-initialisation
// inside a co_await expression (name them first); no co_await inside a conditional operator's arms.
#pragma once

#include <coroutine>
#include <cstddef>
#include <exception>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include "src/base/result.h"

namespace spillway {

// Memory for coroutine frames: per-thread free lists of 64-byte size classes up to 4 KiB; larger from the heap.
// A frame may be freed on another thread than it was made on; it then joins that thread's list (bounded).
void* frame_alloc(std::size_t size);
void frame_free(void* p, std::size_t size) noexcept;

template <class T>
class Task;

namespace detail {

struct PromiseBase {
  static void* operator new(std::size_t size) { return frame_alloc(size); }
  static void operator delete(void* p, std::size_t size) noexcept { frame_free(p, size); }

  struct FinalAwaiter {
    bool await_ready() const noexcept { return false; }
    template <class P>
    std::coroutine_handle<> await_suspend(std::coroutine_handle<P> h) const noexcept {
      return h.promise().continuation_;
    }
    void await_resume() const noexcept {}
  };
  std::suspend_always initial_suspend() const noexcept { return {}; }
  FinalAwaiter final_suspend() const noexcept { return {}; }
  // Exceptions do not cross a task: one that gets here (bad_alloc of a container) is our own mistake.
  void unhandled_exception() noexcept { std::terminate(); }

  std::coroutine_handle<> continuation_ = std::noop_coroutine();
};

template <class T>
struct Promise : PromiseBase {
  Task<T> get_return_object() noexcept;
  template <class U>
  void return_value(U&& v) {
    value_.emplace(std::forward<U>(v));
  }
  std::optional<T> value_;
};

template <>
struct Promise<void> : PromiseBase {
  Task<void> get_return_object() noexcept;
  void return_void() noexcept {}
};

struct Unit {};

}  // namespace detail

template <class T = void>
class [[nodiscard]] Task {
 public:
  using promise_type = detail::Promise<T>;
  using Handle = std::coroutine_handle<promise_type>;
  using Stored = std::conditional_t<std::is_void_v<T>, detail::Unit, T>;

  // A task that has already ended.
  static Task ready(Stored v = {}) {
    Task t;
    t.value_.emplace(std::move(v));
    return t;
  }
  explicit Task(Handle h) noexcept : handle_(h) {}
  Task(Task&& o) noexcept
      : handle_(std::exchange(o.handle_, {})), value_(std::move(o.value_)) {
    o.value_.reset();
  }
  Task& operator=(Task&& o) noexcept {
    if (this != &o) {
      destroy();
      handle_ = std::exchange(o.handle_, {});
      value_ = std::move(o.value_);
      o.value_.reset();
    }
    return *this;
  }
  ~Task() { destroy(); }

  // True when the value is there without running anything.
  bool is_ready() const noexcept { return !handle_; }

  // The awaiter refers to the task, which outlives the co_await expression either way.
  struct Awaiter {
    Task& task;
    bool await_ready() const noexcept { return !task.handle_; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> awaiter) const noexcept {
      task.handle_.promise().continuation_ = awaiter;
      return task.handle_;
    }
    T await_resume() const {
      if constexpr (!std::is_void_v<T>) {
        if (!task.handle_) return std::move(*task.value_);
        return std::move(*task.handle_.promise().value_);
      }
    }
  };
  Awaiter operator co_await() noexcept { return Awaiter{*this}; }

 private:
  Task() = default;
  void destroy() {
    if (handle_) handle_.destroy();
    handle_ = {};
  }
  Handle handle_;
  std::optional<Stored> value_;
};

namespace detail {
template <class T>
Task<T> Promise<T>::get_return_object() noexcept {
  return Task<T>(std::coroutine_handle<Promise<T>>::from_promise(*this));
}
inline Task<void> Promise<void>::get_return_object() noexcept {
  return Task<void>(std::coroutine_handle<Promise<void>>::from_promise(*this));
}

// A coroutine nobody awaits; its frame ends itself. `on_done` runs last.
struct Detached {
  struct promise_type {
    static void* operator new(std::size_t size) { return frame_alloc(size); }
    static void operator delete(void* p, std::size_t size) noexcept { frame_free(p, size); }
    Detached get_return_object() noexcept {
      return {std::coroutine_handle<promise_type>::from_promise(*this)};
    }
    std::suspend_always initial_suspend() const noexcept { return {}; }
    std::suspend_never final_suspend() const noexcept { return {}; }
    void return_void() noexcept {}
    void unhandled_exception() noexcept { std::terminate(); }
  };
  std::coroutine_handle<promise_type> handle;
};

}  // namespace detail
}  // namespace spillway
