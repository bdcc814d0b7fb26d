// One test for each weakness of the kernel's version that research/reclaim.md section 2 lists. They are
// meant for the sanitizers too: what corrupted memory there must be seen here. Number 9 is in
// misbehaviour_test.cc and shrink_math_test.cc.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "spillway/reclaim/reclaim.h"
#include "src/reclaim/internal.h"

namespace spillway::reclaim {
namespace {

Shrinker simple(Registry& r, ShrinkerFlags f, CountFn c = nullptr, ScanFn s = nullptr) {
  Shrinker h = r.alloc(f, "s");
  h.set_count(c ? std::move(c) : [](const ScanRequest&) { return CountReport{}; });
  h.set_scan(s ? std::move(s) : [](const ScanRequest& q) { return ScanReport{q.nr_to_scan, 0, 0}; });
  h.register_();
  return h;
}

TEST(Regression1, info_teardown_against_expansion) {
  Registry reg;
  std::vector<Shrinker> all;
  for (int i = 0; i < 300; ++i) all.push_back(simple(reg, ShrinkerFlags::kGroupAware));
  std::atomic<bool> end{false};
  std::atomic<std::uint32_t> current{0};
  std::thread walker([&] {
    while (!end) reg.reclaim({.priority = 0});
  });
  std::thread adder([&] {  // grows the newest group's tree while it is removed
    std::mt19937 rng(1);
    while (!end) {
      if (GroupRef g = reg.find_group(current.load())) all[rng() % all.size()].set_bit(*g);
    }
  });
  for (int i = 0; i < 400; ++i) {
    GroupRef g = reg.create_group("g");
    current = g->id();
    for (std::size_t k = 0; k < all.size(); k += 7) all[k].set_bit(*g);
    ASSERT_EQ(reg.remove_group(*g), Errc::kOk);
  }
  end = true;
  walker.join();
  adder.join();
}

TEST(Regression2, manual_scan_of_a_half_built_shrinker_calls_nothing) {
  Registry reg;
  Shrinker s = reg.alloc(ShrinkerFlags::kNone, "half");
  EXPECT_EQ(reg.scan(s.id(), *reg.root(), 0, 10), Errc::kInvalid);
  EXPECT_TRUE(reg.counts(s.id()).empty());
  EXPECT_EQ(s.register_(), Errc::kInvalid);
}

struct Obj : LruItem {};

TEST(Regression3, list_reparent_drains_then_marks_dead_then_erases) {
  Registry reg;
  ListLru lru(reg);
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "lru");
  lru.attach(&s);
  constexpr int kThreads = 3, kEach = 400, kRounds = 40;
  std::vector<Obj> objs(kThreads * kEach);
  for (int round = 0; round < kRounds; ++round) {
    GroupRef g = reg.create_group("g");
    std::atomic<int> added{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kEach; ++i) {
          EXPECT_TRUE(lru.add(objs[static_cast<std::size_t>(t * kEach + i)], *g, 0, 1));
          ++added;
        }
      });
    }
    while (added < kThreads * kEach / 2) std::this_thread::yield();
    ASSERT_EQ(reg.remove_group(*g), Errc::kOk);
    for (auto& t : threads) t.join();
    ASSERT_EQ(lru.count(*reg.root(), 0), static_cast<std::uint64_t>(kThreads * kEach));
    ASSERT_EQ(lru.bytes(*reg.root(), 0), static_cast<std::uint64_t>(kThreads * kEach));
    for (auto& o : objs) ASSERT_TRUE(lru.del(o, *g, 0, 1));
  }
}

// Not of the kernel, our own: while a group goes, its objects are on its list or on its parent's, and del must
// take the lock of the one that it is on.
TEST(ListLruReparent, add_and_del_while_the_group_goes) {
  Registry reg;
  ListLru lru(reg);
  Shrinker s = simple(reg, ShrinkerFlags::kGroupAware);
  lru.attach(&s);
  constexpr int kThreads = 3, kEach = 8, kRounds = 600;
  std::vector<Obj> objs(kThreads * kEach), others(kEach);
  for (int round = 0; round < kRounds; ++round) {
    GroupRef g = reg.create_group("g");
    std::atomic<int> ready{0};
    std::atomic<bool> removed{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        ++ready;
        while (!removed) {
          for (int i = 0; i < kEach; ++i) EXPECT_TRUE(lru.add(objs[static_cast<std::size_t>(t * kEach + i)], *g, 0, 1));
          for (int i = 0; i < kEach; ++i) EXPECT_TRUE(lru.del(objs[static_cast<std::size_t>(t * kEach + i)], *g, 0, 1));
        }
      });
    }
    while (ready < kThreads) std::this_thread::yield();
    for (auto& o : others) EXPECT_TRUE(lru.add(o, *reg.root(), 0, 1));
    ASSERT_EQ(reg.remove_group(*g), Errc::kOk);
    for (auto& o : others) EXPECT_TRUE(lru.del(o, *reg.root(), 0, 1));
    removed = true;
    for (auto& t : threads) t.join();
    ASSERT_EQ(lru.count(*reg.root(), 0), 0u) << "round " << round;
    ASSERT_EQ(lru.bytes(*reg.root(), 0), 0u) << "round " << round;
  }
}

TEST(Regression4, every_way_out_of_a_visit_puts_its_reference) {
  Registry reg({.nodes = 2, .quarantine_after = 1});
  GroupRef g = reg.create_group("g");
  Shrinker unaware = simple(reg, ShrinkerFlags::kNone);
  Shrinker blocking = simple(reg, ShrinkerFlags::kGroupAware);
  Shrinker throwing = simple(reg, ShrinkerFlags::kGroupAware, [](const ScanRequest&) -> CountReport { throw 1; });
  for (auto* s : {&unaware, &blocking, &throwing}) {
    Registry::Impl& impl = RegistryAccess::impl(reg);
    impl.set_bit(*g, 0, s->id());  // also where it does not belong
    impl.set_bit(*g, 1, s->id());
    s->set_bit();
  }
  const auto stray = [&](int node) {
    const Unit* u = RegistryAccess::impl(reg).find_unit(*g, node, 0);
    return u != nullptr ? u->map.load() : 0;
  };
  EXPECT_EQ(stray(0), 7u);
  for (bool may_block : {true, false}) {
    for (int node : {kAnyNode, 0, 1}) reg.reclaim({.node = node, .may_block = may_block});
  }
  EXPECT_EQ(stray(0) & 1, 0u) << "a bit that its owner can not have set is not walked for ever";
  EXPECT_EQ(stray(1), 0u);
  EXPECT_EQ(unaware.free(), Errc::kOk);
  EXPECT_EQ(blocking.free(), Errc::kOk);
  EXPECT_EQ(throwing.free(), Errc::kOk);
}

TEST(Regression5, ids_are_checked_before_they_index) {
  Registry reg;
  for (std::uint32_t id : {0u, 63u, 64u, kMaxShrinkers - 1, kMaxShrinkers, ~0u}) {
    EXPECT_EQ(reg.scan(id, *reg.root(), 0, 1), Errc::kInvalid);
    EXPECT_TRUE(reg.stats(id).name.empty());
    reg.set_bit(id, *reg.root());
  }
  EXPECT_EQ(reg.scan(0, *reg.root(), 64, 1), Errc::kInvalid);
  EXPECT_FALSE(reg.find_group(65536u));
  EXPECT_FALSE(reg.find_group(~0u));
}

TEST(Regression6, bits_survive_half_built_dying_and_reused_ids) {
  Registry reg;
  for (int round = 0; round < 50; ++round) {
    std::atomic<std::uint64_t> have{0};
    std::atomic<bool> end{false};
    std::thread walker([&] {
      while (!end) reg.reclaim({.priority = 0});
    });
    {
      Shrinker old = simple(reg, ShrinkerFlags::kNone);
      old.set_bit();
    }  // freed; its bit is left behind, its id goes to the next one
    Shrinker s = reg.alloc(ShrinkerFlags::kNone, "young");
    EXPECT_EQ(s.id(), 0u);
    s.set_count([&](const ScanRequest&) { return have != 0 ? CountReport{have, have, 0} : CountReport::empty(); });
    s.set_scan([&](const ScanRequest& q) {
      const auto n = std::min(q.nr_to_scan, have.load());
      have -= n;
      return ScanReport{n, n, n};
    });
    have = 5;     // objects before register: once, on 0 -> 1
    s.set_bit();
    s.register_();
    end = true;
    walker.join();
    reg.reclaim({.priority = 0});
    ASSERT_EQ(have, 0u) << "round " << round;
  }
}

TEST(Regression7, next_owner_of_an_id_inherits_no_work) {
  Registry reg;
  GroupRef g = reg.create_group("g");
  Registry::Impl& impl = RegistryAccess::impl(reg);
  {
    Shrinker s = simple(reg, ShrinkerFlags::kGroupAware);
    s.set_bit(*g);
    impl.add_deferred(*g, 0, *RegistryAccess::impl(s), 1000 << kFractionBits, kWorkMax);
    EXPECT_EQ(impl.read_deferred(*g, 0, *RegistryAccess::impl(s)), 1000u << kFractionBits);
  }
  Shrinker next = simple(reg, ShrinkerFlags::kGroupAware);
  ASSERT_EQ(next.id(), 0u);
  EXPECT_EQ(impl.read_deferred(*g, 0, *RegistryAccess::impl(next)), 0u);
  EXPECT_EQ(impl.claim_deferred(*g, 0, *RegistryAccess::impl(next)), 0u);
}

TEST(Regression7, reparented_work_arrives_exactly_once_under_concurrent_adds) {
  Registry reg;
  Registry::Impl& impl = RegistryAccess::impl(reg);
  for (int round = 0; round < 200; ++round) {
    Shrinker s = simple(reg, ShrinkerFlags::kGroupAware);
    const ShrinkerImpl& si = *RegistryAccess::impl(s);
    GroupRef top = reg.create_group("top");
    GroupRef g = reg.create_group("g", top.get());
    s.set_bit(*g);
    constexpr int kAdds = 200;
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < kAdds; ++i) impl.add_deferred(*g, 0, si, 1, kWorkMax);
      });
    }
    ASSERT_EQ(reg.remove_group(*g), Errc::kOk);
    for (auto& t : threads) t.join();
    ASSERT_EQ(impl.read_deferred(*g, 0, si), 0u);
    ASSERT_EQ(impl.read_deferred(*top, 0, si), 2u * kAdds);
    ASSERT_EQ(reg.remove_group(*top), Errc::kOk);
    ASSERT_EQ(impl.claim_deferred(*reg.root(), 0, si), 2u * kAdds);
  }
}

TEST(Regression8, a_reference_means_a_whole_shrinker) {
  Registry reg;
  std::atomic<bool> end{false};
  std::thread walker([&] {
    while (!end) reg.reclaim({.priority = 0});
  });
  for (int i = 0; i < 2000; ++i) {
    auto data = std::make_unique<int>(42);  // not atomic: published by register alone
    Shrinker s = reg.alloc(ShrinkerFlags::kNone, "w");
    s.set_bit();
    s.set_private_data(data.get());
    s.set_count([](const ScanRequest& q) {
      EXPECT_EQ(*static_cast<int*>(q.private_data), 42);
      return CountReport{};
    });
    s.set_scan([](const ScanRequest&) { return ScanReport{}; });
    s.register_();
    s.free();
    *data = 0;
  }
  end = true;
  walker.join();
}

TEST(Charges, reparenting_keeps_every_byte_once) {
  Registry reg({.charge_slots = 2, .charge_batch_bytes = 64});
  for (int round = 0; round < 50; ++round) {
    GroupRef top = reg.create_group("top");
    GroupRef g = reg.create_group("g", top.get());
    std::vector<std::thread> threads;
    std::atomic<int> ready{0};
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        ++ready;
        for (int i = 0; i < 500; ++i) {
          ASSERT_TRUE(g->try_charge(7));
          if (i % 2 == 0) g->uncharge(7);
        }
      });
    }
    while (ready < 3) std::this_thread::yield();
    ASSERT_EQ(reg.remove_group(*g), Errc::kOk);
    for (auto& t : threads) t.join();
    ASSERT_EQ(top->usage_exact(), 3u * 250 * 7);
    top->uncharge(3u * 250 * 7);  // through the parent, though charged to the child
    ASSERT_EQ(top->usage_exact(), 0u);
    ASSERT_EQ(reg.remove_group(*top), Errc::kOk);
  }
  EXPECT_EQ(reg.root()->usage_exact(), 0u);
  EXPECT_EQ(reg.node_usage(0), 0u);
}

// The stated bound, hierarchical and with more threads than stocks: real <= usage <= real + n * slots * batch.
TEST(Charges, error_bound_holds_for_a_tree_with_more_threads_than_stocks) {
  constexpr std::uint64_t kBatch = 1000;
  constexpr unsigned kSlots = 2;
  Registry reg({.charge_slots = kSlots, .charge_batch_bytes = kBatch});
  GroupRef top = reg.create_group("top");
  std::vector<GroupRef> leaf;
  for (int i = 0; i < 3; ++i) leaf.push_back(reg.create_group("leaf" + std::to_string(i), top.get()));
  std::vector<std::atomic<std::uint64_t>> real(leaf.size());
  for (int round = 0; round < 20; ++round) {
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 5; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 rng(round * 5 + t);
        for (int i = 0; i < 400; ++i) {
          const std::size_t k = rng() % leaf.size();
          const std::uint64_t n = rng() % 700 + 1;
          std::uint64_t have = real[k].load();
          if (rng() % 2 == 0) {
            ASSERT_TRUE(leaf[k]->try_charge(n));
            real[k] += n;
          } else if (have >= n && real[k].compare_exchange_strong(have, have - n)) {
            leaf[k]->uncharge(n);
          }
        }
      });
    }
    for (auto& t : threads) t.join();
    std::uint64_t sum = 0;
    for (std::size_t k = 0; k < leaf.size(); ++k) {
      sum += real[k];
      ASSERT_GE(leaf[k]->usage(), real[k]);
      ASSERT_LE(leaf[k]->usage(), real[k] + kSlots * kBatch);
    }
    ASSERT_GE(top->usage(), sum);
    ASSERT_LE(top->usage(), sum + 4 * kSlots * kBatch);
  }
  std::uint64_t sum = 0;
  for (std::size_t k = 0; k < leaf.size(); ++k) {
    ASSERT_EQ(leaf[k]->usage_exact(), real[k]);
    sum += real[k];
  }
  ASSERT_EQ(top->usage_exact(), sum);
  for (std::size_t k = 0; k < leaf.size(); ++k) leaf[k]->uncharge(real[k]);
}

#if !defined(__SANITIZE_THREAD__) && !defined(SPILLWAY_TSAN)
// A child that forked amid a storm of retiring can retire, wait for it, and run a registry of its own.
TEST(Fork, child_of_a_busy_parent_goes_on) {
  Registry reg;
  std::atomic<bool> end{false};
  std::vector<std::thread> storm;
  struct Node : RcuObject<Node> {};
  for (int t = 0; t < 2; ++t) {
    storm.emplace_back([&] {
      while (!end) {
        (new Node)->retire();
        Shrinker s = simple(reg, ShrinkerFlags::kNone);
      }
    });
  }
  for (int i = 0; i < 40; ++i) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::alarm(60);
      (new Node)->retire();
      rcu_barrier();
      {
        Registry own;
        Shrinker s = simple(own, ShrinkerFlags::kNone, [](const ScanRequest&) { return CountReport{1, 1, 0}; });
        s.set_bit();
        if (own.reclaim({}).shrinkers == 0) ::_exit(2);
      }
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "fork " << i << ": status " << status;
    if (HasFailure()) break;
  }
  end = true;
  for (auto& t : storm) t.join();
}
#endif

}  // namespace
}  // namespace spillway::reclaim
