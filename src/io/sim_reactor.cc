#include "src/io/sim_reactor.h"

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

namespace spillway {
namespace {

int32_t result_of(ssize_t n) { return n < 0 ? -errno : static_cast<int32_t>(n); }

int32_t execute(const IoOp& op) {
  auto* iov = static_cast<const iovec*>(op.addr);
  switch (op.code) {
    case IoOp::Code::kReadv:
      return result_of(::preadv2(op.fd, iov, static_cast<int>(op.count), static_cast<off_t>(op.offset),
                                 static_cast<int>(op.flags)));
    case IoOp::Code::kWritev:
      return result_of(::pwritev2(op.fd, iov, static_cast<int>(op.count), static_cast<off_t>(op.offset),
                                  static_cast<int>(op.flags)));
    case IoOp::Code::kFsync:
      return result_of((op.flags & IORING_FSYNC_DATASYNC) != 0 ? ::fdatasync(op.fd) : ::fsync(op.fd));
    case IoOp::Code::kFallocate:
      return result_of(::fallocate(op.fd, static_cast<int>(op.flags), static_cast<off_t>(op.offset),
                                   static_cast<off_t>(op.length)));
    case IoOp::Code::kPoll: {
      pollfd p{op.fd, static_cast<short>(op.count), 0};
      ssize_t n = ::poll(&p, 1, 0);
      return n < 0 ? -errno : p.revents;
    }
    case IoOp::Code::kRecvmsg:
      return result_of(::recvmsg(op.fd, static_cast<msghdr*>(const_cast<void*>(op.addr)),
                                 static_cast<int>(op.flags)));
    case IoOp::Code::kSendmsg:
      return result_of(::sendmsg(op.fd, static_cast<const msghdr*>(op.addr), static_cast<int>(op.flags)));
    case IoOp::Code::kAccept: return result_of(::accept4(op.fd, nullptr, nullptr, SOCK_CLOEXEC));
    case IoOp::Code::kTimer: break;
  }
  return -EINVAL;
}

bool later(const auto& a, const auto& b) {
  return a.deadline != b.deadline ? a.deadline > b.deadline : a.sequence > b.sequence;
}

}  // namespace

void SimReactor::submit(IoOp& op) {
  if (op.code == IoOp::Code::kTimer) {
    // A seeded tie-break: equal deadlines fire in random order.
    timers_.push_back({op.length, shuffle_ ? random_() : sequence_++, &op});
    std::push_heap(timers_.begin(), timers_.end(), [](auto& a, auto& b) { return later(a, b); });
    return;
  }
  op.result = execute(op);
  ready_.push_back(op.waiter);
}

void SimReactor::cancel(IoOp& op) {
  auto it = std::find_if(timers_.begin(), timers_.end(), [&](auto& t) { return t.op == &op; });
  if (it == timers_.end()) return;
  timers_.erase(it);
  std::make_heap(timers_.begin(), timers_.end(), [](auto& a, auto& b) { return later(a, b); });
  op.result = -ECANCELED;
  ready_.push_back(op.waiter);
}

bool SimReactor::advance(uint64_t limit_ns) {
  if (timers_.empty() || timers_.front().deadline > limit_ns) return false;
  now_ns_ = std::max(now_ns_, timers_.front().deadline);
  while (!timers_.empty() && timers_.front().deadline <= now_ns_) {
    std::pop_heap(timers_.begin(), timers_.end(), [](auto& a, auto& b) { return later(a, b); });
    IoOp* op = timers_.back().op;
    timers_.pop_back();
    op->result = 0;
    ready_.push_back(op->waiter);
  }
  return true;
}

void SimReactor::turn(bool may_sleep) {
  become_current();
  bool worked = run_messages();
  if (has_ready()) {
    if (shuffle_) std::shuffle(ready_.begin(), ready_.end(), random_);
    run_ready();
    worked = true;
  }
  if (!pollers_.empty()) worked |= poll_pollers();  // after what is ready, as in a real round
  if (worked || !may_sleep) return;
  // Nothing can run and no timer is left: the simulation waits for something that never comes.
  SPILLWAY_ASSERT(advance(UINT64_MAX) || stop_.load());
}

uint64_t SimReactor::run_until_idle() {
  become_current();
  for (;;) {
    if (has_ready() || inbox_.load() != nullptr) turn(false);
    else if (!advance(UINT64_MAX)) return now_ns_;
  }
}

void SimReactor::run_until(uint64_t deadline_ns) {
  become_current();
  for (;;) {
    if (has_ready() || inbox_.load() != nullptr) turn(false);
    else if (!advance(deadline_ns)) break;
  }
  now_ns_ = std::max(now_ns_, deadline_ns);
}

}  // namespace spillway
