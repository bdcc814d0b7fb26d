#include "src/qos/qos.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <utility>

#include <fmt/core.h>

#include "src/io/reactor.h"
#include "src/io/sync.h"
#include "src/qos/depth.h"
#include "src/qos/gate.h"

namespace spillway {
namespace {

constexpr uint64_t kWindowNs = 20'000'000;       // least length of a window (depth, model)
constexpr uint64_t kWindowMaxNs = 8'000'000'000;  // a window that has not enough completions by then is dropped
constexpr uint64_t kWindowCompletions = 64;
// In the device on average, and a window still teaches: part of the knee, or this many where the knee is deep.
constexpr double kDeepPart = 0.45, kDeepEnough = 24;
constexpr double kIdleAllowed = 0.03;            // of a window, and it still counts as saturated
constexpr uint32_t kArbiterRounds = 64;          // looks for others' work before the holder goes on with its own
constexpr uint64_t kCapLookNs = 100'000'000;     // while a cap delays someone: how soon a change of caps is seen
constexpr uint32_t kOwnWeight = 100;             // a group's own requests beside its read-ahead and its children

// A group's place in arrays: background work first, then for each group its own part and its read-ahead.
constexpr uint32_t kFirstGroupSlot = 4;
constexpr uint32_t kSlots = kFirstGroupSlot + 2 * QosDomain::kMaxGroups;
constexpr uint32_t kCellChunk = 32;
constexpr uint32_t kNobody = kSlots, kSeveral = kSlots + 1;  // instead of the slot of a lone owner
constexpr uint32_t kReactorChunk = 64, kReactorChunks = 1024;

using Counter = std::atomic<uint64_t>;
// One writer: its reactor. Readers are statistics: no order needed.
void bump(Counter& c, uint64_t by = 1) { c.store(c.load(std::memory_order_relaxed) + by, std::memory_order_relaxed); }
uint64_t get(const Counter& c) { return c.load(std::memory_order_relaxed); }

uint32_t slot_of(const IoContext& ctx) {
  const auto group = static_cast<uint32_t>(ctx.group);
  const uint32_t own = kFirstGroupSlot + 2 * (group < QosDomain::kMaxGroups ? group : 0);
  switch (ctx.io_class) {
    case IoClass::kRebuild: return static_cast<uint32_t>(Background::kRebuild);
    case IoClass::kScrub: return static_cast<uint32_t>(Background::kScrub);
    case IoClass::kWriteback:
      return ctx.group == GroupId::kRoot ? static_cast<uint32_t>(Background::kWriteback) : own;
    case IoClass::kReadAhead: return own + 1;
    case IoClass::kForeground:
    case IoClass::kMetadata: break;
  }
  return own;
}
QosOwner owner_of(uint32_t slot) {
  if (slot < kFirstGroupSlot)
    return {GroupId::kRoot, QosOwner::Part::kBackground, static_cast<Background>(slot)};
  const uint32_t s = slot - kFirstGroupSlot;
  return {GroupId{s / 2}, s % 2 == 0 ? QosOwner::Part::kOwn : QosOwner::Part::kReadAhead, Background::kRebuild};
}

class Qos;

// One owner's counters on one reactor; on cache lines of its own.
struct alignas(64) Cell {
  uint32_t slot = 0;
  // The reactor's own:
  uint64_t generation = 0;  // of the domain, when `capped` was looked up
  bool capped = false;
  uint64_t stream_ends[2][4] = {};  // reads, writes: where sequential streams would go on
  uint32_t next_stream = 0;
  // Read by anyone:
  Counter ios[kIoKinds] = {};
  Counter read_bytes{0}, written_bytes{0}, cost_ns{0}, queue_ns{0}, device_ns{0}, queued{0}, started{0}, units{0};
  LatencyHistogram latency;

  bool continues(bool write, uint64_t offset, uint64_t bytes) {
    auto& ends = stream_ends[write ? 1 : 0];
    for (uint64_t& end : ends)
      if (end == offset && offset != 0) {
        end = offset + bytes;
        return true;
      }
    ends[next_stream++ % 4] = offset + bytes;
    return false;
  }
};

struct CellChunk {
  std::array<std::atomic<Cell*>, kCellChunk> cells{};
  ~CellChunk() {
    for (auto& c : cells) delete c.load(std::memory_order_relaxed);
  }
};

// At the end of a reactor's round, when its completions have all been seen and their clients have had the occasion to bring
// the next request, what changed is published and slots are given out. Given out before, they would go to others, because
// the queue of a group that needs most of its requests in flight is empty just then. Nothing is lost by waiting: what is
// handed out goes to the kernel at the end of the round in any case. The reactor's own.
class RoundEnd final : public Poller {
 public:
  // Keeps the scheduler until nothing of the reactor's is outstanding at an end of a round.
  void arm(Qos& qos, Reactor& reactor);
  bool poll() override;
  bool prepare_sleep() override { return true; }  // polled in the round it was armed in, or the next: never sleeps armed

 private:
  bool armed_ = false;
  std::shared_ptr<Qos> keep_;
};

struct alignas(64) PerReactor {
  RoundEnd round_end;
  Gate<>::Local gate;
  uint64_t outstanding = 0;  // in gated()
  std::array<std::atomic<CellChunk*>, kSlots / kCellChunk + 1> chunks{};
  // Completed since ever, for the windows:
  Counter cost_ns[kIoKinds][kSizeClasses] = {};
  Counter completions{0}, device_ns{0};
  Counter slow_ns[2] = {}, slow_count[2] = {};  // flush, other: device time by the requests that shared the device
  // Any thread.
  template <class Fn>
  void for_each_cell(Fn fn) const {
    for (auto& at : chunks)
      if (const CellChunk* chunk = at.load(std::memory_order_acquire))
        for (auto& entry : chunk->cells)
          if (const Cell* c = entry.load(std::memory_order_acquire)) fn(*c);
  }
  ~PerReactor() {
    for (auto& c : chunks) delete c.load(std::memory_order_relaxed);
  }
};

struct ReactorChunk {
  std::array<std::atomic<PerReactor*>, kReactorChunk> reactors{};
  ~ReactorChunk() {
    for (auto& r : reactors) delete r.load(std::memory_order_relaxed);
  }
};

// What of a request is needed until it ends; in its coroutine's frame.
struct Meta {
  PerReactor* totals = nullptr;
  Cell* cell = nullptr;
  uint64_t cost = 0;
  uint64_t bytes = 0;
  IoKind kind = IoKind::kOther;
  uint32_t units = 1;  // what it takes of the depth
  uint8_t cls = 0;
  bool is_write = false;
};

// Sums over all reactors.
struct Totals {
  uint64_t cost[kIoKinds][kSizeClasses] = {};
  uint64_t completions = 0, device_ns = 0;
  uint64_t slow_ns[2] = {}, slow_count[2] = {};
  void add(const PerReactor& r) {
    for (size_t k = 0; k < kIoKinds; ++k)
      for (size_t c = 0; c < kSizeClasses; ++c) cost[k][c] += get(r.cost_ns[k][c]);
    completions += get(r.completions);
    device_ns += get(r.device_ns);
    for (int i = 0; i < 2; ++i) slow_ns[i] += get(r.slow_ns[i]), slow_count[i] += get(r.slow_count[i]);
  }
};

// The clock the counters are kept in; the control thread, which has no reactor, reads the same real one.
uint64_t clock_now_ns() {
  if (const Reactor* r = Reactor::current_or_null()) return r->now_ns();
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(ts.tv_nsec);
}

class Qos final : public QosVolume, public std::enable_shared_from_this<Qos> {
 public:
  Qos(VolumePtr leaf, QosOptions options, std::shared_ptr<QosDomain> domain)
      : QosVolume(leaf->name(), leaf->size(), leaf->geometry()),
        leaf_(std::move(leaf)),
        options_(options),
        domain_(std::move(domain)),
        costs_(options.model),
        control_(options.depth != 0 ? options.depth : options.model.depth, options.depth_min, options.depth_max,
                 options.model.calibrated ? static_cast<uint32_t>(options.model.depth * QosModel::kDepthFloor) : 0) {
    depth_.store(control_.depth(), std::memory_order_relaxed);
    knee_.store(control_.knee(), std::memory_order_relaxed);
    leaves_.resize(kSlots, nullptr);
    listener_ = leaf_->add_resize_listener([this](uint64_t size) { set_size(size); });
  }
  ~Qos() override {
    leaf_->remove_resize_listener(listener_);
    for (auto& c : reactors_) delete c.load(std::memory_order_relaxed);
  }

  std::string_view layer() const override { return "qos"; }
  std::vector<VolumePtr> members() const override { return {leaf_}; }
  std::string to_text() const override;
  QosSample sample() const override;
  QosModel model() const override;
  std::shared_ptr<QosDomain> domain() const override { return domain_; }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    const uint64_t bytes = iov_length(iov);
    return pass(leaf_->read(ctx, offset, iov), transfer(ctx, offset, bytes, false));
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    const uint64_t bytes = iov_length(iov);
    return pass(leaf_->write(ctx, offset, iov), transfer(ctx, offset, bytes, true));
  }
  Task<Status> do_flush(IoContext ctx) override { return pass(leaf_->flush(ctx), other(ctx, IoKind::kFlush, 0)); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return pass(leaf_->discard(ctx, offset, length), other(ctx, IoKind::kOther, 0));
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) override {
    return pass(leaf_->write_zeroes(ctx, offset, length, may_unmap), other(ctx, IoKind::kOther, length));
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override {
    return leaf_->block_status(offset, length);
  }
  Task<Status> do_resize(uint64_t new_size) override { return leaf_->resize(new_size); }

 private:
  // A request that waits; in its coroutine's frame.
  struct Queued : Waiter, SfqItem, GateNode {
    Queued(Qos& q, const Meta& m, uint64_t arrived) : qos(q), meta(m), begun(arrived) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      reactor = &Reactor::current();
      cost = meta.cost;
      bytes = meta.bytes;
      is_write = meta.is_write;
      home = reactor->index();
      qos.gate_.queue(meta.totals->gate, this);
      meta.totals->round_end.arm(qos, *reactor);
    }
    void await_resume() const noexcept {}
    Qos& qos;
    const Meta& meta;
    uint64_t begun;  // arrival, then when its turn came
  };

  // ---- the way of a request ----------------------------------------------------------------------------------------

  Meta transfer(const IoContext& ctx, uint64_t offset, uint64_t bytes, bool write) {
    Meta m = begin(ctx);
    const bool sequential = m.cell->continues(write, offset, bytes);
    m.kind = write ? (sequential ? IoKind::kWriteSequential : IoKind::kWriteRandom)
                   : (sequential ? IoKind::kReadSequential : IoKind::kReadRandom);
    m.bytes = bytes;
    m.is_write = write;
    m.cls = static_cast<uint8_t>(size_class(bytes));
    m.cost = costs_.cost(m.kind, m.cls, bytes);
    if (m.cls > 0 && !alone()) m.units = units_of(write ? IoKind::kWriteRandom : IoKind::kReadRandom, m.cls, bytes);
    return m;
  }
  // Depth is counted in small requests: of large ones fewer are needed to fill the device (model.h), and while one is
  // served many small ones could be. A quarter of the depth at most, so that four fit in any case.
  uint32_t units_of(IoKind random, size_t cls, uint64_t bytes) const {
    const auto small = static_cast<double>(costs_.cost(random, 0, 4096));
    const double by_cost = static_cast<double>(costs_.cost(random, cls, bytes)) / small;
    const double most = std::max(1.0, depth_.load(std::memory_order_relaxed) / 4.0);
    return static_cast<uint32_t>(std::clamp(1 + (by_cost - 1) * options_.model.unit_part + 0.5, 1.0, most));
  }
  Meta other(const IoContext& ctx, IoKind kind, uint64_t bytes) {
    Meta m = begin(ctx);
    m.kind = kind;
    m.bytes = bytes;
    m.is_write = true;
    m.cost = costs_.cost(kind, 0, 0);
    return m;
  }
  Meta begin(const IoContext& ctx) {
    Meta m;
    m.totals = &per_reactor(Reactor::current().index());
    m.cell = &cell(*m.totals, slot_of(ctx));
    if (const uint64_t g = domain_->generation(); m.cell->generation != g) [[unlikely]] look_up_caps(*m.cell, g);
    if (lone_.load(std::memory_order_relaxed) != m.cell->slot) [[unlikely]] not_alone(m.cell->slot);
    return m;
  }

  // While one owner has the disk to itself there is nobody to protect, and what is measured then is what it has alone:
  // depth counts its requests one by one. A second one ends that with its first request.
  void not_alone(uint32_t slot) {
    uint32_t nobody = kNobody;
    if (!lone_.compare_exchange_strong(nobody, slot, std::memory_order_relaxed) && nobody != slot)
      if (nobody != kSeveral) lone_.store(kSeveral, std::memory_order_relaxed);
  }
  bool alone() const { return lone_.load(std::memory_order_relaxed) < kSlots; }

  // The leaf's task has not begun to run, unless it is ready: then there is nothing to wait for (and nothing that
  // competes for the device), only to count.
  Task<Status> pass(Task<Status> inner, const Meta& m) {
    if (inner.is_ready() && !m.cell->capped) {
      bump(m.cell->started);
      count(m, 0, 0);
      return inner;
    }
    return gated(std::move(inner), m);
  }

  Task<Status> gated(Task<Status> inner, Meta m) {
    Reactor& reactor = Reactor::current();
    const uint64_t arrived = reactor.now_ns();
    uint64_t begun = arrived;
    bump(m.cell->started);
    ++m.totals->outstanding;
    if (m.cell->capped || !gate_.take(m.totals->gate, m.units, depth_.load(std::memory_order_relaxed))) {
      bump(m.cell->queued);
      Queued queued(*this, m, arrived);
      co_await queued;
      begun = std::max(arrived, queued.begun);
    }
    Status status = co_await inner;
    const uint64_t now = reactor.now_ns();
    if (m.kind >= IoKind::kFlush) count_slow(m, now - begun);
    count(m, begun - arrived, now - begun);
    --m.totals->outstanding;
    gate_.give_back(m.totals->gate, m.units);
    m.totals->round_end.arm(*this, reactor);
    co_return status;
  }

  void count(const Meta& m, uint64_t queue_ns, uint64_t device_ns) {
    Cell& c = *m.cell;
    bump(c.ios[static_cast<size_t>(m.kind)]);
    if (m.kind < IoKind::kFlush) bump(m.is_write ? c.written_bytes : c.read_bytes, m.bytes);
    bump(c.cost_ns, m.cost);
    bump(c.units, m.units);
    bump(c.queue_ns, queue_ns);
    bump(c.device_ns, device_ns);
    c.latency.add(queue_ns + device_ns);
    bump(m.totals->cost_ns[static_cast<size_t>(m.kind)][m.cls], m.cost);
    bump(m.totals->completions);
    bump(m.totals->device_ns, device_ns);
  }
  void count_slow(const Meta& m, uint64_t device_ns) {
    const int i = m.kind == IoKind::kFlush ? 0 : 1;
    const uint64_t sharing = std::max<uint64_t>(1, gate_.in_device(gate_.slots()));
    bump(m.totals->slow_ns[i], device_ns / sharing);
    bump(m.totals->slow_count[i]);
  }

  // ---- the arbiter -------------------------------------------------------------------------------------------------

  friend class RoundEnd;

  void end_of_round(Reactor& reactor, PerReactor& here) {
    const bool run = gate_.end_of_round(here.gate);
    const uint64_t now = reactor.now_ns();
    // A window must end also while all fits into the device: it may fit too well for shares (depth.h).
    if (run || (now >= window_end_.load(std::memory_order_relaxed) && Gate<>::in_device(gate_.slots()) != 0))
      arbitrate(reactor, now);
  }
  // Runs the arbiter, or leaves the work to whoever is inside.
  void arbitrate(Reactor& reactor, uint64_t now) {
    GateList mine;
    went(gate_.run(kArbiterRounds, [&] { look(reactor, now, &mine); }), reactor, mine);
  }
  void go_on(Reactor& reactor) {
    GateList mine;
    const uint64_t now = reactor.now_ns();
    went(gate_.go_on(kArbiterRounds, [&] { look(reactor, now, &mine); }), reactor, mine);
  }
  void went(Gate<>::Ran ran, Reactor& reactor, GateList& mine) {
    // Others keep bringing work: on with our own, then back to theirs.
    if (ran == Gate<>::Ran::kHeld) reactor.post([self = shared_from_this(), &reactor] { self->go_on(reactor); });
    while (GateNode* n = mine.pop()) static_cast<Queued*>(n)->handle.resume();
  }

  // The arbiter's work.
  void look(Reactor& reactor, uint64_t now, GateList* mine) {
    if (domain_->generation() != generation_) [[unlikely]] refresh(now);
    for (GateNode* n = gate_.take_list(); n != nullptr;) {
      auto* q = static_cast<Queued*>(std::exchange(n, n->next_node));
      tree_.push(leaf_node(q->meta.cell->slot), q, now);
    }
    hand_out(reactor, now, mine);
    if (now >= window_end_.load(std::memory_order_relaxed)) roll_window(now);
  }

  void hand_out(Reactor& reactor, uint64_t now, GateList* mine) {
    const uint32_t depth = depth_.load(std::memory_order_relaxed);
    const uint64_t taken = gate_.taken();
    uint64_t requests = 0, units = 0;
    GateList others;
    bool full = true;
    while (taken + units < depth) {
      SfqItem* item = tree_.pop(now, nullptr, reactor.index());
      if (item == nullptr) {
        full = false;
        break;
      }
      auto* q = static_cast<Queued*>(item);
      q->begun = now;
      ++requests, units += q->meta.units;
      (q->reactor == &reactor ? *mine : others).push(q);
    }
    gate_.hand_over(requests, units);
    while (GateNode* n = others.pop()) static_cast<Queued*>(n)->wake();
    // Not full: what is queued, if anything, is capped.
    if (full && unsaturated_since_ != 0) unsaturated_ns_ += now - std::exchange(unsaturated_since_, 0);
    if (!full && unsaturated_since_ == 0) unsaturated_since_ = std::max<uint64_t>(1, now);
    if (const uint64_t at = tree_.next_ready(); at < armed_.load(std::memory_order_relaxed)) [[unlikely]] {
      // A cap may be lifted meanwhile, and the next request may be far.
      const uint64_t until = std::min(at, now + kCapLookNs);
      armed_.store(until, std::memory_order_relaxed);
      reactor.spawn(cap_timer(shared_from_this(), until));
    }
  }

  static Task<void> cap_timer(std::shared_ptr<Qos> self, uint64_t at) {
    Reactor& reactor = Reactor::current();
    co_await reactor.sleep_until(at);
    self->armed_.store(SfqTree::kNever, std::memory_order_relaxed);
    self->arbitrate(reactor, std::max(at, reactor.now_ns()));
  }

  void roll_window(uint64_t now);
  // An owner that completed requests in the window.
  struct Active {
    uint32_t slot = 0;
    double outstanding = 0;  // requests, on average
    double units = 1;        // of the depth, of its average request
    double stay = 0;         // time in the device by cost
    double cost_ns = 0;      // what it had
  };
  std::vector<Active> active_in_window(uint64_t now);
  struct Fits {
    double in_flight = 0;  // the least q / f of the groups that were active (depth.h); 0 when there is none
    double missed = 0;     // by what part that group's ratio to the others fell short
  };
  Fits in_flight_that_fits(std::vector<Active> active);
  void refresh(uint64_t now);
  SfqTree::Node* group_node(GroupId id);
  SfqTree::Node* leaf_node(uint32_t slot);

  // ---- tables ------------------------------------------------------------------------------------------------------

  PerReactor& per_reactor(uint32_t index);
  Cell& cell(PerReactor& r, uint32_t slot);
  void look_up_caps(Cell& c, uint64_t generation);
  template <class Fn>
  void for_each_reactor(Fn fn) const {
    for (auto& chunk : reactors_)
      if (ReactorChunk* c = chunk.load(std::memory_order_acquire))
        for (auto& r : c->reactors)
          if (PerReactor* p = r.load(std::memory_order_acquire)) fn(*p);
  }

  const VolumePtr leaf_;
  const QosOptions options_;
  const std::shared_ptr<QosDomain> domain_;
  uint64_t listener_ = 0;
  std::array<std::atomic<ReactorChunk*>, kReactorChunks> reactors_{};
  CostTable costs_;

  // Read with every request, written with every window: not where the gate is.
  alignas(64) std::atomic<uint32_t> depth_{0};
  std::atomic<uint32_t> lone_{kNobody};         // who has the disk to itself; a hint, set anew with each window
  std::atomic<uint64_t> window_end_{0};         // written by the arbiter; a hint elsewhere
  alignas(64) Gate<> gate_;

  // The arbiter's:
  alignas(64) SfqTree tree_;
  std::atomic<uint64_t> armed_{SfqTree::kNever};  // when the cap timer fires; a hint, a spare timer is harmless
  DepthControl control_;
  uint64_t generation_ = 0;
  std::shared_ptr<const QosGroups> groups_;
  std::map<GroupId, SfqTree::Node*> group_nodes_;
  std::vector<SfqTree::Node*> leaves_;
  uint64_t window_start_ = 0;
  uint64_t unsaturated_since_ = 1, unsaturated_ns_ = 0;
  Totals at_start_;
  // What a slot had at the window's start, and how many requests it has outstanding on average.
  struct SlotWindow {
    uint64_t cost_ns = 0, device_ns = 0, units = 0, ios = 0;
    double outstanding = 0;
  };
  std::map<uint32_t, SlotWindow> slot_windows_;

  // Published by the arbiter for reports.
  std::atomic<double> speed_{0};
  Counter updates_{0};
  std::atomic<uint32_t> knee_{0};
};

void RoundEnd::arm(Qos& qos, Reactor& reactor) {
  if (armed_) return;
  armed_ = true;
  if (keep_ == nullptr) keep_ = qos.shared_from_this();
  reactor.add_poller(this);
}

bool RoundEnd::poll() {
  Reactor& reactor = Reactor::current();
  Qos& qos = *keep_;
  PerReactor& here = qos.per_reactor(reactor.index());
  armed_ = false;
  reactor.remove_poller(this);
  qos.end_of_round(reactor, here);
  // The last thing: this may end the scheduler, and us with it.
  if (!armed_ && here.outstanding == 0) std::exchange(keep_, nullptr).reset();
  return true;
}

// Sets the depth, corrects the model. A window counts when requests were waiting all through it.
void Qos::roll_window(uint64_t now) {
  Totals t;
  for_each_reactor([&](const PerReactor& r) { t.add(r); });
  const uint64_t elapsed = now - window_start_;
  const uint64_t completions = t.completions - at_start_.completions;
  const bool first = window_end_.load(std::memory_order_relaxed) == 0;
  if (!first && completions < kWindowCompletions && elapsed < kWindowMaxNs) {
    window_end_.store(now + kWindowNs / 4, std::memory_order_relaxed);
    return;
  }
  if (unsaturated_since_ != 0) {
    unsaturated_ns_ += now - std::max(unsaturated_since_, window_start_);
    unsaturated_since_ = now;
  }
  const bool saturated = !first && completions >= kWindowCompletions &&
                         static_cast<double>(unsaturated_ns_) < kIdleAllowed * static_cast<double>(elapsed);
  double predicted[kIoKinds][kSizeClasses], all = 0, base = 0;
  for (size_t k = 0; k < kIoKinds; ++k)
    for (size_t c = 0; c < kSizeClasses; ++c) {
      predicted[k][c] = static_cast<double>(t.cost[k][c] - at_start_.cost[k][c]);
      all += predicted[k][c];
      base += predicted[k][c] / costs_.correction(static_cast<IoKind>(k), c);
    }
  const uint64_t latency = completions == 0 ? 0 : (t.device_ns - at_start_.device_ns) / completions;
  if (completions > 0)
    tree_.set_keep(2 * latency, static_cast<uint64_t>(all / static_cast<double>(completions)) * control_.depth());
  if (saturated) {
    speed_.store(all / static_cast<double>(elapsed), std::memory_order_relaxed);
  }
  const std::vector<Active> active = active_in_window(now);
  // A cost is the inverse of the throughput a kind has alone, so it is learned from windows in which it had as many
  // requests in the device as it then would have: not while large ones are held back for the sake of others.
  const double in_device = static_cast<double>(t.device_ns - at_start_.device_ns) / static_cast<double>(elapsed);
  if (!first && completions >= kWindowCompletions && options_.adapt_cost &&
      in_device >= std::min(kDeepPart * control_.knee(), kDeepEnough) &&
      costs_.learn(predicted, static_cast<double>(elapsed), alone() ? kSizeClasses : 1))
    bump(updates_);
  if (options_.adapt_cost)
    for (int i = 0; i < 2; ++i)
      if (const uint64_t n = t.slow_count[i] - at_start_.slow_count[i]; n > 0)
        costs_.learn_slow(i == 0 ? IoKind::kFlush : IoKind::kOther,
                          static_cast<double>(t.slow_ns[i] - at_start_.slow_ns[i]) / static_cast<double>(n));
  if (active.size() < 2) lone_.store(active.empty() ? kNobody : active[0].slot, std::memory_order_relaxed);
  if (options_.adapt_depth) {
    const Fits fits = in_flight_that_fits(active);
    control_.window(base / static_cast<double>(elapsed), saturated, fits.in_flight, fits.missed);
    depth_.store(control_.depth(), std::memory_order_relaxed);
  }
  knee_.store(control_.knee(), std::memory_order_relaxed);
  at_start_ = t;
  window_start_ = now;
  unsaturated_ns_ = 0;
  window_end_.store(now + std::max(kWindowNs, 8 * latency), std::memory_order_relaxed);
}

std::vector<Qos::Active> Qos::active_in_window(uint64_t now) {
  if (groups_ == nullptr || domain_->generation() != generation_) refresh(now);
  struct Sum {
    uint64_t started = 0, cost_ns = 0, device_ns = 0, units = 0, ios = 0;
  };
  std::map<uint32_t, Sum> sums;
  for_each_reactor([&](const PerReactor& r) {
    r.for_each_cell([&](const Cell& c) {
      Sum& s = sums[c.slot];
      for (auto& n : c.ios) s.ios += get(n);
      s.cost_ns += get(c.cost_ns);
      s.device_ns += get(c.device_ns);
      s.units += get(c.units);
      s.started += get(c.started);
    });
  });
  std::vector<Active> active;
  for (auto& [slot, s] : sums) {
    SlotWindow& w = slot_windows_[slot];
    const uint64_t ios = s.ios - w.ios, cost_ns = s.cost_ns - w.cost_ns, device_ns = s.device_ns - w.device_ns;
    const uint64_t taken = s.units - w.units;
    w.cost_ns = s.cost_ns, w.device_ns = s.device_ns, w.units = s.units, w.ios = s.ios;
    // The counters of other reactors may be a request apart.
    const double q = s.started > s.ios ? static_cast<double>(s.started - s.ios) : 0;
    w.outstanding = w.outstanding == 0 ? q : 0.7 * w.outstanding + 0.3 * q;
    if (ios == 0) {
      w.outstanding = 0;
      continue;
    }
    active.push_back({slot, w.outstanding, static_cast<double>(taken) / static_cast<double>(ios),
                      static_cast<double>(device_ns + 1) / static_cast<double>(cost_ns + 1), static_cast<double>(cost_ns)});
  }
  return active;
}

Qos::Fits Qos::in_flight_that_fits(std::vector<Active> active) {
  Fits least;
  // What a cap holds back does not want its share.
  std::erase_if(active, [&](const Active& a) { return SfqTree::was_capped(leaf_node(a.slot)); });
  if (active.size() < 2) return least;
  std::vector<SfqTree::Node*> nodes;
  for (auto& a : active) nodes.push_back(leaf_node(a.slot));
  const std::vector<double> share = tree_.shares(nodes);
  double all = 0, cost = 0;
  for (auto& a : active) cost += a.cost_ns;
  for (size_t i = 0; i < active.size(); ++i) all += share[i] * active[i].stay * active[i].units;
  for (size_t i = 0; i < active.size(); ++i) {
    const double fits = active[i].outstanding * all / (share[i] * active[i].stay);
    if (fits < control_.knee() / 2.0 || (least.in_flight != 0 && fits >= least.in_flight)) continue;
    const double wanted = share[i] / (1 - share[i]), got = active[i].cost_ns / std::max(1.0, cost - active[i].cost_ns);
    least = {fits, 1 - got / wanted};
  }
  return least;
}

// Takes over what changed in the domain.
void Qos::refresh(uint64_t now) {
  groups_ = domain_->snapshot();
  generation_ = groups_->generation;
  for (auto& [id, node] : group_nodes_) {
    auto it = groups_->groups.find(id);
    if (it == groups_->groups.end()) {  // removed: what is queued drains, what comes counts for the root
      tree_.move(node, tree_.root(), now);
      tree_.set_caps(node, {}, now);
      leaves_[kFirstGroupSlot + 2 * static_cast<uint32_t>(id)] = nullptr;
      leaves_[kFirstGroupSlot + 2 * static_cast<uint32_t>(id) + 1] = nullptr;
    }
  }
  std::erase_if(group_nodes_, [&](auto& g) { return !groups_->groups.contains(g.first); });
  // By way of the root: on the way from one tree to the other two might be below one another.
  for (auto& [id, node] : group_nodes_) {
    auto parent = group_nodes_.find(groups_->groups.at(id).parent);
    const SfqTree::Node* wanted = parent == group_nodes_.end() ? nullptr : parent->second;
    if (SfqTree::parent(node) != wanted) tree_.move(node, tree_.root(), now);
  }
  for (auto& [id, node] : group_nodes_) {
    const QosGroup& g = groups_->groups.at(id);
    tree_.set_weight(node, g.weight);
    tree_.set_caps(node, g.caps, now);
    tree_.move(node, group_node(g.parent), now);
    if (auto* ahead = leaves_[kFirstGroupSlot + 2 * static_cast<uint32_t>(id) + 1])
      tree_.set_weight(ahead, g.read_ahead_weight);
  }
  tree_.set_caps(tree_.root(), groups_->groups.at(GroupId::kRoot).caps, now);
  for (uint32_t b = 0; b < kBackgrounds; ++b)
    if (leaves_[b] != nullptr) {
      tree_.set_weight(leaves_[b], groups_->background[b].weight);
      tree_.set_caps(leaves_[b], groups_->background[b].caps, now);
    }
}

SfqTree::Node* Qos::group_node(GroupId id) {
  if (id == GroupId::kRoot) return tree_.root();
  if (auto it = group_nodes_.find(id); it != group_nodes_.end()) return it->second;
  auto it = groups_->groups.find(id);
  if (it == groups_->groups.end()) return tree_.root();
  SfqTree::Node* parent = group_node(it->second.parent);
  SfqTree::Node* node = tree_.add(parent, it->second.weight);
  tree_.set_caps(node, it->second.caps, 0);
  group_nodes_[id] = node;
  return node;
}

SfqTree::Node* Qos::leaf_node(uint32_t slot) {
  if (leaves_[slot] != nullptr) [[likely]] return leaves_[slot];
  if (slot < kFirstGroupSlot) {
    const QosGroup& b = groups_->background[slot];
    SfqTree::Node* n = tree_.add(tree_.root(), b.weight);
    tree_.set_caps(n, b.caps, 0);
    return leaves_[slot] = n;
  }
  const GroupId id{(slot - kFirstGroupSlot) / 2};
  auto it = groups_->groups.find(id);
  if (it == groups_->groups.end()) return leaf_node(kFirstGroupSlot + (slot - kFirstGroupSlot) % 2);
  const bool ahead = (slot - kFirstGroupSlot) % 2 == 1;
  return leaves_[slot] = tree_.add(group_node(id), ahead ? it->second.read_ahead_weight : kOwnWeight);
}

PerReactor& Qos::per_reactor(uint32_t index) {
  SPILLWAY_ASSERT(index < kReactorChunk * kReactorChunks);
  auto& slot = reactors_[index / kReactorChunk];
  ReactorChunk* chunk = slot.load(std::memory_order_acquire);
  if (chunk == nullptr) [[unlikely]] {
    auto* fresh = new ReactorChunk;
    if (slot.compare_exchange_strong(chunk, fresh, std::memory_order_acq_rel, std::memory_order_acquire)) chunk = fresh;
    else delete fresh;
  }
  auto& mine = chunk->reactors[index % kReactorChunk];
  PerReactor* r = mine.load(std::memory_order_relaxed);  // only this reactor's thread stores it
  if (r == nullptr) [[unlikely]] {
    r = new PerReactor;
    mine.store(r, std::memory_order_release);
  }
  return *r;
}

Cell& Qos::cell(PerReactor& r, uint32_t slot) {
  auto& at = r.chunks[slot / kCellChunk];
  CellChunk* chunk = at.load(std::memory_order_relaxed);
  if (chunk == nullptr) [[unlikely]] {
    chunk = new CellChunk;
    at.store(chunk, std::memory_order_release);  // pairs with the acquire in sample()
  }
  auto& entry = chunk->cells[slot % kCellChunk];
  Cell* c = entry.load(std::memory_order_relaxed);
  if (c == nullptr) [[unlikely]] {
    c = new Cell;
    c->slot = slot;
    entry.store(c, std::memory_order_release);
  }
  return *c;
}

void Qos::look_up_caps(Cell& c, uint64_t generation) {
  auto groups = domain_->snapshot();
  const QosOwner owner = owner_of(c.slot);
  bool capped = groups->groups.at(GroupId::kRoot).caps.any();
  if (owner.part == QosOwner::Part::kBackground)
    capped |= groups->background[static_cast<size_t>(owner.background)].caps.any();
  for (GroupId id = owner.group; id != GroupId::kRoot;) {
    auto it = groups->groups.find(id);
    if (it == groups->groups.end()) break;
    capped |= it->second.caps.any();
    id = it->second.parent;
  }
  c.capped = capped;
  c.generation = generation;
}

// ---- reports -------------------------------------------------------------------------------------------------------

QosSample Qos::sample() const {
  QosSample s;
  s.disk = name();
  s.at_ns = clock_now_ns();
  const uint64_t slots = gate_.slots();
  s.depth = depth_.load(std::memory_order_relaxed);
  s.knee = knee_.load(std::memory_order_relaxed);
  s.in_flight = Gate<>::in_device(slots);
  s.waiting = Gate<>::waiting(slots);
  s.model_speed = speed_.load(std::memory_order_relaxed);
  s.model_updates = get(updates_);
  std::map<uint32_t, QosGroupSample> by_slot;
  for_each_reactor([&](const PerReactor& r) {
    r.for_each_cell([&](const Cell& c) {
      QosGroupSample& g = by_slot[c.slot];
      g.owner = owner_of(c.slot);
      g.reads += get(c.ios[0]) + get(c.ios[1]);
      g.writes += get(c.ios[2]) + get(c.ios[3]);
      g.flushes += get(c.ios[4]);
      g.others += get(c.ios[5]);
      g.read_bytes += get(c.read_bytes);
      g.written_bytes += get(c.written_bytes);
      g.cost_ns += get(c.cost_ns);
      g.queue_ns += get(c.queue_ns);
      g.device_ns += get(c.device_ns);
      g.queued += get(c.queued);
      g.latency.merge(c.latency);
    });
  });
  for (auto& [slot, g] : by_slot) s.groups.push_back(std::move(g));
  return s;
}

QosModel Qos::model() const {
  QosModel m = costs_.current();
  m.depth = knee_.load(std::memory_order_relaxed);
  return m;
}

std::string Qos::to_text() const {
  const QosSample s = sample();
  return fmt::format("depth: {}\nknee: {}\nin-flight: {}\nwaiting: {}\nmodel-speed: {:.3f}\nmodel-updates: {}\n", s.depth,
                     s.knee, s.in_flight, s.waiting, s.model_speed, s.model_updates);
}

}  // namespace

std::vector<double> shares_wanted(const std::vector<QosOwner>& active, const QosGroups& groups) {
  SfqTree tree;
  std::map<GroupId, SfqTree::Node*> nodes{{GroupId::kRoot, tree.root()}};
  auto node_of = [&](auto&& self, GroupId id) -> SfqTree::Node* {
    if (auto it = nodes.find(id); it != nodes.end()) return it->second;
    auto it = groups.groups.find(id);
    if (it == groups.groups.end()) return tree.root();
    return nodes[id] = tree.add(self(self, it->second.parent), it->second.weight);
  };
  std::vector<SfqTree::Node*> leaves;
  for (const QosOwner& o : active) {
    if (o.part == QosOwner::Part::kBackground) {
      leaves.push_back(tree.add(tree.root(), groups.background[static_cast<size_t>(o.background)].weight));
      continue;
    }
    auto it = groups.groups.find(o.group);
    const bool ahead = o.part == QosOwner::Part::kReadAhead && it != groups.groups.end();
    leaves.push_back(tree.add(node_of(node_of, o.group), ahead ? it->second.read_ahead_weight : kOwnWeight));
  }
  return tree.shares(leaves);
}

Result<std::shared_ptr<QosVolume>> make_qos_volume(VolumePtr leaf, QosOptions options,
                                                   std::shared_ptr<QosDomain> groups) {
  auto bad = [&](std::string what) {
    return fail(ErrorKind::kInvalid, fmt::format("qos {}: {}", leaf->name(), what));
  };
  if (options.depth_min < 1 || options.depth_max < options.depth_min || options.depth_max > 65536)
    return bad(fmt::format("depth_min {} depth_max {}: 1 to 65536, in order", options.depth_min, options.depth_max));
  if (groups == nullptr) return bad("no domain of groups");
  return std::make_shared<Qos>(std::move(leaf), options, std::move(groups));
}

Result<VolumePtr> make_qos(VolumePtr leaf, QosOptions options, std::shared_ptr<QosDomain> groups) {
  SPILLWAY_TRY(auto volume, make_qos_volume(std::move(leaf), options, std::move(groups)));
  return VolumePtr(std::move(volume));
}

}  // namespace spillway
