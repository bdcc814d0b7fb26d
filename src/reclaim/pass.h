// One thread's part of one reclaim. Thread-confined, but for the two shared words.
#pragma once

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

struct Pass {
  Pass(Registry::Impl& registry, const ReclaimRequest& request, MemoryGroup* group, WalkRecord* record,
       Atomic<std::uint64_t>& freed_by_all, Atomic<std::uint32_t>& stop_all) noexcept
      : reg(registry),
        req(request),
        top(group),
        rec(record),
        freed(freed_by_all),
        stop(stop_all),
        id(registry.next_pass.fetch_add(1, std::memory_order_relaxed)),
        now(registry.now_ns()),
        deadline_ns(request.deadline.time_since_epoch().count()) {}

  Registry::Impl& reg;
  const ReclaimRequest& req;
  MemoryGroup* top;
  WalkRecord* rec;
  Atomic<std::uint64_t>& freed;  // bytes, by all threads of this reclaim
  Atomic<std::uint32_t>& stop;   // deadline met or registry ends
  std::uint64_t id;
  std::int64_t now;              // last look at the clock
  std::int64_t deadline_ns;
  int priority = kPriorityDefault;
  std::uint64_t claim = 0;       // not 0: units are shared out among threads
  bool leader = true;
  unsigned helpers = 0;          // inside this leader's job; guarded by the pool's mutex
  bool low_round = false;        // second round: what `low` protects may go
  bool low_skipped = false;
  std::uint64_t scale_num = 1, scale_den = 1;  // of the group that is walked
  ReclaimResult out;

  std::uint64_t remaining() const noexcept {
    const std::uint64_t f = freed.load(std::memory_order_relaxed);
    return f >= req.target_bytes ? 0 : req.target_bytes - f;
  }
  void credit_freed(std::uint64_t n) noexcept {
    if (n != 0) freed.fetch_add(n, std::memory_order_relaxed);
  }
  bool past_deadline(std::int64_t t) noexcept {
    now = t;
    if (t < deadline_ns) return false;
    stop.store(1, std::memory_order_relaxed);
    return true;
  }
  bool done() noexcept {
    if (remaining() == 0 || stop.load(std::memory_order_relaxed) != 0) return true;
    if (reg.stopping.load(std::memory_order_relaxed)) stop.store(1, std::memory_order_relaxed);
    return past_deadline(now);
  }

  void run() noexcept;
  void walk_node(int node, bool only_unaware) noexcept;
  void walk_group(MemoryGroup& g, int node, bool only_unaware) noexcept;
  void walk_bits(MemoryGroup& g, int node, bool only_unaware) noexcept;
  void visit(MemoryGroup& g, int node, std::uint32_t sid, Unit* unit, bool only_unaware) noexcept;
  struct Visit;
  bool shrink(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node) noexcept;
  bool passes_by(ShrinkerImpl& s, MemoryGroup& g, int node) noexcept;
  ScanRequest request(const ShrinkerImpl& s, MemoryGroup& g, int node) const noexcept;
  void scan_batches(ShrinkerImpl& s, ScanRequest& q, Visit& v) noexcept;
  ScanReport one_scan(ShrinkerImpl& s, const ScanRequest& q, Visit& v, std::uint64_t bytes_credit) noexcept;
  void judge(ShrinkerImpl& s, std::int64_t elapsed, bool threw) noexcept;
  void account(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node, const Visit& v) noexcept;
  TraceEvent event(TraceEvent::Kind kind, const ShrinkerImpl& s, const MemoryGroup& g, int node) const noexcept;
  static std::uint64_t objects_for(std::uint64_t bytes, const CountReport& c) noexcept;
};

void merge_results(ReclaimResult& to, const ReclaimResult& from) noexcept;

/// One priority, with the registry's workers helping if they are free.
void run_parallel(Pass& leader) noexcept;

}  // namespace spillway::reclaim
