// Introspection (S9): what is registered, what it holds, why memory did not come back. Everything is
// read through references and atomics; nothing here is added to or removed from the registry, so there
// is no entry whose removal could need its lock.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

namespace {
constexpr auto kRelaxed = std::memory_order_relaxed;

__attribute__((format(printf, 2, 3))) void append(std::string& to, const char* format, ...) {
  char buf[512];
  va_list ap;
  va_start(ap, format);
  const int n = std::vsnprintf(buf, sizeof buf, format, ap);
  va_end(ap);
  if (n > 0) to.append(buf, std::min<std::size_t>(static_cast<std::size_t>(n), sizeof buf - 1));
}
unsigned long long ull(std::uint64_t v) { return v; }

ShrinkerStats collect(const ShrinkerImpl& s, std::int64_t now) {
  ShrinkerStats o;
  o.id = s.id;
  o.name = s.label();
  o.registered = true;
  o.quarantined = s.quarantined_until_ns.load(kRelaxed) > now;
  o.flags = s.flags;
  o.seeks = s.seeks;
  o.batch = s.batch;
  for (unsigned i = 0; i < s.nshards; ++i) {
    const Shard& sh = s.stats(i);
    o.scan_calls += sh.scan_calls.load(kRelaxed);
    o.scanned += sh.scanned.load(kRelaxed);
    o.freed_objects += sh.freed_objects.load(kRelaxed);
    o.freed_bytes += sh.freed_bytes.load(kRelaxed);
    o.time_total += Nanoseconds(sh.time_ns.load(kRelaxed));
    for (std::size_t b = 0; b < o.latency.size(); ++b) {
      o.latency[b] += sh.latency[b].load(kRelaxed);
    }
  }
  for (const auto n : o.latency) o.count_calls += n;
  const RareStats& r = s.rare();
  o.busy = r.busy.load(kRelaxed);
  o.stops = r.stops.load(kRelaxed);
  o.empties = r.empties.load(kRelaxed);
  o.throws = r.throws.load(kRelaxed);
  o.misreports = r.misreports.load(kRelaxed);
  o.overruns = r.overruns.load(kRelaxed);
  o.skipped = r.skipped.load(kRelaxed);
  o.time_max = Nanoseconds(r.time_max_ns.load(kRelaxed));
  o.last_status = static_cast<ScanStatus>(r.last_status.load(kRelaxed));
  for (std::size_t i = 0; i < kNotFreedReasons; ++i) o.not_freed[i] = r.not_freed[i].load(kRelaxed);
  return o;
}

void append_reasons(std::string& to, const std::array<std::uint64_t, kNotFreedReasons>& why) {
  static constexpr const char* units[] = {"objects", "bytes", "objects", "objects", "bytes",
                                          "calls",   "calls", "objects", "calls"};
  bool any = false;
  for (std::size_t i = 0; i < kNotFreedReasons; ++i) {
    if (why[i] == 0) continue;
    append(to, "%s%s %llu %s", any ? ", " : "", std::string(to_string(static_cast<NotFreed>(i))).c_str(),
           ull(why[i]), units[i]);
    any = true;
  }
  if (!any) to += "nothing held back";
}
}  // namespace

std::vector<ShrinkerStats> Registry::list() {
  std::vector<ShrinkerStats> out;
  const std::uint32_t limit = impl_->ids.limit();
  const std::int64_t now = impl_->now_ns();
  for (std::uint32_t id = 0; id < limit; ++id) {
    if (ShrinkerRef s = impl_->get(id)) out.push_back(collect(*s, now));
  }
  return out;
}

ShrinkerStats Registry::stats(std::uint32_t id) {
  ShrinkerRef s = impl_->get(id);
  return s ? collect(*s, impl_->now_ns()) : ShrinkerStats();
}

std::vector<CountRow> Registry::counts(std::uint32_t id) {
  std::vector<CountRow> rows;
  if (t_frame != nullptr) return rows;
  ShrinkerRef s = impl_->get(id);
  if (!s) return rows;
  for (const GroupRef& g : groups()) {
    if (!g->is_root() && !has(s->flags, ShrinkerFlags::kGroupAware)) continue;
    CountRow row;
    row.group_id = g->id();
    row.group_path = g->path();
    for (int n = 0; n < impl_->opt.nodes; ++n) {
      CountReport c;
      if (n == 0 || has(s->flags, ShrinkerFlags::kNumaAware)) {
        c = impl_->by_hand(*s, s.shard(), *g, n, 0).first;
      }
      row.nodes.push_back(c);
      row.deferred.push_back(impl_->read_deferred(*g, n, *s) >> kFractionBits);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string Registry::counts_text(std::uint32_t id) {
  std::string out;
  for (const CountRow& row : counts(id)) {
    out += row.group_path;
    for (const CountReport& c : row.nodes) append(out, " %llu", ull(c.objects));
    out += '\n';
  }
  return out;
}

std::vector<TraceEvent> Registry::trace() const {
  std::vector<TraceEvent> out;
  for (unsigned i = 0; i < kMaxRecords; ++i) {
    const WalkRecord& r = impl_->records[i];
    const WalkRecord::Slot* ring = r.ring.load();
    if (ring == nullptr) continue;
    for (std::uint32_t k = 0; k < impl_->opt.trace_events; ++k) {
      const WalkRecord::Slot& s = ring[k];
      const std::uint64_t seq = s.seq.load(std::memory_order_acquire);
      if (seq == 0 || (seq & 1) != 0) continue;
      std::uint64_t w[7];
      for (std::size_t j = 0; j < 7; ++j) w[j] = s.words[j].load(std::memory_order_acquire);
      if (s.seq.load(std::memory_order_acquire) != seq) continue;
      TraceEvent e;
      e.when = TimePoint(Nanoseconds(static_cast<std::int64_t>(w[0])));
      e.pass = w[1] >> 24;
      e.kind = static_cast<TraceEvent::Kind>(w[1] >> 16 & 0xff);
      e.reason = static_cast<Reason>(w[1] >> 8 & 0xff);
      e.status = static_cast<ScanStatus>(w[1] & 0xff);
      e.shrinker_id = static_cast<std::uint32_t>(w[2] >> 32);
      e.group_id = static_cast<std::uint32_t>(w[2]);
      e.elapsed = Nanoseconds(w[3] >> 16);
      e.node = static_cast<std::int8_t>(w[3] >> 8);
      e.priority = static_cast<std::int8_t>(w[3]);
      e.freeable = w[4];
      e.scanned = w[5];
      e.freed_bytes = w[6];
      out.push_back(e);
    }
  }
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) {
    return a.when != b.when ? a.when < b.when : a.kind < b.kind;
  });
  return out;
}

std::string Registry::trace_text() const {
  std::string out;
  for (const TraceEvent& e : trace()) {
    const char* kind = e.kind == TraceEvent::Kind::kBegin   ? "begin"
                       : e.kind == TraceEvent::Kind::kEnd   ? "end"
                       : e.kind == TraceEvent::Kind::kSkip  ? "skip"
                                                            : "shrink";
    append(out, "%lld pass %llu %s %s group %u node %d prio %d",
           static_cast<long long>(e.when.time_since_epoch().count()), ull(e.pass), kind,
           std::string(to_string(e.reason)).c_str(), e.group_id, e.node, e.priority);
    if (e.kind == TraceEvent::Kind::kShrink) {
      append(out, " shrinker %u freeable %llu scanned %llu freed %llu B %s %lld ns", e.shrinker_id,
             ull(e.freeable), ull(e.scanned), ull(e.freed_bytes), std::string(to_string(e.status)).c_str(),
             static_cast<long long>(e.elapsed.count()));
    } else if (e.kind == TraceEvent::Kind::kEnd) {
      append(out, " visits %llu scanned %llu freed %llu B %lld ns", ull(e.freeable), ull(e.scanned),
             ull(e.freed_bytes), static_cast<long long>(e.elapsed.count()));
    }
    out += '\n';
  }
  return out;
}

ReclaimResult Registry::totals() const {
  ReclaimResult r;
  const auto& t = impl_->totals;
  r.freed_bytes = t.freed_bytes.load(kRelaxed);
  r.freed_objects = t.freed_objects.load(kRelaxed);
  r.scanned = t.scanned.load(kRelaxed);
  r.calls = t.calls.load(kRelaxed);
  r.shrinkers = t.shrinkers.load(kRelaxed);
  r.groups = t.groups.load(kRelaxed);
  for (std::size_t i = 0; i < kNotFreedReasons; ++i) r.not_freed[i] = t.not_freed[i].load(kRelaxed);
  return r;
}

std::string to_text(const ReclaimResult& r) {
  std::string out;
  append(out, "%s: freed %llu bytes (%llu objects) of %llu scanned in %llu calls, %llu visits, %llu groups; ",
         std::string(to_string(r.status)).c_str(), ull(r.freed_bytes), ull(r.freed_objects), ull(r.scanned),
         ull(r.calls), ull(r.shrinkers), ull(r.groups));
  append_reasons(out, r.not_freed);
  out += '\n';
  return out;
}

std::string Registry::to_text() {
  std::string out;
  append(out, "passes %llu, shrinkers %u, groups %u, stuck now %u\n",
         ull(impl_->totals.passes.load(kRelaxed)), impl_->ids.size(), impl_->group_count.load(),
         impl_->stuck_count.load());
  out += "total ";
  out += spillway::reclaim::to_text(totals());
  out += spillway::reclaim::to_text(rcu_status());
  for (int n = 0; n < impl_->opt.nodes; ++n) {
    const BackgroundStats b = background_stats(n);
    append(out, "node %d: usage %llu, background wakeups %llu runs %llu freed %llu gave up %llu\n", n,
           ull(node_usage(n)), ull(b.wakeups), ull(b.runs), ull(b.freed_bytes), ull(b.gave_up));
  }
  for (const GroupRef& g : groups()) {
    const GroupLimits l = g->limits();
    const GroupStats s = g->stats();
    append(out, "group %u %s: usage %llu min %llu low %llu high %lld max %lld weight %u, failed %llu, ",
           g->id(), g->path().c_str(), ull(s.usage), ull(l.min), ull(l.low),
           static_cast<long long>(l.high), static_cast<long long>(l.max), l.weight, ull(s.charge_failures));
    append(out, "direct %llu, over high %llu, below low %llu, reclaimed %llu\n", ull(s.direct_reclaims),
           ull(s.high_events), ull(s.low_events), ull(s.reclaimed_bytes));
  }
  for (const ShrinkerStats& s : list()) {
    append(out, "shrinker %s: visits %llu scans %llu scanned %llu freed %llu objects %llu bytes, last %s%s; ",
           s.name.c_str(), ull(s.count_calls), ull(s.scan_calls), ull(s.scanned), ull(s.freed_objects),
           ull(s.freed_bytes), std::string(to_string(s.last_status)).c_str(),
           s.quarantined ? ", in quarantine" : "");
    append(out, "time %lld ns max %lld ns, busy %llu stop %llu empty %llu throw %llu misreport %llu ",
           static_cast<long long>(s.time_total.count()), static_cast<long long>(s.time_max.count()),
           ull(s.busy), ull(s.stops), ull(s.empties), ull(s.throws), ull(s.misreports));
    append(out, "overrun %llu skipped %llu; ", ull(s.overruns), ull(s.skipped));
    append_reasons(out, s.not_freed);
    out += '\n';
  }
  return out;
}

}  // namespace spillway::reclaim
