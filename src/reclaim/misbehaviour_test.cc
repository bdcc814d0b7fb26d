// Whatever a callback does, a pass ends, others go on, and the text says who it was.
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <thread>

#include "spillway/reclaim/reclaim.h"

namespace spillway::reclaim {
namespace {

using namespace std::chrono_literals;

Shrinker make(Registry& r, CountFn c, ScanFn s, ShrinkerFlags f = ShrinkerFlags::kNone, unsigned seeks = 2) {
  Shrinker h = r.alloc(f, "odd");
  h.set_count(std::move(c));
  h.set_scan(std::move(s));
  h.set_seeks(seeks);
  h.register_();
  h.set_bit();
  return h;
}
CountFn always(std::uint64_t n) {
  return [n](const ScanRequest&) { return CountReport{n, n, 0}; };
}

TEST(Misbehaviour, scanned_zero_ends) {  // weakness 9
  Registry reg;
  int calls = 0;
  Shrinker s = make(reg, always(1000), [&](const ScanRequest&) {
    ++calls;
    return ScanReport{};
  });
  const auto r = reg.reclaim({});
  EXPECT_EQ(r.status, ReclaimStatus::kExhausted);
  EXPECT_LE(calls, 13);
  EXPECT_GT(reg.stats(s.id()).busy, 0u) << "freed nothing is told from cannot";
  EXPECT_EQ(reg.stats(s.id()).stops, 0u);
}

TEST(Misbehaviour, scanned_one_at_a_time_is_bounded) {
  Registry reg;
  int calls = 0;
  Shrinker s = make(reg, always(1'000'000), [&](const ScanRequest&) {
    ++calls;
    return ScanReport{1, 0, 0};
  });
  reg.reclaim({});
  EXPECT_LT(calls, 13 * 2 * (2'000'000 / 128 + 2));
}

TEST(Misbehaviour, more_freed_than_counted_is_clamped) {
  std::string what;
  Registry reg({.diagnostics = [&](const Diagnostic& d) { what = d.what; }});
  Shrinker s = make(reg, always(100), [&](const ScanRequest& q) {
    return ScanReport{q.nr_to_scan * 10, q.nr_to_scan * 10, std::uint64_t{1} << 62};
  });
  const auto r = reg.reclaim({.target_bytes = 1u << 30});
  EXPECT_LT(r.freed_bytes, 1u << 20);
  EXPECT_GT(reg.stats(s.id()).misreports, 0u);
  EXPECT_EQ(what, "misreport");
}

TEST(Misbehaviour, throw_is_stop_and_leads_to_quarantine) {
  Registry reg({.quarantine_after = 2});
  Shrinker bad = make(reg, always(100), [](const ScanRequest&) -> ScanReport { throw 1; });
  Shrinker worse = make(reg, [](const ScanRequest&) -> CountReport { throw 2; }, [](const ScanRequest&) { return ScanReport{}; });
  std::atomic<int> good_calls{0};
  Shrinker good = make(reg, always(1000), [&](const ScanRequest& q) {
    ++good_calls;
    return ScanReport{q.nr_to_scan, q.nr_to_scan, q.nr_to_scan};
  });
  const auto r = reg.reclaim({});
  EXPECT_GT(good_calls, 0);
  EXPECT_GT(r.freed_bytes, 0u);
  EXPECT_EQ(reg.stats(bad.id()).throws, 2u);
  EXPECT_TRUE(reg.stats(worse.id()).quarantined);
  EXPECT_NE(reg.to_text().find("in quarantine"), std::string::npos);
}

TEST(Misbehaviour, reclaim_and_charge_inside_a_callback_do_not_recurse) {
  Registry reg;
  GroupRef g = reg.create_group("g");
  g->set_max(10);
  ReclaimStatus inner = ReclaimStatus::kReached;
  bool charged = false;
  Shrinker s = make(reg, always(1000), [&](const ScanRequest& q) {
    EXPECT_TRUE(Registry::in_reclaim());
    inner = reg.reclaim({}).status;
    charged = g->try_charge(1000);
    g->uncharge(1000);
    return ScanReport{q.nr_to_scan, 0, 0};
  });
  reg.reclaim({});
  EXPECT_EQ(inner, ReclaimStatus::kRecursion);
  EXPECT_TRUE(charged);
  EXPECT_FALSE(Registry::in_reclaim());
}

TEST(Misbehaviour, registers_and_frees_others_in_a_callback) {
  Registry reg;
  Shrinker other = make(reg, always(1), [](const ScanRequest&) { return ScanReport{}; });
  Shrinker born;
  Shrinker s = make(reg, always(1000), [&](const ScanRequest& q) {
    if (other) { EXPECT_EQ(other.free(), Errc::kOk); }
    if (!born) born = make(reg, always(1), [](const ScanRequest&) { return ScanReport{}; });
    return ScanReport{q.nr_to_scan, 0, 0};
  });
  reg.reclaim({});
  EXPECT_FALSE(other);
  EXPECT_TRUE(born);
}

TEST(Misbehaviour, two_callbacks_that_free_each_other_are_told) {
  Registry reg({.time_budget = 3600s});
  Shrinker a, b;
  std::latch both(2);
  std::atomic<int> in_a{0}, in_b{0};
  std::atomic<int> refused{0};
  const auto body = [&](Shrinker& victim, std::atomic<int>& entered) {
    return [&](const ScanRequest&) {
      if (entered.fetch_add(1) == 0) {
        both.arrive_and_wait();
        if (victim.free() == Errc::kDeadlock) ++refused;
      }
      return CountReport{};
    };
  };
  const auto nothing = [](const ScanRequest&) { return ScanReport{}; };
  a = reg.alloc(ShrinkerFlags::kGroupAware, "a");
  a.set_count(body(b, in_a));
  a.set_scan(nothing);
  a.register_();
  b = reg.alloc(ShrinkerFlags::kGroupAware, "b");
  b.set_count(body(a, in_b));
  b.set_scan(nothing);
  b.register_();
  GroupRef ga = reg.create_group("a"), gb = reg.create_group("b");
  a.set_bit(*ga);
  b.set_bit(*gb);
  std::thread ta([&] { reg.reclaim({.group = ga.get(), .priority = 0}); });
  std::thread tb([&] { reg.reclaim({.group = gb.get(), .priority = 0}); });
  ta.join();
  tb.join();
  EXPECT_GE(refused, 1);
  EXPECT_TRUE(a || b) << "at least one was refused";
}

TEST(Misbehaviour, blocked_shrinker_is_passed_by_and_delays_nobody) {  // S6
  Registry reg({.time_budget = 1ms});
  std::atomic<bool> inside{false}, release{false};
  std::atomic<int> entered{0};
  Shrinker blocked = make(reg, [&](const ScanRequest&) {
    ++entered;
    inside = true;
    inside.notify_all();
    release.wait(false);
    return CountReport{};
  }, [](const ScanRequest&) { return ScanReport{}; });
  std::thread stuck([&] { reg.reclaim({.priority = 0}); });
  inside.wait(false);
  std::atomic<std::uint64_t> others{0};
  Shrinker other = make(reg, always(1000), [&](const ScanRequest& q) {
    others += q.nr_to_scan;
    return ScanReport{q.nr_to_scan, q.nr_to_scan, q.nr_to_scan};
  });
  // Wait until the budget is over, then a pass goes by it, and register and free of others are as ever.
  const TimePoint start = reg.clock().now();
  while (reg.clock().now() - start < 2ms) std::this_thread::yield();
  const auto r = reg.reclaim({.target_bytes = 100});
  EXPECT_EQ(r.status, ReclaimStatus::kReached) << to_text(r);
  EXPECT_EQ(entered, 1);
  EXPECT_EQ(reg.reclaim({.priority = 0}).not_freed[static_cast<int>(NotFreed::kSkipped)], 1u);
  EXPECT_EQ(other.free(), Errc::kOk);
  release = true;
  release.notify_all();
  stuck.join();
  EXPECT_EQ(reg.stats(blocked.id()).overruns, 1u);
  EXPECT_EQ(reg.stats(blocked.id()).skipped, entered == 1 ? reg.stats(blocked.id()).skipped : 0u);
}

// A reaction that comes to mind: free what was put into quarantine, at once. The walk still holds it.
TEST(Misbehaviour, free_in_a_diagnostics_callback_is_told_not_a_deadlock) {
  Shrinker s;
  Errc seen = Errc::kOk;
  ReclaimStatus inner = ReclaimStatus::kReached;
  Registry reg({.quarantine_after = 1, .diagnostics = [&](const Diagnostic& d) {
    if (d.what != "quarantine") return;
    seen = s.free();
    inner = reg.reclaim({}).status;
  }});
  s = make(reg, always(10), [](const ScanRequest&) -> ScanReport { throw 1; });
  reg.reclaim({});
  EXPECT_EQ(seen, Errc::kState);
  EXPECT_EQ(inner, ReclaimStatus::kRecursion);
  EXPECT_EQ(s.free(), Errc::kOk);
}

// By hand: counts() is a callback like any other, so it does not nest, and a circle through it is seen.
TEST(Misbehaviour, counts_inside_a_callback_asks_nobody) {
  Registry reg;
  std::size_t rows = 1;
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "s");
  s.set_count([&](const ScanRequest&) {
    rows = reg.counts(s.id()).size();
    EXPECT_EQ(s.free(), Errc::kSelfFree);
    return CountReport{};
  });
  s.set_scan([](const ScanRequest&) { return ScanReport{}; });
  s.register_();
  EXPECT_EQ(reg.counts(s.id()).size(), 1u);
  EXPECT_EQ(rows, 0u);
  GroupRef g = reg.create_group("g");
  EXPECT_EQ(reg.scan(s.id(), *g, 0, 1), Errc::kInvalid) << "it does not know groups";
}

// An orphan's last put destroys what the callbacks captured; that may wait for a grace period.
TEST(Misbehaviour, an_orphan_takes_its_captures_along_outside_of_rcu) {
  Registry reg;
  auto lru = std::make_shared<ListLru>(reg);
  std::weak_ptr<ListLru> seen = lru;
  auto s = std::make_unique<Shrinker>(reg.alloc(ShrinkerFlags::kNone, "orphan"));
  s->set_count([&s, lru](const ScanRequest&) {
    s.reset();
    return CountReport{};
  });
  s->set_scan([](const ScanRequest&) { return ScanReport{}; });
  s->register_();
  s->set_bit();
  lru.reset();
  reg.reclaim({.priority = 0});
  EXPECT_TRUE(seen.expired());
  EXPECT_TRUE(reg.list().empty());
}

TEST(Misbehaviour, deadline_ends_a_pass) {
  Registry reg;
  Shrinker s = make(reg, always(1'000'000), [&](const ScanRequest& q) { return ScanReport{q.nr_to_scan, 0, 0}; });
  const auto r = reg.reclaim({.deadline = reg.clock().now()});
  EXPECT_EQ(r.status, ReclaimStatus::kDeadline);
  EXPECT_EQ(r.calls, 0u);
}

TEST(Protection, min_and_low_hold_until_nothing_else_is_left) {
  Registry reg({.charge_slots = 1, .charge_batch_bytes = 1});
  std::atomic<std::uint64_t> have[4] = {};
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "p");
  GroupRef g[3] = {reg.root(), reg.create_group("low"), reg.create_group("min")};
  s.set_count([&](const ScanRequest& q) {
    const auto n = have[q.group->id()].load();
    return n != 0 ? CountReport{n, n, 0} : CountReport::empty();
  });
  s.set_scan([&](const ScanRequest& q) {
    ScanReport r;
    r.scanned = r.freed_objects = r.freed_bytes = std::min(q.nr_to_scan, have[q.group->id()].load());
    have[q.group->id()] -= r.freed_bytes;
    q.group->uncharge(r.freed_bytes);
    return r;
  });
  s.register_();
  for (const auto& x : g) {
    x->charge(10'000);
    have[x->id()] = 10'000;
    s.set_bit(*x);
  }
  g[1]->set_low(10'000);
  g[2]->set_min(10'000);
  auto r = reg.reclaim({.target_bytes = 9'000});
  EXPECT_EQ(r.status, ReclaimStatus::kReached);
  EXPECT_EQ(have[1], 10'000u);
  EXPECT_EQ(have[2], 10'000u);
  EXPECT_GT(r.not_freed[static_cast<int>(NotFreed::kProtected)], 0u);
  r = reg.reclaim({.target_bytes = 5'000});
  EXPECT_EQ(r.status, ReclaimStatus::kReached) << to_text(r);
  EXPECT_LT(have[1], 10'000u) << "low gives way when nothing else is left";
  EXPECT_GT(g[1]->stats().low_events, 0u);
  r = reg.reclaim({});
  EXPECT_EQ(have[2], 10'000u) << "min never does";
  g[2]->uncharge(10'000);
}

TEST(Background, watermarks_wake_the_thread_and_it_rests) {
  Registry reg({.charge_slots = 1, .charge_batch_bytes = 4096});
  std::atomic<std::uint64_t> have{0};
  Shrinker s = make(reg, [&](const ScanRequest&) {
    return have != 0 ? CountReport{have, have, 0} : CountReport::empty();
  }, [&](const ScanRequest& q) {
    ScanReport r;
    r.scanned = r.freed_objects = r.freed_bytes = std::min(q.nr_to_scan, have.load());
    have -= r.freed_bytes;
    reg.root()->uncharge(r.freed_bytes);
    have.notify_all();
    return r;
  });
  ASSERT_EQ(reg.start_background(), Errc::kOk);
  EXPECT_EQ(reg.start_background(), Errc::kState);
  reg.set_capacity(0, 1'000'000, {.low = 100'000, .high = 300'000});
  have = 950'000;
  s.set_bit();
  reg.root()->charge(950'000);
  for (auto v = have.load(); v > 700'000; v = have.load()) have.wait(v);
  reg.request_background(kAnyNode, 100'000);
  for (auto v = have.load(); v > 600'000; v = have.load()) have.wait(v);
  reg.stop_background();
  EXPECT_GE(reg.background_stats(0).runs, 2u);
  EXPECT_GE(have, 500'000u) << "not more than asked, but for a batch";
}

TEST(Parallel, workers_share_units_and_free_everything_once) {
  Registry reg({.workers = 3});
  constexpr int kN = 500;
  std::vector<std::atomic<std::uint64_t>> have(kN);
  std::vector<Shrinker> all;
  for (int i = 0; i < kN; ++i) {
    have[static_cast<std::size_t>(i)] = 10;
    auto* h = &have[static_cast<std::size_t>(i)];
    all.push_back(make(reg, [h](const ScanRequest&) {
      const auto n = h->load();
      return n != 0 ? CountReport{n, n, 0} : CountReport::empty();
    }, [h](const ScanRequest& q) {
      ScanReport r;
      auto n = h->load();
      while (!h->compare_exchange_weak(n, n - std::min(n, q.nr_to_scan))) {
      }
      r.scanned = r.freed_objects = r.freed_bytes = std::min(n, q.nr_to_scan);
      return r;
    }));
  }
  const auto r = reg.reclaim({.parallel = true});
  EXPECT_EQ(r.freed_bytes, 10u * kN) << to_text(r);
}

}  // namespace
}  // namespace spillway::reclaim
