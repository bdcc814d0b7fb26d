#include "src/io/reactor.h"

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "src/base/log.h"

namespace spillway {

namespace {
thread_local Reactor* t_current = nullptr;
std::atomic<uint32_t> g_next_index{0};

struct HandleMessage : Message {
  std::coroutine_handle<> handle;
};
struct FunctionMessage : Message {
  std::function<void()> fn;
};

template <class T>
void delete_message(Message* m) {
  delete static_cast<T*>(m);
}
}  // namespace

Reactor::Reactor() : index_(g_next_index.fetch_add(1, std::memory_order_relaxed)) {
  ready_.reserve(256);
  running_.reserve(256);
}

Reactor::~Reactor() {
  Message* m = inbox_.exchange(nullptr, std::memory_order_acquire);
  while (m != nullptr) {
    Message* next = m->next;
    if (m->drop != nullptr) m->drop(m);
    m = next;
  }
  if (t_current == this) t_current = nullptr;
}

Reactor& Reactor::current() {
  SPILLWAY_ASSERT(t_current != nullptr);
  return *t_current;
}
Reactor* Reactor::current_or_null() { return t_current; }
void Reactor::become_current() { t_current = this; }

void Reactor::run() {
  become_current();
  while (!stop_.load(std::memory_order_acquire)) turn(true);
  stop_.store(false, std::memory_order_relaxed);
}

void Reactor::stop() {
  stop_.store(true, std::memory_order_release);
  interrupt();
}

void Reactor::post(Message* m) {
  Message* head = inbox_.load(std::memory_order_relaxed);
  do {
    m->next = head;
  } while (!inbox_.compare_exchange_weak(head, m, std::memory_order_seq_cst,
                                         std::memory_order_relaxed));
  if (sleeping_.load(std::memory_order_seq_cst)) interrupt();
}

void Reactor::post(std::coroutine_handle<> h) {
  auto* m = new HandleMessage;
  m->handle = h;
  m->drop = delete_message<HandleMessage>;
  m->run = [](Message* base) {
    auto* self = static_cast<HandleMessage*>(base);
    auto handle = self->handle;
    delete self;
    handle.resume();
  };
  post(m);
}

void Reactor::post(std::function<void()> fn) {
  auto* m = new FunctionMessage;
  m->fn = std::move(fn);
  m->drop = delete_message<FunctionMessage>;
  m->run = [](Message* base) {
    std::unique_ptr<FunctionMessage> self(static_cast<FunctionMessage*>(base));
    self->fn();
  };
  post(m);
}

bool Reactor::run_messages() {
  if (inbox_.load(std::memory_order_relaxed) == nullptr) return false;
  Message* list = inbox_.exchange(nullptr, std::memory_order_acquire);
  Message* ordered = nullptr;  // the stack is newest first; messages run in the order they came
  while (list != nullptr) {
    Message* next = list->next;
    list->next = ordered;
    ordered = list;
    list = next;
  }
  bool any = ordered != nullptr;
  while (ordered != nullptr) {
    Message* next = ordered->next;
    ordered->run(ordered);
    ordered = next;
  }
  return any;
}

// What becomes ready meanwhile waits for the next round, so that completions and messages get their turn.
void Reactor::run_ready() {
  running_.swap(ready_);
  for (auto h : running_) h.resume();
  running_.clear();
}

detail::Detached Reactor::run_detached(Reactor* r, Task<void> task) {
  co_await task;
  --r->live_tasks_;
}

void Reactor::spawn(Task<void> task) {
  ++live_tasks_;
  schedule(run_detached(this, std::move(task)).handle);
}

void Reactor::add_poller(Poller* poller) { pollers_.push_back(poller); }
void Reactor::remove_poller(Poller* poller) {
  std::erase(pollers_, poller);
  std::erase(expectant_, poller);
}

bool Reactor::release_pollers() {
  bool more = false;
  expectant_ = pollers_;
  for (size_t i = pollers_.size(); i-- > 0;) {
    if (pollers_[i]->prepare_sleep()) {
      more = true;
    } else {
      pollers_[i] = pollers_.back();
      pollers_.pop_back();
    }
  }
  return more;
}

bool Reactor::poll_pollers() {
  bool found = false;
  // By index: a poller's work may add or remove pollers.
  for (size_t i = 0; i < pollers_.size(); ++i) found |= pollers_[i]->poll();
  return found;
}

IoAwait Reactor::readv(int fd, std::span<const iovec> iov, uint64_t offset, uint32_t rwf) {
  return IoAwait(*this, {.code = IoOp::Code::kReadv, .fd = fd, .offset = offset, .addr = iov.data(),
                         .count = static_cast<uint32_t>(iov.size()), .flags = rwf});
}
IoAwait Reactor::writev(int fd, std::span<const iovec> iov, uint64_t offset, uint32_t rwf) {
  return IoAwait(*this, {.code = IoOp::Code::kWritev, .fd = fd, .offset = offset, .addr = iov.data(),
                         .count = static_cast<uint32_t>(iov.size()), .flags = rwf});
}
IoAwait Reactor::fsync(int fd, bool data_only) {
  return IoAwait(*this, {.code = IoOp::Code::kFsync, .fd = fd,
                         .flags = data_only ? unsigned{IORING_FSYNC_DATASYNC} : 0u});
}
IoAwait Reactor::fallocate(int fd, int mode, uint64_t offset, uint64_t length) {
  return IoAwait(*this, {.code = IoOp::Code::kFallocate, .fd = fd, .offset = offset, .length = length,
                         .flags = static_cast<uint32_t>(mode)});
}
IoAwait Reactor::poll(int fd, uint32_t events) {
  return IoAwait(*this, {.code = IoOp::Code::kPoll, .fd = fd, .count = events});
}
IoAwait Reactor::recvmsg(int fd, msghdr* msg, uint32_t flags) {
  return IoAwait(*this, {.code = IoOp::Code::kRecvmsg, .fd = fd, .addr = msg, .flags = flags});
}
IoAwait Reactor::sendmsg(int fd, const msghdr* msg, uint32_t flags) {
  return IoAwait(*this, {.code = IoOp::Code::kSendmsg, .fd = fd, .addr = msg, .flags = flags});
}
IoAwait Reactor::accept(int fd) { return IoAwait(*this, {.code = IoOp::Code::kAccept, .fd = fd}); }
IoAwait Reactor::sleep_until(uint64_t deadline_ns) {
  return IoAwait(*this, {.code = IoOp::Code::kTimer, .length = deadline_ns});
}

// ---- io_uring ------------------------------------------------------------------------------------------------

struct UringReactor::Ring {
  io_uring ring{};
  bool live = false;
  ~Ring() {
    if (live) io_uring_queue_exit(&ring);
  }
};

namespace {
// user_data of operations that belong to the loop itself; IoOp addresses are aligned, so never these.
constexpr uint64_t kWakeTag = 1;
constexpr uint64_t kCancelTag = 2;
// A client that waits for an interrupt comes back after one wake-up (35-75 us between idle virtual CPUs) and its own work; who
// goes to sleep just before that pays for a second one. So: a round trip. Measured in docs/virtio-blk.md.
constexpr uint64_t kMaxSpinNs = 120'000;
constexpr uint64_t kMinSpinNs = 60'000;
// Reads and writes are handed over in batches of so many: the device begins with the first ones while the rest is prepared.
// One system call for a whole ring of requests makes all of them wait for the last (measured: docs/virtio-blk.md).
constexpr unsigned kSubmitBatch = 4;
constexpr uint64_t kMaxLateNs = 200'000;
}  // namespace

UringReactor::UringReactor() : ring_(std::make_unique<Ring>()) {}

UringReactor::~UringReactor() {
  ring_.reset();
  if (wake_fd_ >= 0) ::close(wake_fd_);
}

Result<std::unique_ptr<UringReactor>> UringReactor::create(uint32_t entries) {
  std::unique_ptr<UringReactor> r(new UringReactor);
  // The ring is enabled by the thread that runs it (turn), which then is its single issuer.
  const unsigned kBest = IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER |
                         IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_CLAMP;
  int err = io_uring_queue_init(entries, &r->ring_->ring, kBest);
  if (err == -EINVAL)  // before Linux 6.1
    err = io_uring_queue_init(entries, &r->ring_->ring, IORING_SETUP_R_DISABLED | IORING_SETUP_CLAMP);
  if (err < 0) return fail_errno(-err, "io_uring_setup");
  r->ring_->live = true;
  // A process forked from this one (pmem-agent) would keep the ring, and with it the files of requests in flight and their
  // locks, after we are gone: a successor that waits for those locks would be waited for by that process.
  if (err = io_uring_ring_dontfork(&r->ring_->ring); err < 0) return fail_errno(-err, "io_uring: dontfork");
  r->wake_fd_ = ::eventfd(0, EFD_CLOEXEC);
  if (r->wake_fd_ < 0) return fail_errno(errno, "eventfd");
  return r;
}

uint64_t UringReactor::now_ns() const {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(ts.tv_nsec);
}

void UringReactor::interrupt() {
  const uint64_t one = 1;
  [[maybe_unused]] ssize_t n = ::write(wake_fd_, &one, sizeof one);  // fails only when it is already readable
}

void UringReactor::submit(IoOp& op) {
  if (op.code == IoOp::Code::kTimer) {
    timers_.push({op.length, timer_sequence_++, &op});
    return;
  }
  prepare(op);
}

void UringReactor::prepare(IoOp& op) {
  io_uring_sqe* sqe = backlog_.empty() ? io_uring_get_sqe(&ring_->ring) : nullptr;
  if (sqe == nullptr && enabled_) {
    io_uring_submit(&ring_->ring);
    sqe = backlog_.empty() ? io_uring_get_sqe(&ring_->ring) : nullptr;
  }
  if (sqe == nullptr) {
    backlog_.push_back(&op);
    return;
  }
  switch (op.code) {
    case IoOp::Code::kReadv:
    case IoOp::Code::kWritev: {
      const auto* iov = static_cast<const iovec*>(op.addr);
      const bool write = op.code == IoOp::Code::kWritev;
      if (op.count != 1 || iov->iov_len > INT32_MAX) {
        if (write) io_uring_prep_writev2(sqe, op.fd, iov, op.count, op.offset, static_cast<int>(op.flags));
        else io_uring_prep_readv2(sqe, op.fd, iov, op.count, op.offset, static_cast<int>(op.flags));
        break;
      }
      // One piece: the kernel need not copy an array.
      const auto length = static_cast<unsigned>(iov->iov_len);
      if (write) io_uring_prep_write(sqe, op.fd, iov->iov_base, length, op.offset);
      else io_uring_prep_read(sqe, op.fd, iov->iov_base, length, op.offset);
      sqe->rw_flags = static_cast<__kernel_rwf_t>(op.flags);
      break;
    }
    case IoOp::Code::kFsync: io_uring_prep_fsync(sqe, op.fd, op.flags); break;
    case IoOp::Code::kFallocate:
      io_uring_prep_fallocate(sqe, op.fd, static_cast<int>(op.flags), static_cast<off_t>(op.offset),
                              static_cast<off_t>(op.length));
      break;
    case IoOp::Code::kPoll: io_uring_prep_poll_add(sqe, op.fd, op.count); break;
    case IoOp::Code::kRecvmsg:
      io_uring_prep_recvmsg(sqe, op.fd, static_cast<msghdr*>(const_cast<void*>(op.addr)), op.flags);
      break;
    case IoOp::Code::kSendmsg:
      io_uring_prep_sendmsg(sqe, op.fd, static_cast<const msghdr*>(op.addr), op.flags);
      break;
    case IoOp::Code::kAccept:
      io_uring_prep_accept(sqe, op.fd, nullptr, nullptr, SOCK_CLOEXEC);
      break;
    case IoOp::Code::kTimer: break;
  }
  op.in_kernel = true;
  io_uring_sqe_set_data(sqe, &op);
  // Only these: a reply and the end of its message (vhost_user) have to enter the kernel together.
  const bool data = op.code == IoOp::Code::kReadv || op.code == IoOp::Code::kWritev;
  if (data && enabled_ && io_uring_sq_ready(&ring_->ring) >= kSubmitBatch) io_uring_submit(&ring_->ring);
}

void UringReactor::complete(IoOp& op, int32_t result) {
  op.in_kernel = false;
  op.result = result;
  ready_.push_back(op.waiter);
}

void UringReactor::cancel(IoOp& op) {
  if (op.code == IoOp::Code::kTimer) {
    canceled_timers_.push_back(&op);
    return;
  }
  auto waiting = std::find(backlog_.begin(), backlog_.end(), &op);
  if (waiting != backlog_.end()) {
    backlog_.erase(waiting);
    complete(op, -ECANCELED);
    return;
  }
  if (!op.in_kernel) return;
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
  if (sqe == nullptr) {
    io_uring_submit(&ring_->ring);
    sqe = io_uring_get_sqe(&ring_->ring);
  }
  SPILLWAY_ASSERT(sqe != nullptr);
  io_uring_prep_cancel(sqe, &op, 0);
  io_uring_sqe_set_data64(sqe, kCancelTag);
}

void UringReactor::arm_wakeup() {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
  if (sqe == nullptr) {
    io_uring_submit(&ring_->ring);
    sqe = io_uring_get_sqe(&ring_->ring);
  }
  SPILLWAY_ASSERT(sqe != nullptr);
  io_uring_prep_read(sqe, wake_fd_, &wake_value_, sizeof wake_value_, 0);
  io_uring_sqe_set_data64(sqe, kWakeTag);
}

bool UringReactor::reap() {
  bool any = false;
  unsigned head = 0, seen = 0;
  bool rearm = false;
  io_uring_cqe* cqe = nullptr;
  io_uring_for_each_cqe(&ring_->ring, head, cqe) {
    ++seen;
    const uint64_t data = io_uring_cqe_get_data64(cqe);
    if (data == kWakeTag) {
      rearm = true;
    } else if (data != kCancelTag) {
      complete(*reinterpret_cast<IoOp*>(data), cqe->res);
      any = true;
    }
  }
  if (seen > 0) io_uring_cq_advance(&ring_->ring, seen);
  if (rearm) arm_wakeup();
  return any;
}

bool UringReactor::fire_timers() {
  for (IoOp* op : canceled_timers_) {
    // Rare (teardown): rebuild the heap without it.
    std::vector<TimerEntry> keep;
    bool found = false;
    while (!timers_.empty()) {
      if (timers_.top().op == op) found = true;
      else keep.push_back(timers_.top());
      timers_.pop();
    }
    for (auto& t : keep) timers_.push(t);
    if (found) complete(*op, -ECANCELED);
  }
  canceled_timers_.clear();
  if (timers_.empty()) return false;
  const uint64_t now = now_ns();
  bool any = false;
  while (!timers_.empty() && timers_.top().deadline <= now) {
    IoOp* op = timers_.top().op;
    timers_.pop();
    complete(*op, 0);
    any = true;
  }
  return any;
}

// Into the kernel only when there is something to hand over or to fetch: with DEFER_TASKRUN completions wait there until
// we enter, and the TASKRUN flag says that some do.
void UringReactor::enter() {
  io_uring* ring = &ring_->ring;
  const unsigned flags = __atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED);
  if (io_uring_sq_ready(ring) > 0 || (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0)
    io_uring_submit_and_get_events(ring);
}

// Hybrid polling. While pollers are registered: spin for three times the usual gap between two pieces of work, if that gap is
// shorter than a client's round trip; otherwise sleep at once. Gaps that are longer but regular (a guest that does one request a
// millisecond): sleep until shortly before the next is due, then spin for it (forecast.h). After one that does not come the
// reactor sleeps until there is work, so that an idle one sleeps for good.
bool UringReactor::may_spin() {
  if (pollers_.empty()) return false;
  const uint64_t now = now_ns();
  if (idle_since_ns_ == 0) idle_since_ns_ = now;
  if (spin_until_ns_ != 0) {
    if (now < spin_until_ns_) return true;
    spin_until_ns_ = 0;
    missed_ = true;
    return false;
  }
  if (gap_ns_ > kMaxSpinNs) return false;
  return now - idle_since_ns_ < std::clamp(3 * gap_ns_, kMinSpinNs, kMaxSpinNs);
}

void UringReactor::end_idle() {
  if (idle_since_ns_ == 0) return;
  const uint64_t gap = now_ns() - idle_since_ns_;
  idle_since_ns_ = spin_until_ns_ = 0;
  missed_ = false;
  gap_ns_ = (7 * gap_ns_ + std::min(gap, 4 * kMaxSpinNs)) / 8;
  if (gap > kMaxSpinNs) forecast_.add(gap);
}

std::optional<Forecast::Window> UringReactor::expected() const {
  if (missed_ || idle_since_ns_ == 0 || expectant_.empty()) return std::nullopt;
  return forecast_.next(late_ns_);
}

void UringReactor::sleep(uint64_t until_ns) {
  io_uring* ring = &ring_->ring;
  if (until_ns == 0) {
    io_uring_submit_and_wait(ring, 1);
    return;
  }
  io_uring_cqe* cqe = nullptr;
  const uint64_t now = now_ns();
  const uint64_t wait = until_ns > now ? until_ns - now : 0;
  __kernel_timespec ts{static_cast<int64_t>(wait / 1'000'000'000), static_cast<long long>(wait % 1'000'000'000)};
  io_uring_submit_and_wait_timeout(ring, &cqe, 1, &ts, nullptr);
}

// One round. Order: messages, timers, ready coroutines, pollers, submission + completions. Sleeps only when all of these
// found nothing; the Dekker pair with post() (see inbox_) closes the gap between the last look and the sleep.
void UringReactor::turn(bool may_sleep) {
  io_uring* ring = &ring_->ring;
  if (!enabled_) {
    // Not io_uring_enable_rings: Debian 12's liburing 2.3 does not export it.
    long err = ::syscall(__NR_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
    SPILLWAY_ASSERT(err == 0);
    enabled_ = true;
    arm_wakeup();
  }
  bool worked = run_messages();
  worked |= fire_timers();
  if (!ready_.empty()) {
    run_ready();
    worked = true;
  }
  if (!pollers_.empty()) worked |= poll_pollers();
  while (!backlog_.empty() && io_uring_sq_space_left(ring) > 0) {
    std::vector<IoOp*> again;
    again.swap(backlog_);
    for (IoOp* op : again) prepare(*op);
  }
  if (!ready_.empty()) worked = true;
  if (worked) end_idle();
  if (worked || !may_sleep || stop_.load(std::memory_order_relaxed) || may_spin()) {
    if (!worked)
      for (int i = 0; i < 4; ++i) __builtin_ia32_pause();  // leave the driver its cache lines for a moment
    enter();
    reap();
    return;
  }
  sleeping_.store(true, std::memory_order_seq_cst);
  bool more = inbox_.load(std::memory_order_seq_cst) != nullptr;
  if (!pollers_.empty()) more |= release_pollers();
  const auto window = more ? std::nullopt : expected();
  const uint64_t wake = window ? idle_since_ns_ + window->from_ns - late_ns_ : 0;
  if (!more) {
    uint64_t until = timers_.empty() ? 0 : timers_.top().deadline;
    if (wake != 0 && (until == 0 || wake < until)) until = wake;
    sleep(until);
  }
  sleeping_.store(false, std::memory_order_relaxed);
  reap();
  if (wake == 0 || !ready_.empty()) return;
  const uint64_t now = now_ns();
  if (now < wake) return;
  late_ns_ = std::max(std::min(now - wake, kMaxLateNs), late_ns_ - late_ns_ / 8);
  spin_until_ns_ = idle_since_ns_ + window->to_ns;
  for (Poller* p : std::exchange(expectant_, {})) p->expect_work();
}

}  // namespace spillway
