// Reactor: one thread's event loop. Coroutines run on it, I/O completes on it, and when nothing is left to do the
// thread sleeps in the kernel for good (no polling, no tick: an idle daemon uses no CPU).
//
// Two implementations: UringReactor (io_uring) and SimReactor (virtual clock, seeded order; io/sim_reactor.h).
//
// States of a UringReactor: created -> running (run() on the thread that owns it) -> stopped.
// Thread-safety: everything is for the reactor's own thread, except `post`, `stop` and `now_ns`, which any thread may
// call. `current()` is the reactor that runs on this thread. Destroy a reactor only after the threads that may post to it
// have ended: what they post can run before post() has returned.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <coroutine>
#include <cstdint>
#include <functional>
#include <memory>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "src/base/result.h"
#include "src/io/forecast.h"
#include "src/io/task.h"

struct msghdr;
struct statx;

namespace spillway {

// One kernel operation in flight. Lives in the awaiting coroutine's frame (no allocation).
struct IoOp {
  enum class Code : uint8_t { kReadv, kWritev, kFsync, kFallocate, kPoll, kRecvmsg, kSendmsg, kAccept, kTimer };
  Code code;
  bool in_kernel = false;
  int fd = -1;
  uint64_t offset = 0;    // readv, writev, fallocate
  uint64_t length = 0;    // fallocate; kTimer: absolute deadline in ns
  const void* addr = nullptr;  // iovec array, msghdr
  uint32_t count = 0;     // iovecs; poll mask
  uint32_t flags = 0;     // RWF_*, fallocate mode, msg flags, fsync flags
  int32_t result = 0;     // >= 0, or -errno
  std::coroutine_handle<> waiter;
};

class Reactor;

// Awaitable form; `co_await` gives the kernel's result: >= 0, or -errno.
class [[nodiscard]] IoAwait : public IoOp {
 public:
  IoAwait(Reactor& reactor, IoOp op) : IoOp(op), reactor_(reactor) {}
  IoAwait(const IoAwait&) = delete;
  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> h);
  int32_t await_resume() const noexcept { return result; }

 private:
  Reactor& reactor_;
};

// Something that is looked at each time round while it is registered (a busy virtqueue). After the last work found the
// reactor goes on polling for a bounded, self-adjusting time; then it asks each poller to fall back on a wake-up of
// its own (an eventfd), drops it, and sleeps.
class Poller {
 public:
  virtual ~Poller() = default;
  // True when it found work. May add or remove pollers, itself too.
  virtual bool poll() = 0;
  // Enable the own wake-up (operations submitted here are in the kernel before the sleep). False: it is no longer
  // registered and adds itself again when the wake-up fires. True: work arrived meanwhile, it stays.
  virtual bool prepare_sleep() = 0;
  // Work is expected soon (it came at regular intervals so far): register again, or not.
  virtual void expect_work() {}
};

// Intrusive node of a cross-thread message; `run` is called on the target reactor. Lives until then. `drop`, where set,
// is called instead when the reactor is destroyed before it came to run it: it frees what the message owns, no more.
struct Message {
  void (*run)(Message*) = nullptr;
  void (*drop)(Message*) = nullptr;
  Message* next = nullptr;
};

class Reactor {
 public:
  virtual ~Reactor();
  Reactor(const Reactor&) = delete;
  Reactor& operator=(const Reactor&) = delete;

  // The reactor running on this thread; aborts when there is none.
  static Reactor& current();
  static Reactor* current_or_null();

  // Monotonic nanoseconds (virtual in SimReactor). Any thread.
  virtual uint64_t now_ns() const = 0;
  // Small dense number, unique in the process: index for per-reactor state.
  uint32_t index() const { return index_; }

  // Runs until stop(). The calling thread owns the reactor meanwhile.
  void run();
  // Runs until the task has ended and returns its value. For tests, start-up and the offline CLI.
  template <class T>
  T block_on(Task<T> task);
  // Any thread. Lets run() return after the current round; does not cancel anything.
  void stop();

  // Resume `h` in this round or the next. Own thread only.
  void schedule(std::coroutine_handle<> h) { ready_.push_back(h); }
  // Resume / run on this reactor. Any thread. The Message form does not allocate.
  void post(Message* m);
  void post(std::coroutine_handle<> h);
  void post(std::function<void()> fn);

  // Starts a task nobody awaits. Own thread only. `live_tasks` counts those not yet ended.
  void spawn(Task<void> task);
  uint64_t live_tasks() const { return live_tasks_; }

  // Kernel operations. Buffers and iovec arrays must live until the result is there.
  IoAwait readv(int fd, std::span<const iovec> iov, uint64_t offset, uint32_t rwf = 0);
  IoAwait writev(int fd, std::span<const iovec> iov, uint64_t offset, uint32_t rwf = 0);
  IoAwait fsync(int fd, bool data_only);
  IoAwait fallocate(int fd, int mode, uint64_t offset, uint64_t length);
  IoAwait poll(int fd, uint32_t events);  // one shot; result = events that came
  IoAwait recvmsg(int fd, msghdr* msg, uint32_t flags);
  IoAwait sendmsg(int fd, const msghdr* msg, uint32_t flags);
  IoAwait accept(int fd);                 // SOCK_CLOEXEC; result = descriptor
  IoAwait sleep_until(uint64_t deadline_ns);
  IoAwait sleep_for(uint64_t ns) { return sleep_until(now_ns() + ns); }
  // Ends an operation early: it completes with -ECANCELED (or its real result if that was sooner). Own thread only.
  virtual void cancel(IoOp& op) = 0;

  void add_poller(Poller* poller);
  void remove_poller(Poller* poller);

  // To be called by IoAwait only.
  virtual void submit(IoOp& op) = 0;

 protected:
  Reactor();
  // One round: run what is ready, take completions; sleep when there is nothing (may_sleep).
  virtual void turn(bool may_sleep) = 0;
  void run_ready();
  bool run_messages();
  virtual void interrupt() = 0;  // wake a sleeping loop; any thread
  bool poll_pollers();
  bool release_pollers();  // before a sleep; true = some of them have work
  bool has_ready() const { return !ready_.empty(); }
  void become_current();

  std::vector<std::coroutine_handle<>> ready_;
  std::vector<std::coroutine_handle<>> running_;
  std::vector<Poller*> pollers_;
  std::vector<Poller*> expectant_;  // dropped before the last sleep
  // MPSC stack of messages: producers push with a release CAS (post), the loop takes all with an acquire
  // exchange (run_messages).
  alignas(64) std::atomic<Message*> inbox_{nullptr};
  // Dekker pair with inbox_: the loop stores sleeping_=true, then loads inbox_ (turn); a producer stores into
  // inbox_, then loads sleeping_ (post). Both sides sequentially consistent, so one of them sees the other.
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stop_{false};

 private:
  static detail::Detached run_detached(Reactor* r, Task<void> task);
  template <class T>
  static detail::Detached run_blocking(Task<T> task, std::optional<typename Task<T>::Stored>* out);
  uint64_t live_tasks_ = 0;
  uint32_t index_;
};

template <class T>
detail::Detached Reactor::run_blocking(Task<T> task, std::optional<typename Task<T>::Stored>* out) {
  if constexpr (std::is_void_v<T>) {
    co_await task;
    out->emplace();
  } else {
    out->emplace(co_await task);
  }
}

template <class T>
T Reactor::block_on(Task<T> task) {
  Reactor* outer = current_or_null();
  SPILLWAY_ASSERT(outer == nullptr || outer == this);
  become_current();
  std::optional<typename Task<T>::Stored> out;
  schedule(run_blocking(std::move(task), &out).handle);
  while (!out) turn(true);
  if constexpr (!std::is_void_v<T>) return std::move(*out);
}

inline void IoAwait::await_suspend(std::coroutine_handle<> h) {
  waiter = h;
  reactor_.submit(*this);
}

// io_uring implementation. `entries`: submission queue size (power of two).
class UringReactor final : public Reactor {
 public:
  // kUnsupported / errno when the kernel has no usable io_uring.
  static Result<std::unique_ptr<UringReactor>> create(uint32_t entries = 1024);
  ~UringReactor() override;
  uint64_t now_ns() const override;
  void submit(IoOp& op) override;
  void cancel(IoOp& op) override;

 private:
  struct Ring;
  struct TimerEntry {
    uint64_t deadline;
    uint64_t sequence;
    IoOp* op;
    bool operator>(const TimerEntry& o) const {
      return deadline != o.deadline ? deadline > o.deadline : sequence > o.sequence;
    }
  };
  UringReactor();
  void turn(bool may_sleep) override;
  void interrupt() override;
  void prepare(IoOp& op);
  void complete(IoOp& op, int32_t result);
  bool reap();
  void enter();
  bool may_spin();
  void end_idle();
  std::optional<Forecast::Window> expected() const;
  void sleep(uint64_t until_ns);
  bool fire_timers();
  void arm_wakeup();

  std::unique_ptr<Ring> ring_;
  std::vector<IoOp*> backlog_;  // did not fit the submission queue
  std::priority_queue<TimerEntry, std::vector<TimerEntry>, std::greater<>> timers_;
  std::vector<IoOp*> canceled_timers_;
  uint64_t timer_sequence_ = 0;
  int wake_fd_ = -1;
  uint64_t wake_value_ = 0;
  uint64_t idle_since_ns_ = 0;  // 0: busy
  uint64_t gap_ns_ = 0;         // moving average of the time between two pieces of work, cut at 4 kMaxSpinNs
  Forecast forecast_;           // of the gaps too long to spin through
  uint64_t late_ns_ = 0;        // by how much timed sleeps ended too late; falls by an eighth each
  uint64_t spin_until_ns_ = 0;  // awake ahead of expected work
  bool missed_ = false;         // it did not come
  bool enabled_ = false;
};

}  // namespace spillway
