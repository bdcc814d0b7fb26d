// Threads: one background thread a node, and the bounded pool of parallel reclaim.
//
// A node's thread sleeps on its wake word without a timer. It is woken by a charge that finds the node
// below the low watermark (once a batch, not per charge), by a pressure source, or by an operator. It
// then reclaims until the high watermark, or what was asked for, is reached. When a run frees nothing
// it rests for kRest, so that a hopeless node does not cost a core; the next wake after that tries again.
#include <algorithm>
#include <condition_variable>
#include <system_error>

#include "src/reclaim/internal.h"
#include "src/reclaim/pass.h"

namespace spillway::reclaim {

namespace {
constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr std::int64_t kRestNs = 10'000'000;

std::uint64_t below_high(const Registry::Impl& reg, int node) noexcept {
  const NodeState& n = reg.nodes[node];
  const std::uint64_t cap = n.capacity.load(kRelaxed);
  if (cap == kUnlimited) return 0;
  const std::uint64_t used = reg.node_usage_sum(node), high = n.high.load(kRelaxed);
  return used + high > cap ? used + high - cap : 0;
}
bool below_low(const Registry::Impl& reg, int node) noexcept {
  const NodeState& n = reg.nodes[node];
  const std::uint64_t cap = n.capacity.load(kRelaxed);
  if (cap == kUnlimited) return false;
  return reg.node_usage_sum(node) + n.low.load(kRelaxed) > cap;
}
}  // namespace

void Registry::set_capacity(int node, std::uint64_t bytes, Watermarks w) {
  if (node < 0 || node >= impl_->opt.nodes) return;
  NodeState& n = impl_->nodes[node];
  n.low.store(w.low);
  n.high.store(std::max(w.low, w.high));
  n.capacity.store(bytes);
  impl_->check_watermark(node);
}

void Registry::request_background(int node, std::uint64_t bytes, Reason reason) noexcept {
  const int first = node == kAnyNode ? 0 : node, last = node == kAnyNode ? impl_->opt.nodes - 1 : node;
  if (first < 0 || last >= impl_->opt.nodes) return;
  const std::uint64_t each = bytes / static_cast<std::uint64_t>(last - first + 1);
  for (int i = first; i <= last; ++i) {
    NodeState& n = impl_->nodes[i];
    if (bytes == 0 && n.rest_until_ns.load(kRelaxed) > impl_->now_ns()) continue;
    if (each != 0) {
      n.reason.store(static_cast<std::uint32_t>(reason), kRelaxed);
      n.wanted.fetch_add(each);
    }
    n.wake.fetch_add(1);
    futex_wake(n.wake, 1);
  }
}

Errc Registry::start_background() {
  Impl& m = *impl_;
  if (m.background_on.exchange(true)) return Errc::kState;
  m.background_stop.store(0);
  try {
    for (int n = 0; n < m.opt.nodes; ++n) m.nodes[n].thread = std::thread([&m, n] { m.background_main(n); });
  } catch (const std::system_error&) {
    stop_background();
    return Errc::kNoMemory;
  }
  return Errc::kOk;
}

void Registry::stop_background() {
  Impl& m = *impl_;
  if (!m.background_on.load()) return;
  m.background_stop.store(1);
  for (int n = 0; n < m.opt.nodes; ++n) {
    m.nodes[n].wake.fetch_add(1);
    futex_wake(m.nodes[n].wake, 1);
    if (m.nodes[n].thread.joinable()) m.nodes[n].thread.join();
  }
  m.background_on.store(false);
}

BackgroundStats Registry::background_stats(int node) const {
  BackgroundStats s;
  if (node < 0 || node >= impl_->opt.nodes) return s;
  const NodeState& n = impl_->nodes[node];
  s.wakeups = n.wakeups.load(kRelaxed);
  s.runs = n.runs.load(kRelaxed);
  s.freed_bytes = n.freed.load(kRelaxed);
  s.gave_up = n.gave_up.load(kRelaxed);
  return s;
}

void Registry::Impl::background_main(int node) {
  NodeState& n = nodes[node];
  while (background_stop.load() == 0) {
    const std::uint32_t seen = n.wake.load();
    const std::uint64_t wanted = n.wanted.exchange(0);
    const bool low = below_low(*this, node);
    if (wanted == 0 && !low) {
      futex_wait(n.wake, seen);
      n.wakeups.fetch_add(1, kRelaxed);
      continue;
    }
    ReclaimRequest req;
    req.node = opt.nodes > 1 ? node : kAnyNode;
    req.reason = wanted != 0 ? static_cast<Reason>(n.reason.load(kRelaxed)) : Reason::kBackground;
    req.target_bytes = std::max(wanted, low ? below_high(*this, node) : 0);
    req.parallel = opt.workers > 1;
    const ReclaimResult r = reclaim(req);
    n.runs.fetch_add(1, kRelaxed);
    n.freed.fetch_add(r.freed_bytes, kRelaxed);
    if (r.freed_bytes == 0) {
      // Nothing to be had now. Rest; a charge after the rest, or a new request, wakes us again.
      n.gave_up.fetch_add(1, kRelaxed);
      n.rest_until_ns.store(now_ns() + kRestNs, kRelaxed);
      if (background_stop.load() == 0 && n.wanted.load() == 0) {
        futex_wait(n.wake, seen);
        n.wakeups.fetch_add(1, kRelaxed);
      }
    }
  }
}

// ---------------------------------------------------------------- parallel reclaim

/// Helpers sleep until a leader posts a job; a leader waits for those who joined his. One job at a time: a
/// second leader works alone, until the first has done his own part. Helpers are started at the first parallel reclaim.
struct WorkerPool {
  std::mutex m;
  std::condition_variable work, left;
  Pass* job = nullptr;       // guarded by m
  std::uint64_t seq = 0;     // guarded by m
  bool end = false;          // guarded by m
  std::vector<std::thread> threads;

  void main() {
    std::uint64_t seen = 0;
    std::unique_lock lock(m);
    for (;;) {
      work.wait(lock, [&] { return end || (job != nullptr && seq != seen); });
      if (end) return;
      seen = seq;
      Pass& leader = *job;
      ++leader.helpers;
      lock.unlock();
      WalkRecord* rec = leader.reg.take_record();
      Pass mine(leader.reg, leader.req, leader.top, rec, leader.freed, leader.stop);
      mine.priority = leader.priority;
      mine.claim = leader.claim;
      mine.low_round = leader.low_round;
      mine.leader = false;
      mine.run();
      leader.reg.give_record(rec);
      lock.lock();
      merge_results(leader.out, mine.out);
      leader.low_skipped |= mine.low_skipped;
      if (--leader.helpers == 0) left.notify_all();
    }
  }
};

void run_parallel(Pass& leader) noexcept {
  Registry::Impl& reg = leader.reg;
  WorkerPool* pool = nullptr;
  {
    Lock lock(reg.workers_mutex);
    if (reg.workers == nullptr) {
      try {
        auto fresh = std::make_unique<WorkerPool>();
        WorkerPool* p = fresh.get();
        reg.workers = fresh.release();
        for (unsigned i = 1; i < reg.opt.workers; ++i) p->threads.emplace_back([p] { p->main(); });
      } catch (...) {
        // Fewer helpers, or none: the leader does the work.
      }
    }
    pool = reg.workers;
  }
  const std::uint64_t claim = reg.next_pass.fetch_add(1, kRelaxed);
  ReclaimResult before;
  if (pool != nullptr) {
    std::lock_guard lock(pool->m);
    if (pool->job == nullptr && !pool->threads.empty()) {
      leader.claim = claim;
      before = std::exchange(leader.out, ReclaimResult());  // helpers merge into leader.out under m
      pool->job = &leader;
      ++pool->seq;
      pool->work.notify_all();
    } else {
      pool = nullptr;
    }
  }
  if (pool == nullptr) {
    leader.run();
    return;
  }
  // Our own part runs on a copy, as helpers merge into leader.out while we are at work.
  Pass mine(reg, leader.req, leader.top, leader.rec, leader.freed, leader.stop);
  mine.priority = leader.priority;
  mine.claim = claim;
  mine.low_round = leader.low_round;
  mine.run();
  std::unique_lock lock(pool->m);
  pool->job = nullptr;
  pool->left.wait(lock, [&] { return leader.helpers == 0; });
  merge_results(leader.out, mine.out);
  merge_results(leader.out, before);
  leader.low_skipped |= mine.low_skipped;
  leader.now = mine.now;
  leader.claim = 0;
}

void Registry::Impl::stop_threads() {
  self->stop_background();
  stopping.store(true);
  if (workers != nullptr) {
    {
      std::lock_guard lock(workers->m);
      workers->end = true;
    }
    workers->work.notify_all();
    for (auto& t : workers->threads) t.join();
    delete std::exchange(workers, nullptr);
  }
}

}  // namespace spillway::reclaim
