// Queue: one virtqueue of a vhost-user-blk device, with its requests. Everything of one queue is together in its own
// cache lines (B1), and one reactor owns it.
//
// States: stopped (owned by the control reactor) -> running (owned by the reactor given to start) -> draining (stop was
// asked for, requests in flight) -> stopped. Ownership passes with a reactor message, which orders memory; no lock.
// While running: active = a registered poller, kicks off; asleep = kicks on and a poll of the kick descriptor in the
// kernel. A completion or a kick makes it active; the reactor's wish to sleep (Poller) puts it to sleep.
//
// Way of a request: pop -> mark in the in-flight log -> parse -> Volume -> status byte, used element -> publish in batches,
// at most one call per batch. A Volume that answers at once costs no coroutine and no allocation.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "src/export/export.h"
#include "src/export/vhost_user/inflight.h"
#include "src/io/reactor.h"
#include "src/io/sync.h"
#include "src/virtio/blk.h"
#include "src/virtio/virtqueue.h"

namespace spillway::vhost {

// What all queues of an export share. Read-mostly: written before the queues start, `write_through` at any time.
struct Device {
  std::string name;
  VolumePtr volume;
  GroupId group = GroupId::kRoot;
  bool read_only = false;
  BlockingPool* blocking = nullptr;
  std::atomic<bool> write_through{false};
};

// Counters of one queue: written by its owner only (plain stores), read by anyone.
struct QueueStats {
  std::atomic<uint64_t> reads{0}, writes{0}, flushes{0}, discards{0};
  std::atomic<uint64_t> read_bytes{0}, write_bytes{0}, errors{0};
  std::atomic<uint64_t> kicks{0}, calls{0};
};

class alignas(64) Queue final : public Poller {
 public:
  struct Start {
    virtio::RingConfig ring;
    const virtio::GuestMemory* memory = nullptr;  // must outlive the run
    InflightLog log;
    std::vector<InflightLog::Left> left;          // to be resubmitted
    int kick = -1;                                // own duplicates: the queue closes them
    int call = -1;
    bool call_first = false;                      // a predecessor may have published without calling
  };

  // `on_broken` is called on the queue's reactor, once per run, when the driver broke a rule.
  Queue(Device& device, uint16_t index);
  ~Queue() override;
  Queue(const Queue&) = delete;

  // From the control reactor, when stopped.
  Task<Status> start(Reactor& owner, Start start);
  // From the control reactor. Waits until nothing is in flight; all answers are published. No-op when stopped.
  Task<void> stop();
  // From the control reactor: another owner, with everything else unchanged. Nothing is lost: drained, moved, resumed.
  Task<Status> move(Reactor& to);
  // From the control reactor: swaps the call descriptor (takes over `fd`, -1 = none) without draining.
  Task<void> set_call(int fd);
  bool running() const { return owner_ != nullptr; }
  Reactor* owner() const { return owner_; }
  // When stopped after a run: where a front-end goes on.
  uint16_t next_avail() const { return vq_.next_avail(); }
  uint16_t next_used() const { return vq_.next_used(); }
  InflightLog& log() { return log_; }

  // Set by the export before any start; run on the queue's reactor.
  std::function<void(Queue&)> on_broken;
  std::string broken_reason() const { return vq_.reason(); }
  uint16_t index() const { return index_; }
  const QueueStats& stats() const { return stats_; }
  // Bytes of this object and the requests it has made, for reports.
  uint64_t memory_bytes() const { return sizeof *this + requests_made_ * sizeof(Request); }

  bool poll() override;
  bool prepare_sleep() override;
  void expect_work() override { activate(); }

 private:
  struct Request {
    Request* next = nullptr;
    std::byte* status = nullptr;
    uint64_t offset = 0;
    uint64_t length = 0;
    uint16_t token = 0;
    uint16_t id = 0;
    uint16_t slots = 0;
    virtio::BlkOp op = virtio::BlkOp::kBad;
    uint32_t pieces = 0;
    iovec* heap = nullptr;  // more pieces than `inline_iov` holds
    iovec inline_iov[4];
    Iov iov() const { return {heap != nullptr ? heap : inline_iov, pieces}; }
  };
  struct KickWait;

  detail::Detached kick_loop();
  void activate();
  void begin(Start start);   // on the owner
  void begin_stop(Waiter* waiter);
  void maybe_stopped();
  void broke();

  void take(uint16_t token);
  Request* get_request(const virtio::BlkRequest& parsed, uint16_t token);
  void put_request(Request* r);
  void submit(Request* r);
  void submit_oldest();
  void read_or_write(Request* r);
  void get_id(Request* r);
  static detail::Detached finish(Queue* q, Request* r, Task<Status> task);
  Task<Status> transfer(Request* r, uint64_t offset, Iov iov);
  Task<Status> in_pieces(Request* r);
  Task<Status> ranges(Request* r);
  static detail::Detached through_bounce(Queue* q, uint16_t token);
  void done(Request* r, const Status& s);
  void answer(Request* r, virtio::BlkStatus status, uint32_t written);
  void complete(uint16_t token, uint16_t id, uint16_t slots, uint32_t written);
  void publish();
  void call();
  void look_at_call();
  IoContext context() const {
    return {device_.group, IoClass::kForeground, device_.write_through.load(std::memory_order_relaxed)};
  }

  // Hot: the owner's.
  Device& device_;
  Volume* volume_;
  Reactor* owner_ = nullptr;
  Request* free_ = nullptr;
  Request* ahead_ = nullptr;  // read and not submitted yet, oldest first; empty outside of poll
  Request* ahead_last_ = nullptr;
  uint32_t ahead_count_ = 0;
  uint64_t block_mask_ = 511;
  uint32_t in_flight_ = 0;
  uint32_t batch_ = 0;
  bool active_ = false;
  bool stopping_ = false;
  bool loop_ended_ = true;
  bool broken_told_ = false;
  bool in_poll_ = false;
  bool kick_outstanding_ = false;
  bool call_may_block_ = true;
  uint16_t index_;
  int kick_fd_ = -1;
  int call_fd_ = -1;
  InflightLog log_;
  virtio::Virtqueue vq_;
  std::vector<uint8_t> busy_;        // split: heads outstanding
  std::vector<uint16_t> batch_tokens_;
  IoOp kick_op_{};
  std::coroutine_handle<> kick_waiter_;
  Waiter* stop_waiter_ = nullptr;
  uint64_t requests_made_ = 0;
  AsyncMutex bouncing_;
  const virtio::GuestMemory* memory_ = nullptr;
  virtio::RingConfig ring_;
  alignas(64) QueueStats stats_;
  alignas(64) virtio::Chain chain_;
};

// Runs fn on `target` and resumes the awaiter on its own reactor; inline when it is the same one.
template <class Fn>
struct [[nodiscard]] RunOn : Waiter {
  RunOn(Reactor& t, Fn f) : target(t), fn(std::move(f)) {}
  bool await_ready() {
    if (Reactor::current_or_null() != &target) return false;
    fn();
    return true;
  }
  void await_suspend(std::coroutine_handle<> h) {
    handle = h;
    reactor = &Reactor::current();
    run = [](Message* m) {
      auto* self = static_cast<RunOn*>(static_cast<Waiter*>(m));
      self->fn();
      self->wake();
    };
    target.post(static_cast<Message*>(this));
  }
  void await_resume() const noexcept {}
  Reactor& target;
  Fn fn;
};

}  // namespace spillway::vhost
