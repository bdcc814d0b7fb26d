// The walk (S4, S8): for a subtree of groups and a node, every shrinker that has objects.
//
//   for each priority 12..0, until the target is met or the deadline has come:
//     for each active group below the request's group, from where the last pass ended:
//       1  group reference (RCU, try_get)         its units live while we hold it (S5), no RCU for them
//       2  for each set bit, by summaries:
//       3    RCU: look up the id, try_get, is it still that id? leave RCU (shrinker.cc L1-L4)
//       4    no slot: nobody has this id. Clear the bit, look again, set it again if somebody has
//            appeared (weakness 6: his adder may have set the bit before we cleared it). Slot but no
//            reference: half-built or dying. Keep the bit: objects may have been added before
//            register; a dead one's bit goes the next time, when the slot is empty. A bit that its
//            owner can not have set (not group-aware, not NUMA-aware) is the id's last owner's: clear it.
//       5    count and scan, without any lock and outside of RCU
//       6    EMPTY: clear the bit, ask once more, set it again if it was not (bits.cc)
//       7    put (RAII). From here the shrinker may be gone; the unit is not.
//       8  unit without bits: clear its summary bits upwards, same rule
//
// The reference from 3 covers 5 and 6, so free waits for exactly the callbacks of its own shrinker.
// Nothing here waits for registration, and nothing makes a pass end early but its own target, its
// deadline, or the registry's end (S6). References and statistics are sharded, trace and call
// records are per thread, so two passes share written lines only where they work on the same unit (S7).
#include <algorithm>
#include <cstring>

#include "src/reclaim/internal.h"
#include "src/reclaim/pass.h"

namespace spillway::reclaim {

namespace {
constexpr auto kSc = std::memory_order_seq_cst;
constexpr auto kRelaxed = std::memory_order_relaxed;

void bump(std::atomic<std::uint64_t>& a, std::uint64_t n) noexcept {
  if (n != 0) a.fetch_add(n, kRelaxed);
}
void note(Pass& p, ShrinkerImpl& s, NotFreed why, std::uint64_t n) noexcept {
  if (n == 0) return;
  p.out.not_freed[static_cast<std::size_t>(why)] += n;
  s.rare().not_freed[static_cast<std::size_t>(why)].fetch_add(n, kRelaxed);
}
}  // namespace

// ---------------------------------------------------------------- records

WalkRecord* Registry::Impl::take_record() noexcept {
  const unsigned start = thread_slot();
  for (unsigned i = 0; i < kMaxRecords; ++i) {
    WalkRecord& r = records[(start + i) % kMaxRecords];
    std::uint32_t no = 0;
    if (r.owned.load(kRelaxed) != 0 ||
        !r.owned.compare_exchange_strong(no, 1, std::memory_order_acquire, kRelaxed)) {
      continue;
    }
    if (r.ring.load() == nullptr && opt.trace_events != 0) {
      auto* ring = static_cast<WalkRecord::Slot*>(allocate(opt.trace_events * sizeof(WalkRecord::Slot)));
      if (ring != nullptr) {
        for (std::uint32_t k = 0; k < opt.trace_events; ++k) new (&ring[k]) WalkRecord::Slot();
        r.ring_size = opt.trace_events;
        r.ring.store(ring);
      }
    }
    return &r;
  }
  return nullptr;  // more threads in reclaim than records: unwatched and untraced, but at work
}

void Registry::Impl::give_record(WalkRecord* r) noexcept {
  if (r != nullptr) r->owned.store(0, std::memory_order_release);
}

void Registry::Impl::trace_event(WalkRecord* r, const TraceEvent& e) noexcept {
  if (r == nullptr) return;
  WalkRecord::Slot* ring = r->ring.load();
  if (ring == nullptr) return;
  // A seqlock with one writer: odd while it changes.
  WalkRecord::Slot& s = ring[r->ring_next.load(kRelaxed) % r->ring_size];
  const std::uint64_t seq = s.seq.load(kRelaxed);
  s.seq.store(seq + 1, std::memory_order_release);
  const std::uint64_t words[7] = {
      static_cast<std::uint64_t>(e.when.time_since_epoch().count()),
      e.pass << 24 | static_cast<std::uint64_t>(e.kind) << 16 | static_cast<std::uint64_t>(e.reason) << 8 |
          static_cast<std::uint64_t>(e.status),
      std::uint64_t{e.shrinker_id} << 32 | e.group_id,
      static_cast<std::uint64_t>(e.elapsed.count()) << 16 |
          static_cast<std::uint64_t>(static_cast<std::uint8_t>(e.node)) << 8 |
          static_cast<std::uint8_t>(e.priority),
      e.freeable, e.scanned, e.freed_bytes};
  for (int i = 0; i < 7; ++i) s.words[static_cast<std::size_t>(i)].store(words[i], std::memory_order_release);
  s.seq.store(seq + 2, std::memory_order_release);
  r->ring_next.fetch_add(1, kRelaxed);
}

// Any walker, a few times per budget: marks calls that run longer than they may. The mark names the
// call; the owner takes it off when the call ends, or we do when it had ended already.
void Registry::Impl::watch(std::int64_t now) noexcept {
  std::int64_t due = next_watch_ns.load(kRelaxed);
  if (now < due) return;
  const std::int64_t step = std::max<std::int64_t>(opt.time_budget.count() / 8, 100'000);
  if (!next_watch_ns.compare_exchange_strong(due, now + step, kRelaxed)) return;
  for (unsigned i = 0; i < kMaxRecords; ++i) {
    WalkRecord& r = records[i];
    const std::uint64_t call = r.call.load(std::memory_order_acquire);
    if ((call & 1) == 0 || r.stuck.load(kRelaxed) == call) continue;
    const std::int64_t start = r.start_ns.load(std::memory_order_acquire);
    const std::int64_t budget = r.budget_ns.load(std::memory_order_acquire);
    const std::uint64_t key = r.key.load(std::memory_order_acquire);
    if (r.call.load(std::memory_order_acquire) != call || now - start <= budget) continue;
    std::uint64_t none = 0;
    if (!r.stuck.compare_exchange_strong(none, call, kSc, kRelaxed)) continue;
    stuck_count.fetch_add(1);
    if (r.call.load() != call) {
      std::uint64_t mine = call;
      if (r.stuck.compare_exchange_strong(mine, 0, kSc, kRelaxed)) stuck_count.fetch_sub(1);
      continue;
    }
    if (ShrinkerRef s = get(static_cast<std::uint32_t>((key >> 32) - 1))) {
      diag(Severity::kWarning, "overrun", &*s, "a callback is over its time budget; others pass it by");
    }
  }
}

bool Registry::Impl::is_stuck(std::uint64_t key, bool any_inside, const WalkRecord* own) const noexcept {
  for (unsigned i = 0; i < kMaxRecords; ++i) {
    const WalkRecord& r = records[i];
    if (&r == own || r.key.load(std::memory_order_acquire) != key) continue;
    const std::uint64_t call = r.call.load(std::memory_order_acquire);
    if ((call & 1) == 0) continue;
    if (any_inside || r.stuck.load(std::memory_order_acquire) == call) return true;
  }
  return false;
}

// ---------------------------------------------------------------- one shrinker

namespace {

/// While it lives, this thread is inside callbacks of `s` for (group, node).
class Inside {
 public:
  Inside(Pass& p, ShrinkerImpl& s, std::uint64_t key) noexcept
      : p_(p), frame_{&p.reg, &s, p.rec}, outer_(std::exchange(t_frame, &frame_)) {
    if (p.rec == nullptr) return;
    WalkRecord& r = *p.rec;
    r.key.store(key, std::memory_order_release);
    r.start_ns.store(p.now, std::memory_order_release);
    r.budget_ns.store(s.budget_ns, std::memory_order_release);
    r.call.store(r.call.load(kRelaxed) + 1, std::memory_order_release);
  }
  ~Inside() {
    t_frame = outer_;
    if (p_.rec == nullptr) return;
    WalkRecord& r = *p_.rec;
    // seq_cst on both sides: either the watcher sees that the call has ended, or we see its mark.
    r.call.store(r.call.load(kRelaxed) + 1, kSc);
    r.key.store(0, std::memory_order_release);
    if (r.stuck.load(kSc) != 0 && r.stuck.exchange(0) != 0) p_.reg.stuck_count.fetch_sub(1);
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  Pass& p_;
  CallFrame frame_;
  CallFrame* outer_;
};

CountReport call_count(ShrinkerImpl& s, const ScanRequest& q, bool& threw) noexcept {
  try {
    return s.count(q);
  } catch (...) {
    threw = true;
    return {};
  }
}

ScanReport call_scan(ShrinkerImpl& s, const ScanRequest& q, bool& threw) noexcept {
  try {
    return s.scan(q);
  } catch (...) {
    threw = true;
    ScanReport r;
    r.status = ScanStatus::kStop;
    return r;
  }
}

/// Takes a report at face value only as far as it can be true; says so when it was not.
bool sanitize(ScanReport& r, std::uint64_t nr, std::uint64_t bytes_credit) noexcept {
  bool lied = false;
  if (r.scanned > nr) {
    r.scanned = nr;
    lied = true;
  }
  if (r.freed_objects > nr) {
    r.freed_objects = nr;
    lied = true;
  }
  if (r.freed_objects > r.scanned) r.scanned = r.freed_objects;
  if (r.freed_bytes > bytes_credit) {
    r.freed_bytes = bytes_credit;
    lied = true;
  }
  return lied;
}

}  // namespace

void Pass::judge(ShrinkerImpl& s, std::int64_t elapsed, bool threw) noexcept {
  if (elapsed <= s.budget_ns && !threw) {
    if (s.strikes.load(kRelaxed) != 0) {
      s.strikes.store(0, kRelaxed);
      s.quarantines.store(0, kRelaxed);
    }
    return;
  }
  if (elapsed > s.budget_ns) s.rare().overruns.fetch_add(1, kRelaxed);
  const std::uint32_t strikes = s.strikes.fetch_add(1, kRelaxed) + 1;
  if (strikes < reg.opt.quarantine_after) return;
  const std::uint32_t again = std::min(s.quarantines.fetch_add(1, kRelaxed), 6u);
  s.strikes.store(reg.opt.quarantine_after - 1, kRelaxed);  // on probation: one more is enough
  s.quarantined_until_ns.store(now + (reg.opt.quarantine_time.count() << again), kRelaxed);
  reg.diag(Severity::kWarning, "quarantine", &s, "overran its time budget or threw again and again");
}

/// What came of one visit.
struct Pass::Visit {
  std::int64_t start = 0;
  CountReport count;
  ScanReport last;
  std::uint64_t calls = 0, scanned = 0, freed_objects = 0, freed_bytes = 0;
  bool threw = false, refused = false, lied = false;
};

/// True: somebody is stuck in it here, or it is in quarantine. An operator's scan is never kept out.
bool Pass::passes_by(ShrinkerImpl& s, MemoryGroup& g, int node) noexcept {
  if (req.reason == Reason::kManual) return false;
  const bool suspect = s.strikes.load(kRelaxed) != 0;
  if (s.quarantined_until_ns.load(kRelaxed) <= now &&
      !((suspect || reg.stuck_count.load(kRelaxed) != 0) &&
        reg.is_stuck(call_key(s.id, g.id(), node), suspect, rec))) {
    return false;
  }
  s.rare().skipped.fetch_add(1, kRelaxed);
  note(*this, s, NotFreed::kSkipped, 1);
  TraceEvent e = event(TraceEvent::Kind::kSkip, s, g, node);
  e.status = ScanStatus::kBusy;
  reg.trace_event(rec, e);
  return true;
}

TraceEvent Pass::event(TraceEvent::Kind kind, const ShrinkerImpl& s, const MemoryGroup& g, int node) const noexcept {
  TraceEvent e;
  e.when = TimePoint(Nanoseconds(now));
  e.pass = id;
  e.kind = kind;
  e.reason = req.reason;
  e.shrinker_id = s.id;
  e.group_id = g.id();
  e.node = node;
  e.priority = priority;
  return e;
}

/// The scan calls of one visit, and what is left for the next (shrink_math.h).
void Pass::scan_batches(ShrinkerImpl& s, ScanRequest& q, Visit& v) noexcept {
  const CountReport& c = v.count;
  const std::uint64_t deferred = reg.claim_deferred(*q.group, q.node, s);
  const ShrinkPlan plan = plan_shrink(c.objects, deferred, priority, s.seeks, s.batch, scale_num, scale_den);
  const std::uint64_t calls_max = 2 * (plan.total / plan.batch) + 2;
  const std::uint64_t credit = c.bytes != 0 ? 2 * (c.bytes + c.pinned_bytes) : kUnlimited / 2;
  bool cut = false;
  for (std::uint64_t total = plan.total; scan_due(plan, total);) {
    if (v.calls == calls_max || remaining() == 0) {
      cut = true;
      break;
    }
    q.target_bytes = remaining();
    q.nr_to_scan = std::min({plan.batch, total, objects_for(q.target_bytes, c)});
    const ScanReport r = one_scan(s, q, v, credit - std::min(credit, v.freed_bytes));
    credit_freed(r.freed_bytes);
    if (v.refused || r.scanned == 0 || r.status != ScanStatus::kProgress) break;  // weakness 9
    total -= std::min(total, r.scanned);
    if (past_deadline(reg.now_ns())) {
      cut = true;
      break;
    }
  }
  std::uint64_t left = work_left(plan, deferred, v.scanned, v.refused);
  if (cut) left = std::min(left, deferred);  // the target is met: nobody owes this pass's share
  reg.add_deferred(*q.group, q.node, s, left, (2 * plan.freeable) << kFractionBits);
  note(*this, s, NotFreed::kDeferred, left >> kFractionBits);
}

ScanReport Pass::one_scan(ShrinkerImpl& s, const ScanRequest& q, Visit& v, std::uint64_t bytes_credit) noexcept {
  ScanReport r = call_scan(s, q, v.threw);
  v.lied |= sanitize(r, q.nr_to_scan, bytes_credit);
  v.refused = r.status == ScanStatus::kStop;
  ++v.calls;
  v.scanned += r.scanned;
  v.freed_objects += r.freed_objects;
  v.freed_bytes += r.freed_bytes;
  v.last = r;
  note(*this, s, NotFreed::kBusy, r.not_freed_busy);
  note(*this, s, NotFreed::kDirty, r.not_freed_dirty);
  note(*this, s, NotFreed::kReferenced, r.not_freed_referenced);
  note(*this, s, NotFreed::kPinned, r.not_freed_pinned);
  return r;
}

/// Statistics: the caller's shard, then rare events, then the trace.
void Pass::account(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node, const Visit& v) noexcept {
  now = reg.now_ns();
  const std::int64_t elapsed = std::max<std::int64_t>(now - v.start, 0);
  judge(s, elapsed, v.threw);
  Shard& sh = s.stats(shard);
  bump(sh.scan_calls, v.calls);
  bump(sh.scanned, v.scanned);
  bump(sh.freed_objects, v.freed_objects);
  bump(sh.freed_bytes, v.freed_bytes);
  bump(sh.time_ns, static_cast<std::uint64_t>(elapsed));
  const auto bucket = std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(elapsed, 64)) / 64) - 1;
  sh.latency[std::min<std::size_t>(static_cast<std::size_t>(bucket), sh.latency.size() - 1)].fetch_add(
      1, kRelaxed);
  RareStats& rare = s.rare();
  if (static_cast<std::uint64_t>(elapsed) > rare.time_max_ns.load(kRelaxed)) {
    rare.time_max_ns.store(static_cast<std::uint64_t>(elapsed), kRelaxed);
  }
  note(*this, s, NotFreed::kPinned, v.count.pinned_bytes);
  if (v.threw) {
    rare.throws.fetch_add(1, kRelaxed);
    reg.diag(Severity::kError, "throw", &s, "a callback threw; taken as stop");
  }
  if (v.lied && rare.misreports.fetch_add(1, kRelaxed) == 0) {
    reg.diag(Severity::kWarning, "misreport", &s, "scan reported more than it was asked or than there was");
  }
  if (v.count.is_empty) rare.empties.fetch_add(1, kRelaxed);
  out.calls += v.calls;
  out.scanned += v.scanned;
  out.freed_objects += v.freed_objects;
  out.freed_bytes += v.freed_bytes;
  if (v.freed_bytes != 0) bump(GroupAccess::state(g).reclaimed_bytes, v.freed_bytes);
  if (v.calls == 0) return;
  const ScanStatus seen =
      v.last.scanned == 0 && v.last.status == ScanStatus::kProgress ? ScanStatus::kBusy : v.last.status;
  if (rare.last_status.load(kRelaxed) != static_cast<std::uint8_t>(seen)) {
    rare.last_status.store(static_cast<std::uint8_t>(seen), kRelaxed);
  }
  if (seen == ScanStatus::kBusy) rare.busy.fetch_add(1, kRelaxed);
  if (seen == ScanStatus::kStop) {
    rare.stops.fetch_add(1, kRelaxed);
    note(*this, s, NotFreed::kStopped, 1);
  }
  TraceEvent e = event(TraceEvent::Kind::kShrink, s, g, node);
  e.when = TimePoint(Nanoseconds(v.start));
  e.status = seen;
  e.freeable = v.count.objects;
  e.scanned = v.scanned;
  e.freed_bytes = v.freed_bytes;
  e.elapsed = Nanoseconds(elapsed);
  reg.trace_event(rec, e);
}

/// True: nothing at all here (SHRINK_EMPTY).
bool Pass::shrink(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node) noexcept {
  ++out.shrinkers;
  if (!s.visited.load(kRelaxed)) s.visited.store(true, kRelaxed);
  reg.watch(now);
  if (passes_by(s, g, node)) return false;
  ScanRequest q = request(s, g, node);
  Visit v;
  v.start = now;
  {
    Inside inside(*this, s, call_key(s.id, g.id(), node));
    v.count = call_count(s, q, v.threw);
    if (v.count.objects != 0 && !v.count.is_empty && !v.threw) scan_batches(s, q, v);
  }
  account(s, shard, g, node, v);
  return v.count.is_empty;
}

ScanRequest Pass::request(const ShrinkerImpl& s, MemoryGroup& g, int node) const noexcept {
  ScanRequest q;
  q.reason = req.reason;
  q.node = node;
  q.group = &g;
  q.priority = priority;
  q.deadline = req.deadline;
  q.may_block = req.may_block;
  q.private_data = s.private_data;
  q.target_bytes = remaining();
  return q;
}

std::uint64_t Pass::objects_for(std::uint64_t bytes, const CountReport& c) noexcept {
  if (c.bytes == 0 || bytes >= c.bytes) return ~std::uint64_t{0};
  const auto n = (static_cast<unsigned __int128>(bytes) * c.objects + c.bytes - 1) / c.bytes;
  return static_cast<std::uint64_t>(n);
}

// ---------------------------------------------------------------- one group

namespace {
/// Steps 4 and 6: bit cleared, both fences, then the second look decides whether it stays so.
template <class StillThere>
void clear_and_recheck(Registry::Impl& reg, Unit& u, MemoryGroup& g, int node, std::uint32_t id,
                       StillThere still_there) noexcept {
  u.map.fetch_and(~mask(bit_of(id)), kSc);
  std::atomic_thread_fence(kSc);  // partner: the fence in set_bit
  if (still_there()) reg.set_bit(g, node, id);
}
}  // namespace

void Pass::visit(MemoryGroup& g, int node, std::uint32_t sid, Unit* unit, bool only_unaware) noexcept {
  bool slot;
  ShrinkerRef s = reg.get(sid, &slot);
  if (!slot) {
    if (unit == nullptr) return;
    clear_and_recheck(reg, *unit, g, node, sid, [&] {
      RcuGuard guard;
      return reg.ids.lookup(sid) != nullptr;
    });
    return;
  }
  if (!s) return;
  const bool numa = has(s->flags, ShrinkerFlags::kNumaAware);
  if ((!g.is_root() && !has(s->flags, ShrinkerFlags::kGroupAware)) || (node != 0 && !numa)) {
    // While we hold the owner nobody else gets the id, and he sets no bit here: no second look.
    if (unit != nullptr) unit->map.fetch_and(~mask(bit_of(sid)), kSc);
    return;
  }
  if (numa && only_unaware) return;
  if (!req.may_block && !has(s->flags, ShrinkerFlags::kNoBlock)) {
    note(*this, *s, NotFreed::kNoBlock, 1);
    return;
  }
  if (shrink(*s, s.shard(), g, node) && unit != nullptr) {
    clear_and_recheck(reg, *unit, g, node, sid, [&] { return !shrink(*s, s.shard(), g, node); });
  }
}

void Pass::walk_bits(MemoryGroup& g, int node, bool only_unaware) noexcept {
  Info* info = GroupAccess::state(g).info[node].load();
  if (info == nullptr) return;
  for (std::uint64_t bs = info->summary.load(kSc); bs != 0 && !done(); bs &= bs - 1) {
    const auto b = static_cast<std::uint32_t>(std::countr_zero(bs));
    Block* block = info->blocks[b].load();
    for (std::uint64_t us = block->summary.load(kSc); us != 0 && !done(); us &= us - 1) {
      const auto u = static_cast<std::uint32_t>(std::countr_zero(us));
      Unit* unit = block->units[u].load();
      if (claim != 0 && unit->claim.exchange(claim, kRelaxed) == claim) continue;
      const std::uint32_t base = (b * kFan + u) * kFan;
      for (std::uint64_t m = unit->map.load(kSc); m != 0 && !done(); m &= m - 1) {
        visit(g, node, base + static_cast<std::uint32_t>(std::countr_zero(m)), unit, only_unaware);
      }
      if (unit->map.load(kRelaxed) == 0) reg.settle_up(g, node, base);
    }
  }
}

// Step 8, level by level: clear the upper bit, look at the lower word, set upwards again if needed.
void Registry::Impl::settle_up(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  Info* info = GroupAccess::state(g).info[node].load();
  Block* block = info->blocks[block_of(id)].load();
  Unit* unit = block->units[unit_of(id)].load();
  NodeState& n = nodes[node];
  const std::uint32_t word = g.id() / 64;
  block->summary.fetch_and(~mask(unit_of(id)), kSc);
  if (unit->map.load(kSc) != 0) return propagate(g, node, id);
  if (block->summary.load(kSc) != 0) return;
  info->summary.fetch_and(~mask(block_of(id)), kSc);
  if (block->summary.load(kSc) != 0) return propagate_block(g, node, id);
  if (info->summary.load(kSc) != 0 || GroupAccess::state(g).overflow[node].load(kSc) != 0) return;
  n.active[word].fetch_and(~mask(g.id() % 64), kSc);
  if (info->summary.load(kSc) != 0 || GroupAccess::state(g).overflow[node].load(kSc) != 0) {
    return mark_active(g, node);
  }
  if (n.active[word].load(kSc) != 0) return;
  n.active_summary[word / 64].fetch_and(~mask(word % 64), kSc);
  if (n.active[word].load(kSc) != 0) n.active_summary[word / 64].fetch_or(mask(word % 64), kSc);
}

// The unit's bit in the block is somebody else's and set; only what is above may be missing.
void Registry::Impl::propagate_block(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  Info* info = GroupAccess::state(g).info[node].load();
  if ((info->summary.load(kSc) & mask(block_of(id))) == 0) info->summary.fetch_or(mask(block_of(id)), kSc);
  mark_active(g, node);
}

void Pass::walk_group(MemoryGroup& g, int node, bool only_unaware) noexcept {
  auto& st = GroupAccess::state(g);
  ++out.groups;
  scale_num = scale_den = 1;
  const auto prot = g.effective_protection(*top);
  if ((prot.min | prot.low) != 0) {
    const std::uint64_t usage = std::max<std::uint64_t>(g.usage(), 1);
    const bool use_low = !req.ignore_low && !low_round;
    std::uint64_t keep = use_low ? std::max(prot.min, prot.low) : prot.min;
    keep = std::min(keep, usage);
    out.not_freed[static_cast<std::size_t>(NotFreed::kProtected)] += keep;
    if (keep == usage) {
      if (use_low && prot.min < usage) low_skipped = true;
      return;
    }
    if (low_round && prot.low > prot.min) bump(st.low_events, 1);
    // 1/1024 steps, so that the product with the delta stays small
    scale_num = std::max<std::uint64_t>(static_cast<std::uint64_t>(
                    static_cast<unsigned __int128>(usage - keep) * 1024 / usage), 1);
    scale_den = 1024;
    if (use_low && prot.low > prot.min) low_skipped = true;
  }
  if (priority != kPriorityMax && g.parent() != nullptr) {
    const std::uint64_t weight = GroupAccess::state(g.top_level()).weight.load(kRelaxed);
    scale_num *= 100;
    scale_den *= weight;
  }
  if (st.overflow[node].load(kSc) != 0) {
    if (!leader) return;
    // Some bit could not be stored for lack of memory: everybody is asked (once it was true, always).
    const std::uint32_t limit = reg.ids.limit();
    for (std::uint32_t i = 0; i < limit && !done(); ++i) {
      visit(g, node, i, reg.find_unit(g, node, i), only_unaware);
    }
    return;
  }
  walk_bits(g, node, only_unaware);
}

// ---------------------------------------------------------------- all groups

namespace {
/// Lowest active group id >= from, or max_groups.
std::uint32_t next_active(const Registry::Impl& reg, int node, std::uint32_t from) noexcept {
  const NodeState& n = reg.nodes[node];
  const std::uint32_t words = (reg.opt.max_groups + 63) / 64;
  std::uint32_t w = from / 64;
  if (w >= words) return reg.opt.max_groups;
  std::uint64_t m = n.active[w].load(kSc) & (~std::uint64_t{0} << (from % 64));
  while (m == 0) {
    ++w;
    if (w >= words) return reg.opt.max_groups;
    const std::uint64_t s = n.active_summary[w / 64].load(kSc) & (~std::uint64_t{0} << (w % 64));
    if (s == 0) {
      w = (w / 64 + 1) * 64 - 1;
      continue;
    }
    w = w / 64 * 64 + static_cast<std::uint32_t>(std::countr_zero(s));
    m = n.active[w].load(kSc);
  }
  return w * 64 + static_cast<std::uint32_t>(std::countr_zero(m));
}
}  // namespace

void Pass::walk_node(int node, bool only_unaware) noexcept {
  if (!top->is_root() && GroupAccess::state(*top).children.load(kRelaxed) == 0) {
    walk_group(*top, node, only_unaware);
    return;
  }
  NodeState& n = reg.nodes[node];
  const std::uint32_t start = n.cursor.load(kRelaxed);
  std::uint32_t at = next_active(reg, node, start);
  bool wrapped = false;
  for (;;) {
    if (at >= reg.opt.max_groups) {
      if (wrapped || start == 0) break;
      wrapped = true;
      at = next_active(reg, node, 0);
      continue;
    }
    if (wrapped && at >= start) break;
    if (GroupRef g = reg.get_group(at); g && (top->is_root() || g->is_descendant_of(*top))) {
      walk_group(*g, node, only_unaware);
    }
    if (done()) {
      if (leader) n.cursor.store(at + 1 < reg.opt.max_groups ? at + 1 : 0, kRelaxed);
      return;
    }
    at = next_active(reg, node, at + 1);
  }
}

void Pass::run() noexcept {
  if (req.node == kAnyNode) {
    for (int n = 0; n < reg.opt.nodes && !done(); ++n) walk_node(n, false);
    return;
  }
  walk_node(req.node, false);
  // Shrinkers that do not know nodes keep everything under node 0.
  if (req.node != 0 && !done()) walk_node(0, true);
}

namespace {
void merge(ReclaimResult& to, const ReclaimResult& from) noexcept {
  to.freed_bytes += from.freed_bytes;
  to.freed_objects += from.freed_objects;
  to.scanned += from.scanned;
  to.calls += from.calls;
  to.shrinkers += from.shrinkers;
  to.groups += from.groups;
  for (std::size_t i = 0; i < kNotFreedReasons; ++i) to.not_freed[i] += from.not_freed[i];
}
}  // namespace

void merge_results(ReclaimResult& to, const ReclaimResult& from) noexcept { merge(to, from); }

ReclaimResult Registry::Impl::reclaim(const ReclaimRequest& r) {
  ReclaimResult out;
  if (t_frame != nullptr) {
    out.status = ReclaimStatus::kRecursion;
    return out;
  }
  ReclaimRequest req = r;
  req.priority = std::clamp(req.priority, kPriorityMax, kPriorityDefault);
  req.priority_end = std::clamp(req.priority_end, kPriorityMax, req.priority);
  if (req.node < kAnyNode || req.node >= opt.nodes) req.node = kAnyNode;
  const GroupRef top = GroupRef::share(r.group != nullptr ? *r.group : *root);
  WalkRecord* rec = take_record();
  Atomic<std::uint64_t> freed{0};
  Atomic<std::uint32_t> stop{0};
  Pass pass(*this, req, top.get(), rec, freed, stop);
  const std::int64_t begin = pass.now;
  TraceEvent e;
  e.when = TimePoint(Nanoseconds(begin));
  e.pass = pass.id;
  e.reason = req.reason;
  e.group_id = top->id();
  e.node = req.node;
  e.priority = req.priority;
  e.freeable = req.target_bytes;
  trace_event(rec, e);

  for (int round = 0; round < 2 && !pass.done(); ++round) {
    pass.low_round = round == 1;
    for (pass.priority = req.priority;; --pass.priority) {
      out.priority = pass.priority;
      if (req.parallel && opt.workers > 1) {
        run_parallel(pass);
      } else {
        pass.run();
      }
      if (pass.done() || pass.priority == req.priority_end) break;
    }
    if (req.ignore_low || !pass.low_skipped) break;
  }
  give_record(rec);
  const int priority = out.priority;
  out = pass.out;
  out.priority = priority;
  out.elapsed = Nanoseconds(now_ns() - begin);
  out.status = freed.load(kRelaxed) >= req.target_bytes ? ReclaimStatus::kReached
               : stop.load(kRelaxed) != 0               ? ReclaimStatus::kDeadline
                                                        : ReclaimStatus::kExhausted;
  e.kind = TraceEvent::Kind::kEnd;
  e.when += out.elapsed;
  e.priority = out.priority;
  e.freeable = out.shrinkers;
  e.scanned = out.scanned;
  e.freed_bytes = out.freed_bytes;
  e.elapsed = out.elapsed;
  trace_event(rec, e);
  bump(totals.freed_bytes, out.freed_bytes);
  bump(totals.freed_objects, out.freed_objects);
  bump(totals.scanned, out.scanned);
  bump(totals.calls, out.calls);
  bump(totals.shrinkers, out.shrinkers);
  bump(totals.groups, out.groups);
  bump(totals.passes, 1);
  for (std::size_t i = 0; i < kNotFreedReasons; ++i) bump(totals.not_freed[i], out.not_freed[i]);
  return out;
}

ReclaimResult Registry::reclaim(const ReclaimRequest& r) { return impl_->reclaim(r); }
bool Registry::in_reclaim() noexcept { return t_frame != nullptr; }

// By hand (S9): one callback, no arithmetic, no skipping; watched and accounted like any other.
Errc Registry::scan(std::uint32_t id, MemoryGroup& group, int node, std::uint64_t nr, ScanReport* out) {
  if (t_frame != nullptr) return Errc::kState;
  if (node < 0 || node >= impl_->opt.nodes || &group.registry() != this) return Errc::kInvalid;
  ShrinkerRef s = impl_->get(id);
  if (!s || (!group.is_root() && !has(s->flags, ShrinkerFlags::kGroupAware)) ||
      (node != 0 && !has(s->flags, ShrinkerFlags::kNumaAware))) {
    return Errc::kInvalid;
  }
  const ScanReport report = impl_->by_hand(*s, s.shard(), group, node, nr).second;
  if (out != nullptr) *out = report;
  return Errc::kOk;
}

std::pair<CountReport, ScanReport> Registry::Impl::by_hand(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node,
                                                           std::uint64_t nr) noexcept {
  ReclaimRequest req;
  req.reason = Reason::kManual;
  WalkRecord* rec = take_record();
  Atomic<std::uint64_t> freed{0};
  Atomic<std::uint32_t> stop{0};
  Pass pass(*this, req, &g, rec, freed, stop);
  pass.priority = kPriorityMax;
  s.visited.store(true, kRelaxed);
  ScanRequest q = pass.request(s, g, node);
  Pass::Visit v;
  v.start = pass.now;
  {
    Inside inside(pass, s, call_key(s.id, g.id(), node));
    if (nr == 0) {
      v.count = call_count(s, q, v.threw);
    } else {
      q.nr_to_scan = nr;
      pass.one_scan(s, q, v, kUnlimited);
    }
  }
  pass.account(s, shard, g, node, v);
  give_record(rec);
  return {v.count, v.last};
}

}  // namespace spillway::reclaim
