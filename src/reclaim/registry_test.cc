// Registry, references, walk and groups: what one thread can see (S1-S4, S7, S9, S10).
#include "spillway/reclaim/reclaim.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace spillway::reclaim {
namespace {

/// A cache of one counter per (group, node): the smallest thing that can be shrunk.
struct Counter {
  Registry& reg;
  Shrinker s;
  std::atomic<std::uint64_t> objects{0};
  std::atomic<int> counts{0}, scans{0};
  ScanRequest last;

  explicit Counter(Registry& in, ShrinkerFlags f = ShrinkerFlags::kNone, std::string_view name = "c")
      : reg(in), s(in.alloc(f, name)) {
    s.set_count([this](const ScanRequest&) {
      ++counts;
      const auto n = objects.load();
      return n != 0 ? CountReport{n, n * 100, 0} : CountReport::empty();
    });
    s.set_scan([this](const ScanRequest& q) {
      ++scans;
      last = q;
      ScanReport r;
      r.scanned = std::min(q.nr_to_scan, objects.load());
      objects -= r.scanned;
      r.freed_objects = r.scanned;
      r.freed_bytes = r.scanned * 100;
      return r;
    });
  }
  void add(std::uint64_t n) {
    objects += n;
    s.set_bit();
  }
};

TEST(Shrinker_alloc, unregistered_is_not_called_and_frees) {  // S1
  Registry reg;
  Counter c(reg);
  c.add(1000);
  reg.reclaim({});
  EXPECT_EQ(c.counts, 0);
  EXPECT_EQ(c.s.free(), Errc::kOk);
  EXPECT_FALSE(c.s);
}

TEST(Shrinker_register, bit_set_before_register_is_kept) {  // S2, weakness 6
  Registry reg;
  Counter c(reg);
  c.add(1000);
  for (int i = 0; i < 3; ++i) reg.reclaim({});
  ASSERT_EQ(c.s.register_(), Errc::kOk);
  const auto r = reg.reclaim({.target_bytes = 1000});
  EXPECT_EQ(r.status, ReclaimStatus::kReached);
  EXPECT_GE(r.freed_bytes, 1000u);
  EXPECT_GT(c.objects, 0u) << "the target bounds the scan";
}

TEST(Shrinker_register, incomplete_or_twice_is_refused) {  // weakness 2
  Registry reg;
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "half");
  EXPECT_EQ(s.register_(), Errc::kInvalid);
  s.set_count([](const ScanRequest&) { return CountReport::empty(); });
  EXPECT_EQ(s.register_(), Errc::kInvalid);
  s.set_scan([](const ScanRequest&) { return ScanReport(); });
  EXPECT_EQ(s.register_(), Errc::kOk);
  EXPECT_EQ(s.register_(), Errc::kState);
  EXPECT_EQ(s.set_seeks(3), Errc::kState);
}

TEST(Walk, empty_clears_bit_and_set_bit_brings_it_back) {
  Registry reg;
  Counter c(reg);
  c.s.register_();
  c.add(10);
  reg.reclaim({});
  EXPECT_EQ(c.objects, 0u);
  c.counts = 0;
  reg.reclaim({});
  const int after_first = c.counts;
  reg.reclaim({});
  EXPECT_EQ(c.counts, after_first) << "nothing is asked whose bit is clear";
  c.add(5);
  EXPECT_EQ(reg.reclaim({}).freed_objects, 5u);
}

TEST(Walk, subtree_takes_only_its_groups) {  // S4, S10
  Registry reg({.nodes = 2});
  std::atomic<std::uint64_t> objs[8][2] = {};
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware | ShrinkerFlags::kNumaAware, "g");
  s.set_count([&](const ScanRequest& q) {
    const auto n = objs[q.group->id()][q.node].load();
    return n != 0 ? CountReport{n, n, 0} : CountReport::empty();
  });
  s.set_scan([&](const ScanRequest& q) {
    ScanReport r;
    r.scanned = r.freed_objects = r.freed_bytes = std::min(q.nr_to_scan, objs[q.group->id()][q.node].load());
    objs[q.group->id()][q.node] -= r.scanned;
    return r;
  });
  s.register_();
  GroupRef a = reg.create_group("a"), b = reg.create_group("b"), a1 = reg.create_group("x", a.get());
  EXPECT_EQ(a1->path(), "/a/x");
  EXPECT_EQ(reg.find_group("/a/x"), a1);
  EXPECT_FALSE(reg.find_group("/x"));
  EXPECT_FALSE(reg.create_group("a")) << "names are unique among siblings";
  for (auto* g : {a.get(), b.get(), a1.get()}) {
    for (int n : {0, 1}) {
      objs[g->id()][n] = 500;
      s.set_bit(*g, n);
    }
  }
  reg.reclaim({.group = a.get(), .node = 1});
  EXPECT_EQ(objs[a->id()][1], 0u);
  EXPECT_EQ(objs[a1->id()][1], 0u);
  EXPECT_EQ(objs[a->id()][0], 500u);
  EXPECT_EQ(objs[b->id()][1], 500u);
  const auto rows = reg.counts(s.id());
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_NE(reg.counts_text(s.id()).find("/b 500 500\n"), std::string::npos) << reg.counts_text(s.id());
  EXPECT_EQ(reg.remove_group(*a), Errc::kBusy);
  EXPECT_EQ(reg.remove_group(*a1), Errc::kOk);
  EXPECT_EQ(reg.remove_group(*a1), Errc::kState);
}

TEST(Registry_list, names_rename_scan_and_text) {  // S9
  Registry reg;
  Counter c(reg, ShrinkerFlags::kNone, "inode");
  c.s.register_();
  c.add(300);
  EXPECT_EQ(reg.list().at(0).name, "inode-0");
  c.s.rename("dentry");
  EXPECT_EQ(c.s.name(), "dentry-0");
  ScanReport r;
  EXPECT_EQ(reg.scan(0, *reg.root(), 0, 7, &r), Errc::kOk);
  EXPECT_EQ(r.freed_objects, 7u);
  EXPECT_EQ(reg.scan(1, *reg.root(), 0, 7), Errc::kInvalid);
  reg.reclaim({});
  EXPECT_NE(reg.to_text().find("dentry-0"), std::string::npos);
  EXPECT_NE(reg.trace_text().find("shrinker 0"), std::string::npos) << reg.trace_text();
}

TEST(Shrinker_free, self_free_is_reported) {  // S3
  std::vector<std::string> diags;
  Registry reg({.diagnostics = [&](const Diagnostic& d) { diags.emplace_back(d.what); }});
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "self");
  Errc seen = Errc::kOk;
  s.set_count([&](const ScanRequest&) {
    seen = s.free();
    return CountReport{};
  });
  s.set_scan([&](const ScanRequest&) { return ScanReport(); });
  s.register_();
  s.set_bit();
  reg.reclaim({});
  EXPECT_EQ(seen, Errc::kSelfFree);
  ASSERT_FALSE(diags.empty());
  EXPECT_EQ(diags[0], "self-free");
  EXPECT_EQ(s.free(), Errc::kOk);
}

TEST(Shrinker_free, destructor_in_own_callback_is_an_orphan_and_goes) {
  Registry reg;
  auto s = std::make_unique<Shrinker>(reg.alloc(ShrinkerFlags::kNone, "orphan"));
  s->set_count([&](const ScanRequest&) {
    s.reset();
    return CountReport{};
  });
  s->set_scan([&](const ScanRequest&) { return ScanReport(); });
  s->register_();
  s->set_bit();
  reg.reclaim({});
  EXPECT_TRUE(reg.list().empty());
}

TEST(Group_charge, batches_limits_and_direct_reclaim) {
  Registry reg({.charge_slots = 2, .charge_batch_bytes = 1024});
  GroupRef g = reg.create_group("t");
  g->set_max(10'000);
  std::atomic<std::uint64_t> cached{0};
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "charged");
  s.set_count([&](const ScanRequest& q) {
    return q.group == g.get() && cached != 0 ? CountReport{cached / 100, cached, 0} : CountReport::empty();
  });
  s.set_scan([&](const ScanRequest& q) {
    ScanReport r;
    r.scanned = r.freed_objects = std::min(q.nr_to_scan, cached / 100);
    r.freed_bytes = r.scanned * 100;
    cached -= r.freed_bytes;
    g->uncharge(r.freed_bytes);
    return r;
  });
  s.register_();
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(g->try_charge(100));
    cached += 100;
    s.set_bit(*g);
    ASSERT_LE(g->usage(), 10'000u);
    ASSERT_LE(cached, g->usage());
    ASSERT_LE(g->usage(), cached + 2 * 1024) << "the stated error bound";
  }
  EXPECT_GT(g->stats().direct_reclaims, 0u);
  EXPECT_EQ(g->usage_exact(), cached);
  EXPECT_FALSE(g->try_charge(20'000));
  EXPECT_EQ(g->stats().charge_failures, 1u);
  g->uncharge(cached);
  cached = 0;
  EXPECT_EQ(reg.root()->usage_exact(), 0u);
}

TEST(Group_entitlements, weights_floors_and_ceilings) {
  Share in[3] = {{{.weight = 100}}, {{.weight = 300}}, {{.min = 500, .weight = 1}}};
  std::uint64_t out[3];
  entitlements(1000, in, out, 3);
  EXPECT_EQ(out[2], 500u);
  EXPECT_NEAR(static_cast<double>(out[0]), 125, 1);
  EXPECT_NEAR(static_cast<double>(out[1]), 375, 1);
  in[1].demand = 75;
  entitlements(1000, in, out, 3);
  EXPECT_EQ(out[1], 75u);
  EXPECT_NEAR(static_cast<double>(out[0]), 425, 1) << "work-conserving";
  in[2].limits.min = 4000;
  entitlements(1000, in, out, 3);
  EXPECT_EQ(out[2], 1000u);
}

struct Obj : LruItem {
  std::uint64_t bytes = 64;
};

TEST(ListLru, add_walk_and_reparent) {
  Registry reg;
  ListLru lru(reg);
  std::vector<Obj*> dead;
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "lru");
  s.set_count([&](const ScanRequest& q) { return lru.count(q); });
  s.set_scan([&](const ScanRequest& q) {
    return lru.walk(q, [&](LruItem& i, ListLru::Walker& w) {
      w.isolate(i, 64);
      dead.push_back(static_cast<Obj*>(&i));
      return LruVerdict::kRemoved;
    });
  });
  lru.attach(&s);
  s.register_();
  GroupRef g = reg.create_group("g");
  std::vector<Obj> objs(300);
  for (auto& o : objs) EXPECT_TRUE(lru.add(o, *g, 0, 64));
  EXPECT_FALSE(lru.add(objs[0], *g, 0, 64));
  EXPECT_EQ(lru.count(*g, 0), 300u);
  EXPECT_EQ(lru.bytes(*g, 0), 300u * 64);
  EXPECT_EQ(reg.remove_group(*g), Errc::kOk);
  EXPECT_EQ(lru.count(*reg.root(), 0), 300u);
  EXPECT_TRUE(lru.del(objs[7], *g, 0, 64)) << "through the dead group";
  EXPECT_FALSE(lru.del(objs[7], *g, 0, 64));
  EXPECT_TRUE(lru.add(objs[7], *g, 0, 64)) << "adding to a dead group lands in the parent";
  const auto r = reg.reclaim({});
  EXPECT_EQ(r.freed_objects, 300u) << to_text(r);
  EXPECT_EQ(r.freed_bytes, 300u * 64);
  EXPECT_EQ(dead.size(), 300u);
}

TEST(Rcu, retire_runs_after_readers) {
  struct Node : RcuObject<Node> {
    std::atomic<bool>* gone;
    ~Node() { gone->store(true); }
  };
  std::atomic<bool> gone{false};
  auto* n = new Node;
  n->gone = &gone;
  {
    RcuGuard guard;
    n->retire();
    EXPECT_FALSE(gone);
  }
  rcu_barrier();
  EXPECT_TRUE(gone);
}

TEST(Storm, register_free_beside_walkers) {  // S6, S11
  Registry reg;
  std::atomic<bool> end{false};
  std::atomic<int> calls{0};
  std::thread walker([&] {
    while (!end) reg.reclaim({});
  });
  for (int i = 0; i < 3000; ++i) {
    GroupRef g = reg.create_group("g" + std::to_string(i));
    Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "storm");
    auto alive = std::make_unique<std::atomic<bool>>(true);
    s.set_count([&calls, p = alive.get()](const ScanRequest&) {
      EXPECT_TRUE(p->load());
      ++calls;
      return CountReport{1, 1, 0};
    });
    s.set_scan([p = alive.get()](const ScanRequest&) {
      EXPECT_TRUE(p->load());
      return ScanReport{1, 0, 0};
    });
    s.register_();
    s.set_bit(*g);
    EXPECT_EQ(s.free(), Errc::kOk);
    alive->store(false);
    alive.reset();
    EXPECT_EQ(reg.remove_group(*g), Errc::kOk);
  }
  end = true;
  walker.join();
}

}  // namespace
}  // namespace spillway::reclaim
