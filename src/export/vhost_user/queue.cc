#include "src/export/vhost_user/queue.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "src/base/log.h"

namespace spillway::vhost {

using virtio::BlkOp;
using virtio::BlkRequest;
using virtio::BlkStatus;
using virtio::Virtqueue;

namespace {
constexpr unsigned kPollBudget = 64;     // requests taken per round, so that other queues get their turn
constexpr unsigned kPublishBatch = 4;    // answers per publish while more requests wait: the driver works meanwhile. 8 with
                                         // kAhead, or at depth 8, makes the two sides wait for each other
constexpr unsigned kAhead = 3;           // requests read before the oldest is served: what they need is fetched meanwhile
constexpr uint64_t kMaxBounce = 16 * kMiB;
constexpr uint64_t kMaxPiece = 4 * kMiB;  // of one request at a time: a chain may name gigabytes

void bump(std::atomic<uint64_t>& counter, uint64_t by = 1) {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

// The value of a task that is_ready().
Status take_ready(Task<Status>& task) { return (task.operator co_await()).await_resume(); }
}  // namespace

struct Queue::KickWait {
  Queue& q;
  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> h) const { q.kick_waiter_ = q.kick_op_.waiter = h; }
  void await_resume() const noexcept {}
};

Queue::Queue(Device& device, uint16_t index)
    : device_(device), volume_(device.volume.get()), index_(index) {}

Queue::~Queue() {
  SPILLWAY_ASSERT(owner_ == nullptr);
  while (Request* r = free_) {
    free_ = r->next;
    delete r;
  }
  if (kick_fd_ >= 0) ::close(kick_fd_);
  if (call_fd_ >= 0) ::close(call_fd_);
}

// ---- life -----------------------------------------------------------------------------------------------------

Task<Status> Queue::start(Reactor& owner, Start start) {
  SPILLWAY_ASSERT(owner_ == nullptr);
  Status s = vq_.start(start.ring, start.memory);
  if (!s) {
    if (start.kick >= 0) ::close(start.kick);
    if (start.call >= 0) ::close(start.call);
    co_return s;
  }
  owner_ = &owner;
  Start* from = &start;
  co_await RunOn(owner, [this, from] { begin(std::move(*from)); });
  co_return Status{};
}

void Queue::begin(Start start) {
  ring_ = start.ring;
  memory_ = start.memory;
  log_ = std::move(start.log);
  if (kick_fd_ >= 0) ::close(kick_fd_);
  if (call_fd_ >= 0) ::close(call_fd_);
  kick_fd_ = start.kick;
  call_fd_ = start.call;
  look_at_call();
  vq_.keep_raw(ring_.packed);
  block_mask_ = volume_->geometry().block_size - 1;
  busy_.assign(ring_.packed ? 0 : ring_.size, 0);
  batch_tokens_.resize(ring_.size);
  batch_ = 0;
  stopping_ = broken_told_ = false;
  loop_ended_ = false;
  kick_op_ = IoOp{.code = IoOp::Code::kPoll, .fd = kick_fd_, .count = POLLIN};
  kick_loop().handle.resume();
  in_poll_ = true;
  for (auto& left : start.left) {
    const auto popped = ring_.packed ? vq_.reload_packed(left.descs, chain_)
                                     : vq_.reload_split(left.token, chain_);
    if (popped == Virtqueue::Pop::kBroken) {
      broke();
      break;
    }
    take(left.token);
  }
  in_poll_ = false;
  if (batch_ > 0) publish();
  if (start.call_first) call();
  activate();
}

// Waits for kicks, one poll of the descriptor at a time; armed by prepare_sleep.
detail::Detached Queue::kick_loop() {
  for (;;) {
    co_await KickWait{*this};
    kick_outstanding_ = false;
    if (stopping_) break;
    uint64_t count = 0;
    iovec v{&count, sizeof count};
    // NOWAIT: the front-end has the same descriptor and may have emptied it meanwhile.
    const ssize_t n = ::preadv2(kick_fd_, &v, 1, -1, RWF_NOWAIT);
    if (kick_op_.result < 0 || (n != sizeof count && !(n < 0 && errno == EAGAIN))) {
      vq_.mark_broken("kick descriptor", static_cast<uint64_t>(n < 0 ? errno : n));
      broke();
    }
    bump(stats_.kicks);
    activate();
  }
  loop_ended_ = true;
  maybe_stopped();
}

void Queue::activate() {
  if (active_ || stopping_) return;
  active_ = true;
  owner_->add_poller(this);
}

bool Queue::prepare_sleep() {
  if (batch_ > 0) publish();
  if (!vq_.broken() && vq_.arm()) return true;
  if (!kick_outstanding_ && !vq_.broken()) {
    kick_outstanding_ = true;
    owner_->submit(kick_op_);
  }
  active_ = false;
  return false;
}

Task<void> Queue::stop() {
  if (owner_ == nullptr) co_return;
  struct [[nodiscard]] StopWait : Waiter {
    explicit StopWait(Queue& queue) : q(queue) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      reactor = &Reactor::current();
      if (reactor == q.owner_) {
        q.begin_stop(this);
        return;
      }
      run = [](Message* m) {
        auto* self = static_cast<StopWait*>(static_cast<Waiter*>(m));
        self->q.begin_stop(self);
      };
      q.owner_->post(static_cast<Message*>(this));
    }
    void await_resume() const noexcept {}
    Queue& q;
  };
  StopWait wait(*this);
  co_await wait;
  owner_ = nullptr;
}

void Queue::begin_stop(Waiter* waiter) {
  stopping_ = true;
  stop_waiter_ = waiter;
  if (active_) {
    owner_->remove_poller(this);
    active_ = false;
  }
  if (batch_ > 0) publish();
  if (kick_outstanding_) owner_->cancel(kick_op_);
  else owner_->schedule(kick_waiter_);
}

void Queue::maybe_stopped() {
  if (!stopping_ || !loop_ended_ || in_flight_ > 0 || stop_waiter_ == nullptr) return;
  if (batch_ > 0) publish();
  std::exchange(stop_waiter_, nullptr)->wake();
}

Task<Status> Queue::move(Reactor& to) {
  if (owner_ == nullptr || owner_ == &to) co_return Status{};
  co_await stop();
  Start again;
  again.ring = ring_;
  again.ring.next_avail = vq_.next_avail();
  again.ring.next_used = vq_.next_used();
  again.memory = memory_;
  again.log = std::move(log_);
  again.kick = std::exchange(kick_fd_, -1);
  again.call = std::exchange(call_fd_, -1);
  co_return co_await start(to, std::move(again));
}

Task<void> Queue::set_call(int fd) {
  if (owner_ == nullptr) {
    if (fd >= 0) ::close(fd);
    co_return;
  }
  co_await RunOn(*owner_, [this, fd] {
    if (call_fd_ >= 0) ::close(call_fd_);
    call_fd_ = fd;
    look_at_call();
    call();  // what the old descriptor was told may have been lost with it
  });
}

void Queue::broke() {
  if (broken_told_) return;
  broken_told_ = true;
  if (on_broken) on_broken(*this);
}

// ---- the way of a request ------------------------------------------------------------------------------------

bool Queue::poll() {
  if (vq_.broken()) {
    active_ = false;
    owner_->remove_poller(this);
    return false;
  }
  in_poll_ = true;
  unsigned n = 0;
  for (; n < kPollBudget; ++n) {
    const auto popped = vq_.pop(chain_);
    if (popped == Virtqueue::Pop::kEmpty) break;
    if (popped == Virtqueue::Pop::kBroken) {
      broke();
      break;
    }
    if (!ring_.packed) {
      if (busy_[chain_.id]) {
        vq_.mark_broken("descriptor is already in flight", chain_.id);
        broke();
        break;
      }
      busy_[chain_.id] = 1;
    }
    take(log_.mark(vq_, chain_.id));
    if (batch_ >= kPublishBatch) publish();
  }
  while (ahead_count_ > 0) submit_oldest();
  in_poll_ = false;
  if (batch_ > 0) {
    publish();
    return true;
  }
  return n > 0;
}

void Queue::take(uint16_t token) {
  if (!ring_.packed) busy_[chain_.id] = 1;
  ++in_flight_;
  if (chain_.blocking) [[unlikely]] {
    through_bounce(this, token).handle.resume();
    return;
  }
  BlkRequest parsed;
  virtio::parse_blk(chain_, parsed);
  if (parsed.status == nullptr) [[unlikely]] {
    LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: queue {}: a request without a reachable status byte",
                device_.name, index_);
    bump(stats_.errors);
    complete(token, chain_.id, chain_.slots, 0);
    return;
  }
  Request* r = get_request(parsed, token);
  if (!in_poll_) {
    submit(r);
    return;
  }
  const uint64_t size = volume_->size();
  if ((r->op == BlkOp::kRead || r->op == BlkOp::kWrite) && r->length <= size && r->offset <= size - r->length)
    volume_->expect(context(), r->offset, r->length, r->op == BlkOp::kWrite);
  r->next = nullptr;
  (ahead_count_++ == 0 ? ahead_ : ahead_last_->next) = r;
  ahead_last_ = r;
  if (ahead_count_ > kAhead) submit_oldest();
}

void Queue::submit_oldest() {
  Request* r = ahead_;
  ahead_ = r->next;
  --ahead_count_;
  submit(r);
}

Queue::Request* Queue::get_request(const BlkRequest& parsed, uint16_t token) {
  Request* r = free_;
  if (r != nullptr) [[likely]] {
    free_ = r->next;
  } else {
    r = new Request;
    ++requests_made_;
  }
  r->status = parsed.status;
  r->offset = parsed.offset;
  r->length = parsed.length;
  r->token = token;
  r->id = chain_.id;
  r->slots = chain_.slots;
  r->op = parsed.op;
  r->pieces = parsed.data_count;
  iovec* to = r->inline_iov;
  if (parsed.data_count > std::size(r->inline_iov))
    to = r->heap = static_cast<iovec*>(frame_alloc(parsed.data_count * sizeof(iovec)));
  for (uint32_t i = 0; i < parsed.data_count; ++i) to[i] = parsed.data[i];
  return r;
}

void Queue::put_request(Request* r) {
  if (r->heap != nullptr) {
    frame_free(r->heap, r->pieces * sizeof(iovec));
    r->heap = nullptr;
  }
  r->next = free_;
  free_ = r;
}

void Queue::submit(Request* r) {
  switch (r->op) {
    case BlkOp::kRead:
    case BlkOp::kWrite: read_or_write(r); return;
    case BlkOp::kFlush: {
      bump(stats_.flushes);
      Task<Status> t = volume_->flush(context());
      if (t.is_ready()) done(r, take_ready(t));
      else finish(this, r, std::move(t)).handle.resume();
      return;
    }
    case BlkOp::kDiscard:
    case BlkOp::kWriteZeroes:
      bump(stats_.discards);
      finish(this, r, ranges(r)).handle.resume();
      return;
    case BlkOp::kGetId: get_id(r); return;
    case BlkOp::kUnknown: answer(r, BlkStatus::kUnsupported, 1); return;
    case BlkOp::kBad: answer(r, BlkStatus::kIoError, 1); return;
  }
}

void Queue::read_or_write(Request* r) {
  const bool write = r->op == BlkOp::kWrite;
  const uint64_t size = volume_->size();
  if (((r->offset | r->length) & block_mask_) != 0 || r->offset > size || r->length > size - r->offset ||
      (write && device_.read_only)) [[unlikely]] {
    answer(r, BlkStatus::kIoError, 1);
    return;
  }
  bump(write ? stats_.writes : stats_.reads);
  bump(write ? stats_.write_bytes : stats_.read_bytes, r->length);
  Task<Status> t = r->length <= kMaxPiece ? transfer(r, r->offset, r->iov()) : in_pieces(r);
  if (t.is_ready()) done(r, take_ready(t));
  else finish(this, r, std::move(t)).handle.resume();
}

Task<Status> Queue::transfer(Request* r, uint64_t offset, Iov iov) {
  return r->op == BlkOp::kWrite ? volume_->write(context(), offset, iov) : volume_->read(context(), offset, iov);
}

// A guest may ask for gigabytes with one request (a thousand descriptors of the same page): neither does it keep the
// reactor from other queues nor take buffers for all of it at once.
Task<Status> Queue::in_pieces(Request* r) {
  struct Yield {
    Reactor& reactor;
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const { reactor.schedule(h); }
    void await_resume() const noexcept {}
  };
  for (uint64_t at = 0; at < r->length; at += kMaxPiece) {
    const uint64_t now = std::min(kMaxPiece, r->length - at);
    const IovSlice piece(r->iov(), at, now);
    Status s = co_await transfer(r, r->offset + at, piece);
    if (!s) co_return s;
    co_await Yield{*owner_};
  }
  co_return Status{};
}

void Queue::get_id(Request* r) {
  char id[virtio::kBlkIdBytes] = {};
  std::memcpy(id, device_.name.data(), std::min(device_.name.size(), sizeof id));
  const size_t n = copy_to_iov(r->iov(), 0, id, std::min<uint64_t>(sizeof id, r->length));
  answer(r, BlkStatus::kOk, static_cast<uint32_t>(n + 1));
}

detail::Detached Queue::finish(Queue* q, Request* r, Task<Status> task) {
  Status s = co_await task;
  q->done(r, s);
}

// Discard and write zeroes: one range after the other, the first error ends it.
Task<Status> Queue::ranges(Request* r) {
  std::array<virtio::BlkRange, virtio::kBlkMaxRanges> list;
  BlkRequest parsed;
  parsed.op = r->op;
  parsed.length = r->length;
  parsed.data = r->iov().data();
  parsed.data_count = r->pieces;
  unsigned count = 0;
  BlkStatus refusal;
  if (!virtio::parse_blk_ranges(parsed, list, &count, &refusal))
    co_return fail(refusal == BlkStatus::kUnsupported ? ErrorKind::kUnsupported : ErrorKind::kInvalid);
  for (unsigned i = 0; i < count; ++i) {
    Status s = volume_->check_range(list[i].offset, list[i].length, true);
    if (s && device_.read_only) s = fail(ErrorKind::kReadOnly);
    if (!s) co_return s;
  }
  const IoContext ctx = context();
  for (unsigned i = 0; i < count; ++i) {
    const virtio::BlkRange& range = list[i];
    if (r->op == BlkOp::kDiscard) {
      Status s = co_await volume_->discard(ctx, range.offset, range.length);
      if (!s) co_return s;
    } else {
      Status s = co_await volume_->write_zeroes(ctx, range.offset, range.length, range.unmap);
      if (!s) co_return s;
    }
  }
  co_return Status{};
}

// A request with buffers in memory that may fault on a file we serve ourselves: its bytes are copied by a blocking worker,
// the I/O runs on memory of our own, and this reactor never touches the guest's.
detail::Detached Queue::through_bounce(Queue* q, uint16_t token) {
  auto guest = std::make_unique<virtio::Chain>(q->chain_);
  const uint16_t id = guest->id, slots = guest->slots;
  BlockingPool* pool = q->device_.blocking;
  uint32_t written = 0;
  co_await q->bouncing_.lock();  // one at a time: bounds the memory and the workers that a guest can hold
  AlignedBuffer in, out;
  if (pool != nullptr && !guest->outside && guest->readable_bytes + guest->writable_bytes <= kMaxBounce &&
      guest->writable_bytes > 0) {
    in = AlignedBuffer(std::max<uint64_t>(guest->readable_bytes, 1));
    out = AlignedBuffer(guest->writable_bytes);
  }
  if (in && out) {
    virtio::Chain* g = guest.get();
    co_await pool->run([g, &in] { copy_from_iov(in.data(), g->in(), 0, g->readable_bytes); });
    virtio::Chain own;
    own.clear();
    own.readable_bytes = g->readable_bytes;
    own.writable_bytes = g->writable_bytes;
    own.iov[0] = {in.data(), g->readable_bytes};
    own.iov[1] = {out.data(), g->writable_bytes};
    own.readable = 1;
    own.count = 2;
    BlkRequest parsed;
    virtio::parse_blk(own, parsed);
    Request r;
    r.op = parsed.op;
    r.length = parsed.length;
    r.pieces = parsed.data_count;
    r.inline_iov[0] = parsed.data_count > 0 ? parsed.data[0] : iovec{};
    Status s = fail(ErrorKind::kInvalid);
    switch (parsed.op) {
      case BlkOp::kRead:
      case BlkOp::kWrite: {
        const bool write = parsed.op == BlkOp::kWrite;
        s = q->volume_->check_range(parsed.offset, parsed.length, write);
        if (s && write && q->device_.read_only) s = fail(ErrorKind::kReadOnly);
        if (!s) break;
        if (write) s = co_await q->volume_->write(q->context(), parsed.offset, r.iov());
        else s = co_await q->volume_->read(q->context(), parsed.offset, r.iov());
        break;
      }
      case BlkOp::kFlush: s = co_await q->volume_->flush(q->context()); break;
      case BlkOp::kDiscard:
      case BlkOp::kWriteZeroes: s = co_await q->ranges(&r); break;
      case BlkOp::kGetId: {
        const std::string& name = q->device_.name;
        std::memset(out.data(), 0, g->writable_bytes);
        std::memcpy(out.data(), name.data(),
                    std::min<size_t>({name.size(), virtio::kBlkIdBytes, g->writable_bytes - 1}));
        s = Status{};
        break;
      }
      case BlkOp::kUnknown: s = fail(ErrorKind::kUnsupported); break;
      case BlkOp::kBad: break;
    }
    if (!s) bump(q->stats_.errors);
    const bool data_back = s && (parsed.op == BlkOp::kRead || parsed.op == BlkOp::kGetId);
    const auto status = s ? BlkStatus::kOk
                          : s.error().kind() == ErrorKind::kUnsupported ? BlkStatus::kUnsupported
                                                                        : BlkStatus::kIoError;
    std::memset(out.data() + (g->writable_bytes - 1), static_cast<int>(status), 1);
    co_await pool->run([g, &out, data_back] {
      const uint64_t skip = data_back ? 0 : g->writable_bytes - 1;
      copy_to_iov(g->out(), skip, out.data() + skip, g->writable_bytes - skip);
    });
    written = data_back ? static_cast<uint32_t>(g->writable_bytes) : 1;
  } else {
    LOG_LIMITED(LogLevel::kWarn, "vhost-user",
                "{}: queue {}: a request with buffers outside of guest RAM is refused", q->device_.name,
                q->index_);
    bump(q->stats_.errors);
  }
  q->bouncing_.unlock();  // before complete: with the last answer the queue may go
  q->complete(token, id, slots, written);
}

void Queue::done(Request* r, const Status& s) {
  if (s) [[likely]] {
    answer(r, BlkStatus::kOk, r->op == BlkOp::kRead ? static_cast<uint32_t>(r->length + 1) : 1);
    return;
  }
  LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: queue {}: request at {} failed: {}", device_.name, index_,
              r->offset, s.error().message());
  answer(r, s.error().kind() == ErrorKind::kUnsupported ? BlkStatus::kUnsupported : BlkStatus::kIoError, 1);
}

void Queue::answer(Request* r, BlkStatus status, uint32_t written) {
  if (status != BlkStatus::kOk) bump(stats_.errors);
  *reinterpret_cast<volatile uint8_t*>(r->status) = static_cast<uint8_t>(status);
  complete(r->token, r->id, r->slots, written);
  put_request(r);
}

void Queue::complete(uint16_t token, uint16_t id, uint16_t slots, uint32_t written) {
  vq_.push(id, slots, written);
  batch_tokens_[batch_++] = token;
  if (!ring_.packed) busy_[id] = 0;
  --in_flight_;
  if (in_poll_) return;       // poll publishes
  if (stopping_) maybe_stopped();
  else activate();            // publishes in this round
}

void Queue::publish() {
  const std::span<const uint16_t> tokens(batch_tokens_.data(), batch_);
  log_.before_publish(tokens, vq_);
  const bool wanted = vq_.publish();
  log_.after_publish(tokens, vq_);
  batch_ = 0;
  if (wanted) call();
}

void Queue::look_at_call() {
  call_may_block_ = call_fd_ >= 0 && (::fcntl(call_fd_, F_GETFL) & O_NONBLOCK) == 0;
}

void Queue::call() {
  if (call_fd_ < 0) return;
  if (call_may_block_) {
    // If the counter is at its limit (a hostile front-end's doing) it is signalled already.
    pollfd p{call_fd_, POLLOUT, 0};
    if (::poll(&p, 1, 0) != 1 || (p.revents & POLLOUT) == 0) return;
  }
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(call_fd_, &one, sizeof one);
  bump(stats_.calls);
}

}  // namespace spillway::vhost
