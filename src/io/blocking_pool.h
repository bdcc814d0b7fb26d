// BlockingPool: threads for what may block (FIEMAP, open, memory that may fault on our own mount). A coroutine
// hands a function over and resumes on its own reactor with the function's value.
//
//   int r = co_await pool.run([&] { return ::fsync(fd); });
//
// Thread-safety: run() from any reactor. The queue is bounded by the coroutines that wait on it (one job each).
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#include "src/io/reactor.h"
#include "src/io/sync.h"

namespace spillway {

class BlockingPool {
 public:
  explicit BlockingPool(unsigned threads);
  // Waits for jobs that have begun and for those queued.
  ~BlockingPool();

  template <class Fn>
  struct [[nodiscard]] Job : Waiter {
    using Value = std::invoke_result_t<Fn>;
    Job(BlockingPool& p, Fn f) : pool(p), fn(std::move(f)) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      reactor = &Reactor::current();
      pool.push([this] {
        if constexpr (std::is_void_v<Value>) fn();
        else value.emplace(fn());
        wake();
      });
    }
    Value await_resume() {
      if constexpr (!std::is_void_v<Value>) return std::move(*value);
    }
    BlockingPool& pool;
    Fn fn;
    std::optional<std::conditional_t<std::is_void_v<Value>, char, Value>> value;
  };
  template <class Fn>
  Job<Fn> run(Fn fn) {
    return Job<Fn>(*this, std::move(fn));
  }

 private:
  void push(std::function<void()> job);
  void work();

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> jobs_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace spillway
