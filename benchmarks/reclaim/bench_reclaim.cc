// bench reclaim: W1-W7 and S11 of research/reclaim.md, and the gates of issue 3.
//
//   --rounds N    runs of each contestant (10)     --seconds S   length of one run (0.2)
//   --only W1     one workload
#include <pthread.h>

#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <thread>

#include "benchmarks/common/bench.h"
#include "benchmarks/reclaim/schemes.h"

namespace {

using namespace spillway::reclaim;
using namespace spillway::reclaim::bench;
namespace sb = spillway::bench;

CountReport nothing_now(const ScanRequest&) { return {}; }
ScanReport scan_none(const ScanRequest& q) { return {q.nr_to_scan, 0, 0}; }

// 200 ns of work; the objects stay, so the bit does.
CountReport busy_200ns(const ScanRequest&) {
  const std::uint64_t end = sb::now_ns() + 200;
  while (sb::now_ns() < end) {
  }
  return {};
}

struct StormResult {
  std::uint64_t ops = 0;
  std::vector<double> free_us;
};

// Register and free until `end`.
StormResult storm(Scheme& s, const std::atomic<bool>& end, int cpu) {
  sb::pin(cpu);
  StormResult r;
  r.free_us.reserve(1 << 18);
  while (!end.load(std::memory_order_relaxed)) {
    const auto h = s.add(nothing_now, scan_none);
    const std::uint64_t t = sb::now_ns();
    s.remove(h);
    if (r.free_us.size() < (1 << 18)) r.free_us.push_back(static_cast<double>(sb::now_ns() - t) / 1000);
    ++r.ops;
  }
  return r;
}

struct Samples {
  std::map<std::string, std::vector<double>> ops, p50, p99, p999, other, bails;
};

void sleep_s(double s) { std::this_thread::sleep_for(std::chrono::duration<double>(s)); }

StormResult run_storm(Scheme& s, int threads, double seconds, double* ops_per_s) {
  std::atomic<bool> end{false};
  std::vector<StormResult> results(static_cast<std::size_t>(threads));
  std::vector<std::thread> pool;
  const std::uint64_t start = sb::now_ns();
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] { results[static_cast<std::size_t>(i)] = storm(s, end, i); });
  }
  sleep_s(seconds);
  end = true;
  for (auto& t : pool) t.join();
  const double took = static_cast<double>(sb::now_ns() - start) / 1e9;
  StormResult all;
  for (auto& r : results) {
    all.ops += r.ops;
    all.free_us.insert(all.free_us.end(), r.free_us.begin(), r.free_us.end());
  }
  *ops_per_s = static_cast<double>(all.ops) / took;
  return all;
}

void note(Samples& s, const std::string& name, const StormResult& r, double ops) {
  s.ops[name].push_back(ops);
  s.p50[name].push_back(sb::percentile(r.free_us, 0.5));
  s.p99[name].push_back(sb::percentile(r.free_us, 0.99));
  s.p999[name].push_back(sb::percentile(r.free_us, 0.999));
}

sb::Json row(Samples& s, const std::string& name) {
  return {{"scheme", name},           {"ops_s", sb::median(s.ops[name])},
          {"spread", sb::spread(s.ops[name])}, {"free_us_p50", sb::median(s.p50[name])},
          {"free_us_p99", sb::median(s.p99[name])}, {"free_us_p999", sb::median(s.p999[name])},
          {"runs", s.ops[name].size()}};
}

// ---- W1: register and free, nothing else going on

void w1(sb::Report& rep, int rounds, double seconds) {
  for (int threads : {1, 2}) {
    Samples s;
    std::vector<sb::Contestant> all;
    for (const auto& name : scheme_names()) {
      all.push_back({name, [&, name] {
        auto scheme = make_scheme(name);
        double ops = 0;
        const StormResult r = run_storm(*scheme, threads, seconds, &ops);
        note(s, name, r, ops);
        if (name == "ours") s.other[name].push_back(static_cast<double>(rcu_status().backlog_objects_max));
      }});
    }
    sb::interleave(rounds, all);
    for (const auto& name : scheme_names()) {
      rep.run("W1 register+free idle, " + std::to_string(threads) + " threads", row(s, name));
    }
    const std::string t = std::to_string(threads) + " threads";
    rep.gate("W1 ours / rwlock, " + t, sb::median(s.ops["ours"]) / sb::median(s.ops["rwlock"]), ">=", 0.95);
    rep.gate("W1 ours / plain SRCU, " + t, sb::median(s.ops["ours"]) / sb::median(s.ops["srcu"]), ">=", 5);
    const RcuStatus st = rcu_status();
    rep.run("W1 grace-period backlog", {{"max_objects", st.backlog_objects_max}, {"now", st.backlog_objects},
                                        {"retired", st.retired}, {"membarrier", st.membarrier}});
    rep.gate("W1 backlog bounded (objects)", static_cast<double>(st.backlog_objects_max), "<=", 250'000);
  }
}

// ---- W2: the same beside walkers with 200 ns callbacks

struct Walks {
  std::uint64_t walks = 0, visits = 0, bails = 0;
};

Walks walker(Scheme& s, const std::atomic<bool>& end, int cpu) {
  sb::pin(cpu);
  Walks w;
  while (!end.load(std::memory_order_relaxed)) {
    const WalkResult r = s.walk();
    ++w.walks;
    w.visits += r.visits;
    w.bails += r.bailed;
  }
  return w;
}

void w2(sb::Report& rep, int rounds, double seconds) {
  constexpr int kShrinkers = 64;
  Samples s;
  std::vector<sb::Contestant> all;
  for (const auto& name : scheme_names()) {
    all.push_back({name, [&, name] {
      auto scheme = make_scheme(name);
      std::vector<Scheme::Handle> fixed;
      for (int i = 0; i < kShrinkers; ++i) fixed.push_back(scheme->add(busy_200ns, scan_none));
      std::atomic<bool> end{false};
      Walks w;
      std::thread t([&] { w = walker(*scheme, end, 1); });
      double ops = 0;
      const StormResult r = run_storm(*scheme, 1, seconds, &ops);
      end = true;
      t.join();
      for (auto h : fixed) scheme->remove(h);
      note(s, name, r, ops);
      s.other[name].push_back(static_cast<double>(w.visits) / seconds);
      s.bails[name].push_back(static_cast<double>(w.bails));
    }});
  }
  sb::interleave(rounds, all);
  for (const auto& name : scheme_names()) {
    auto j = row(s, name);
    j["visits_s"] = sb::median(s.other[name]);
    j["walks_skipped"] = sb::median(s.bails[name]);
    rep.run("W2 register+free beside a walker", j);
  }
  double skipped = 0;
  for (double b : s.bails["ours"]) skipped += b;
  rep.gate("W2 ours walks skipped", skipped, "==", 0);
  rep.gate("W2 ours / rwlock register+free", sb::median(s.ops["ours"]) / sb::median(s.ops["rwlock"]), ">=", 5);

  // Walk throughput with one and two walkers, nothing registered meanwhile.
  std::map<std::string, std::vector<double>> one, two;
  std::vector<sb::Contestant> walks;
  for (const char* name : {"rwlock", "rcu-list", "ours-1", "ours"}) {
    for (int threads : {1, 2}) {
      walks.push_back({name, [&, name, threads] {
        auto scheme = make_scheme(name);
        std::vector<Scheme::Handle> fixed;
        for (int i = 0; i < kShrinkers; ++i) fixed.push_back(scheme->add(busy_200ns, scan_none));
        std::atomic<bool> end{false};
        std::vector<std::thread> pool;
        std::atomic<std::uint64_t> visits{0};
        const std::uint64_t start = sb::now_ns();
        for (int i = 0; i < threads; ++i) pool.emplace_back([&, i] { visits += walker(*scheme, end, i).visits; });
        sleep_s(seconds);
        end = true;
        for (auto& t : pool) t.join();
        (threads == 1 ? one : two)[name].push_back(static_cast<double>(visits) * 1e9 /
                                                   static_cast<double>(sb::now_ns() - start));
        for (auto h : fixed) scheme->remove(h);
      }});
    }
  }
  sb::interleave(rounds, walks);
  for (const char* name : {"rwlock", "rcu-list", "ours-1", "ours"}) {
    rep.run("W2 walk throughput", {{"scheme", name}, {"one_visits_s", sb::median(one[name])}, {"spread_one", sb::spread(one[name])},
                                   {"two_visits_s", sb::median(two[name])}, {"spread_two", sb::spread(two[name])},
                                   {"scaling", sb::median(two[name]) / sb::median(one[name])}});
  }
  if (sb::cpus() >= 2) rep.gate("W2 ours two walkers / one", sb::median(two["ours"]) / sb::median(one["ours"]), ">=", 1.6);
}

// ---- W3: cost of a pass over shrinkers and groups

void w3(sb::Report& rep, int rounds) {
  struct Case {
    int registered, set;
  };
  const Case cases[] = {{10, 10}, {100, 100}, {1000, 100}, {10'000, 100}, {100'000, 100}, {10'000, 10'000}};
  std::map<int, std::vector<double>> ns;
  for (std::size_t c = 0; c < std::size(cases); ++c) {
    Registry reg;
    std::vector<Shrinker> all;
    std::mutex m;
    for (int i = 0; i < cases[c].registered; ++i) {
      Shrinker s = reg.alloc(ShrinkerFlags::kNone, "w3");
      s.set_count(busy_200ns);
      s.set_scan(scan_none);
      s.register_();
      all.push_back(std::move(s));
    }
    const int step = cases[c].registered / cases[c].set;
    for (int i = 0; i < cases[c].set; ++i) all[static_cast<std::size_t>(i * step)].set_bit();
    sb::pin(1);
    for (int r = 0; r < rounds; ++r) {
      const int passes = 100'000 / cases[c].set / 10 + 1;
      reg.reclaim({.priority = 12, .priority_end = 12});
      const std::uint64_t t = sb::now_ns();
      for (int p = 0; p < passes; ++p) reg.reclaim({.priority = 12, .priority_end = 12});
      ns[static_cast<int>(c)].push_back(static_cast<double>(sb::now_ns() - t) / passes);
    }
    rep.run("W3 pass", {{"registered", cases[c].registered}, {"with_objects", cases[c].set},
                        {"ns", sb::median(ns[static_cast<int>(c)])}, {"spread", sb::spread(ns[static_cast<int>(c)])}});
  }
  rep.gate("W3 pass over 10^5 with 0.1 % set / 10^2 all set", sb::median(ns[4]) / sb::median(ns[1]), "<=", 1.2);

  // Groups: the same 100 shrinkers with objects in one group, alone and among 10^4 empty groups.
  Registry with, without;
  std::vector<Shrinker> keep;
  std::vector<GroupRef> groups;
  for (Registry* reg : {&with, &without}) {
    GroupRef g = reg->create_group("busy");
    if (reg == &with) {
      for (int i = 0; i < 10'000; ++i) groups.push_back(reg->create_group("g" + std::to_string(i)));
    }
    for (int i = 0; i < 100; ++i) {
      Shrinker s = reg->alloc(ShrinkerFlags::kGroupAware, "w3g");
      s.set_count(busy_200ns);
      s.set_scan(scan_none);
      s.register_();
      s.set_bit(*g);
      keep.push_back(std::move(s));
    }
  }
  std::vector<double> a, b;
  const auto time_it = [&](Registry& reg, std::vector<double>& out) {
    return [&reg, &out] {
      const std::uint64_t t = sb::now_ns();
      for (int p = 0; p < 200; ++p) reg.reclaim({.priority = 12, .priority_end = 12});
      out.push_back(static_cast<double>(sb::now_ns() - t) / 200);
    };
  };
  sb::interleave(rounds, {{"with", time_it(with, a)}, {"without", time_it(without, b)}});
  rep.run("W3 10^4 empty groups", {{"with_ns", sb::median(a)}, {"without_ns", sb::median(b)}, {"spread", sb::spread(a)}});
  rep.gate("W3 pass with 10^4 empty groups / without", sb::median(a) / sb::median(b), "<=", 1.05);
}

// ---- W4: one shrinker blocked for a second

void w4(sb::Report& rep, int rounds) {
  std::map<std::string, std::vector<double>> p99, worst, frees;
  std::vector<sb::Contestant> all;
  for (const char* name : {"rwlock", "rwlock-yield", "srcu-expedited", "mutex", "rcu-list", "ours"}) {
    all.push_back({name, [&, name] {
      auto scheme = make_scheme(name);
      std::atomic<int> state{0};
      const auto h = scheme->add([&](const ScanRequest&) -> CountReport {
        if (state.exchange(1) == 0) {
          state.notify_all();
          sleep_s(1.0);
        }
        return {};
      }, scan_none);
      std::thread stuck([&] { scheme->walk(); });
      state.wait(0);
      // The frees that came within that second; one that starts in it counts with all its time.
      std::vector<double> us;
      const std::uint64_t end = sb::now_ns() + 900'000'000;
      while (sb::now_ns() < end) {
        // Registration is part of the storm: a scheme that stops it has fewer, slower operations.
        const std::uint64_t t = sb::now_ns();
        const auto other = scheme->add(nothing_now, scan_none);
        scheme->remove(other);
        us.push_back(static_cast<double>(sb::now_ns() - t) / 1000);
        if (us.size() > 200'000) break;
      }
      stuck.join();
      scheme->remove(h);
      p99[name].push_back(sb::percentile(us, 0.99));
      worst[name].push_back(sb::percentile(us, 1));
      frees[name].push_back(static_cast<double>(us.size()));
    }});
  }
  sb::interleave(std::max(1, rounds / 3), all);
  for (const char* name : {"rwlock", "rwlock-yield", "srcu-expedited", "mutex", "rcu-list", "ours"}) {
    rep.run("W4 register+free of others, one blocked 1 s", {{"scheme", name}, {"us_p99", sb::median(p99[name])},
             {"us_max", sb::median(worst[name])}, {"frees", sb::median(frees[name])}, {"runs", p99[name].size()}});
  }
  rep.gate("W4 ours p99 (us)", sb::median(p99["ours"]), "<", 1000);
}

// ---- W5: set_bit

void w5(sb::Report& rep, int rounds) {
  Registry reg;
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "w5");
  s.set_count(nothing_now);
  s.set_scan(scan_none);
  s.register_();
  std::vector<double> set, two;
  for (int r = 0; r < rounds; ++r) {
    const std::uint64_t t = sb::now_ns();
    for (int i = 0; i < 1'000'000; ++i) s.set_bit();
    set.push_back(static_cast<double>(sb::now_ns() - t) / 1e6);
    std::thread other([&] {
      sb::pin(1);
      for (int i = 0; i < 1'000'000; ++i) s.set_bit();
    });
    sb::pin(0);
    const std::uint64_t t2 = sb::now_ns();
    for (int i = 0; i < 1'000'000; ++i) s.set_bit();
    two.push_back(static_cast<double>(sb::now_ns() - t2) / 1e6);
    other.join();
  }
  struct Obj : LruItem {};
  ListLru lru(reg, &s);
  std::vector<double> lru_ns;
  const GroupRef root = reg.root();
  std::vector<Obj> objs(1000);
  for (int r = 0; r < rounds; ++r) {
    const std::uint64_t t = sb::now_ns();
    for (int k = 0; k < 100; ++k) {
      for (auto& o : objs) lru.add(o, *root, 0, 64);
      for (auto& o : objs) lru.del(o, *root, 0, 64);
    }
    lru_ns.push_back(static_cast<double>(sb::now_ns() - t) / 100'000);
  }
  rep.run("W5 set_bit", {{"already_set_ns", sb::median(set)}, {"two_threads_ns", sb::median(two)}, {"spread", sb::spread(set)},
                         {"list_lru_add_del_ns", sb::median(lru_ns)}});
}

// ---- W6: a step in demand against a limit

void w6(sb::Report& rep, int rounds) {
  std::vector<double> first_ms, over, p999, recovery_ms;
  for (int r = 0; r < rounds; ++r) {
    Registry reg;
    GroupRef g = reg.create_group("t");
    constexpr std::uint64_t kObj = 4096, kLimit = 64u << 20;
    std::mutex m;
    std::uint64_t cached = 0;  // guarded by m
    Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "w6");
    s.set_count([&](const ScanRequest&) {
      std::lock_guard lock(m);
      return cached != 0 ? CountReport{cached, cached * kObj, 0} : CountReport::empty();
    });
    s.set_scan([&](const ScanRequest& q) {
      ScanReport out;
      {
        std::lock_guard lock(m);
        out.scanned = out.freed_objects = std::min(q.nr_to_scan, cached);
        cached -= out.scanned;
      }
      out.freed_bytes = out.scanned * kObj;
      q.group->uncharge(out.freed_bytes);
      return out;
    });
    s.register_();
    reg.start_background();
    reg.set_capacity(0, kLimit, {.low = 4u << 20, .high = 8u << 20});
    g->set_max(kLimit);
    std::vector<double> us;
    std::uint64_t peak = 0, full_at = 0;
    const std::uint64_t start = sb::now_ns();
    for (int i = 0; i < 100'000; ++i) {
      const std::uint64_t t = sb::now_ns();
      const bool ok = g->try_charge(kObj);
      us.push_back(static_cast<double>(sb::now_ns() - t) / 1000);
      if (!ok) continue;
      {
        std::lock_guard lock(m);
        ++cached;
      }
      s.set_bit(*g);
      peak = std::max(peak, g->usage());
      if (full_at == 0 && peak > kLimit / 2) full_at = sb::now_ns();
    }
    first_ms.push_back(static_cast<double>(full_at - start) / 1e6);
    over.push_back(peak > kLimit ? static_cast<double>(peak - kLimit) : 0);
    p999.push_back(sb::percentile(us, 0.999));
    // Half of it must go at once.
    const std::uint64_t t = sb::now_ns();
    g->set_max(kLimit / 2);
    recovery_ms.push_back(static_cast<double>(sb::now_ns() - t) / 1e6);
    if (g->usage_exact() > kLimit / 2) std::printf("W6: not at the target\n");
    reg.stop_background();
    std::uint64_t left;
    {
      std::lock_guard lock(m);
      left = cached;
    }
    g->uncharge(left * kObj);
  }
  rep.run("W6 step in demand", {{"overshoot_bytes", sb::percentile(over, 1)}, {"charge_us_p999", sb::median(p999)},
                                {"ms_to_halve_64MiB", sb::median(recovery_ms)}, {"spread", sb::spread(recovery_ms)}});
  rep.gate("W6 overshoot over max (bytes)", sb::percentile(over, 1), "<=", 0);
}

// ---- W7: a thousand refusals, then release

void w7(sb::Report& rep) {
  Registry reg;
  bool stop = true;
  std::uint64_t have = 100'000;
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "w7");
  s.set_count([&](const ScanRequest&) { return CountReport{have, have, 0}; });
  s.set_scan([&](const ScanRequest& q) {
    ScanReport r;
    if (stop) {
      r.status = ScanStatus::kStop;
      return r;
    }
    r.scanned = r.freed_objects = r.freed_bytes = std::min(q.nr_to_scan, have);
    have -= r.scanned;
    return r;
  });
  s.register_();
  s.set_bit();
  for (int i = 0; i < 1000; ++i) reg.reclaim({.priority = 4, .priority_end = 4});
  stop = false;
  reg.reclaim({.priority = 4, .priority_end = 4});
  const double dropped = static_cast<double>(100'000 - have) / 1000;
  // A pass at priority 4 owes 12.5 % by itself; the kernel's cap of twice the cache adds another 12.5 %.
  rep.run("W7 1000 stops, then release at priority 4", {{"percent_dropped", dropped}, {"percent_own_share", 12.5}});
  rep.gate("W7 percent of the cache dropped", dropped, "<=", 20);
}

// ---- S11: attach and detach storms beside long reclaim

void s11(sb::Report& rep, int rounds, double seconds) {
  std::map<std::string, std::vector<double>> ops, visits, p99;
  const auto one = [&](const char* name, bool lock_all) {
    Registry reg;
    pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;  // lock_all: what a global lock does to the same load
    std::vector<Shrinker> fixed;
    for (int i = 0; i < 64; ++i) {
      Shrinker s = reg.alloc(ShrinkerFlags::kNone, "guest-cache");
      s.set_count([](const ScanRequest&) { return CountReport{1000, 4'096'000, 0}; });
      s.set_scan([](const ScanRequest& q) {
        busy_200ns(q);
        return ScanReport{q.nr_to_scan, q.nr_to_scan / 2, q.nr_to_scan * 2048};
      });
      s.register_();
      s.set_bit();
      fixed.push_back(std::move(s));
    }
    std::atomic<bool> end{false};
    std::atomic<std::uint64_t> seen{0};
    std::thread pressure([&] {
      sb::pin(1);
      while (!end) {
        if (lock_all) pthread_rwlock_rdlock(&lock);
        seen += reg.reclaim({}).shrinkers;
        if (lock_all) pthread_rwlock_unlock(&lock);
      }
    });
    sb::pin(0);
    std::vector<double> us;
    std::uint64_t n = 0;
    const std::uint64_t start = sb::now_ns(), stop = start + static_cast<std::uint64_t>(seconds * 1e9);
    while (sb::now_ns() < stop) {
      const std::uint64_t t = sb::now_ns();
      GroupRef g = reg.create_group("vm" + std::to_string(n));
      Shrinker s[3];
      for (auto& x : s) {
        x = reg.alloc(ShrinkerFlags::kGroupAware, "vm");
        x.set_count([](const ScanRequest&) { return CountReport{10, 40960, 0}; });
        x.set_scan(scan_none);
        if (lock_all) pthread_rwlock_wrlock(&lock);
        x.register_();
        if (lock_all) pthread_rwlock_unlock(&lock);
        x.set_bit(*g);
      }
      for (auto& x : s) {
        if (lock_all) pthread_rwlock_wrlock(&lock);
        x.free();
        if (lock_all) pthread_rwlock_unlock(&lock);
      }
      reg.remove_group(*g);
      us.push_back(static_cast<double>(sb::now_ns() - t) / 1000);
      ++n;
    }
    end = true;
    pressure.join();
    const double took = static_cast<double>(sb::now_ns() - start) / 1e9;
    ops[name].push_back(static_cast<double>(n) / took);
    visits[name].push_back(static_cast<double>(seen) / took);
    p99[name].push_back(sb::percentile(us, 0.99));
  };
  sb::interleave(rounds, {{"ours", [&] { one("ours", false); }}, {"global rwlock", [&] { one("global rwlock", true); }}});
  for (const char* name : {"ours", "global rwlock"}) {
    rep.run("S11 attach+detach (group, 3 shrinkers) beside reclaim", {{"scheme", name}, {"guests_s", sb::median(ops[name])},
             {"spread", sb::spread(ops[name])}, {"us_p99", sb::median(p99[name])}, {"visits_s", sb::median(visits[name])}});
  }
  rep.gate("S11 ours / global rwlock, guests per second", sb::median(ops["ours"]) / sb::median(ops["global rwlock"]), ">=", 2);
}

}  // namespace

int main(int argc, char** argv) {
  sb::Report rep("reclaim", argc, argv);
  const int rounds = static_cast<int>(rep.option("rounds", 10));
  const double seconds = rep.option("seconds", 0.2);
  const std::string only = rep.option("only", "");
  const auto wants = [&](const char* w) { return only.empty() || only == w; };
  std::fputs(to_text(rcu_status()).c_str(), stdout);
  if (wants("W1")) w1(rep, rounds, seconds);
  if (wants("W2")) w2(rep, rounds, seconds);
  if (wants("W3")) w3(rep, rounds);
  if (wants("W4")) w4(rep, rounds);
  if (wants("W5")) w5(rep, rounds);
  if (wants("W6")) w6(rep, rounds);
  if (wants("W7")) w7(rep);
  if (wants("S11")) s11(rep, rounds, seconds);
  return rep.finish();
}
