// Seeded interleavings of the real code. A failing seed is printed; SPILLWAY_SEED=n runs just that one, and
// SPILLWAY_SEEDS=n runs so many (default 40).
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "spillway/reclaim/reclaim.h"
#include "src/reclaim/internal.h"
#include "tests/reclaim/interleave/scheduler.h"

namespace spillway::reclaim {
namespace {

RegistryOptions small() {
  RegistryOptions o;
  o.ref_shards = 2;
  o.charge_slots = 2;
  o.charge_batch_bytes = 16;
  o.max_groups = 64;
  o.trace_events = 0;
  o.workers = 1;
  o.time_budget = std::chrono::hours(1);
  return o;
}

void for_seeds(const std::function<void(std::uint64_t)>& one) {
  if (const char* s = std::getenv("SPILLWAY_SEED")) return one(std::strtoull(s, nullptr, 10));
  const char* n = std::getenv("SPILLWAY_SEEDS");
  const std::uint64_t seeds = n != nullptr ? std::strtoull(n, nullptr, 10) : 40;
  for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
    SCOPED_TRACE("SPILLWAY_SEED=" + std::to_string(seed));
    one(seed);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Interleave, same_seed_gives_the_same_schedule) {
  const auto once = [](std::uint64_t seed) {
    Registry reg(small());
    Shrinker s = reg.alloc(ShrinkerFlags::kNone, "s");
    s.set_count([](const ScanRequest&) { return CountReport{1, 1, 0}; });
    s.set_scan([](const ScanRequest&) { return ScanReport{1, 0, 0}; });
    s.register_();
    s.set_bit();
    return interleave::run(seed, {[&] { reg.reclaim({.priority = 0}); }, [&] { reg.reclaim({.priority = 0}); }, [&] { s.free(); }});
  };
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const auto a = once(seed), b = once(seed);
    EXPECT_EQ(a.trace_hash, b.trace_hash) << seed;
    EXPECT_EQ(a.steps, b.steps) << seed;
  }
  EXPECT_NE(once(1).trace_hash, once(2).trace_hash);
}

// Free against two walkers, register while they walk: S2, S3. Data is poisoned when free returns. Once with blocks
// that go back to the allocator (and are poisoned there), once with blocks that serve the next one at once.
class FreeAndWalk : public testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Interleave, FreeAndWalk, testing::Values(0u, 16u));
TEST_P(FreeAndWalk, free_register_and_walk) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    RegistryAccess::impl(reg).pool_max = GetParam();
    struct Data {
      int alive = 42;
    };
    interleave::run(seed, {
      [&] { for (int i = 0; i < 2; ++i) reg.reclaim({.priority = 0}); },
      [&] { for (int i = 0; i < 2; ++i) reg.reclaim({.priority = 0}); },
      [&] {
        for (int i = 0; i < 3; ++i) {
          auto data = std::make_unique<Data>();
          Shrinker s = reg.alloc(ShrinkerFlags::kNone, "s");
          s.set_bit();
          s.set_count([p = data.get()](const ScanRequest&) {
            EXPECT_EQ(p->alive, 42);
            return CountReport{1, 1, 0};
          });
          s.set_scan([p = data.get()](const ScanRequest&) {
            EXPECT_EQ(p->alive, 42);
            return ScanReport{1, 0, 0};
          });
          EXPECT_EQ(s.register_(), Errc::kOk);
          EXPECT_EQ(s.free(), Errc::kOk);
          data->alive = 0;
        }
      }});
  });
}

// Adders against walkers that clear: no object without its bit at rest, at any level of the tree of bits.
TEST(Interleave, no_bit_is_lost) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    Atomic<std::uint64_t> have{0};
    Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "s");
    s.set_count([&](const ScanRequest& q) {
      if (q.group->is_root()) return CountReport::empty();
      const auto n = have.load();
      return n != 0 ? CountReport{n, n, 0} : CountReport::empty();
    });
    s.set_scan([&](const ScanRequest& q) {
      auto n = have.load();
      while (!have.compare_exchange_weak(n, n - std::min(n, q.nr_to_scan), std::memory_order_seq_cst, std::memory_order_seq_cst)) {
      }
      const auto taken = std::min(n, q.nr_to_scan);
      return ScanReport{taken, taken, taken};
    });
    s.register_();
    GroupRef g = reg.create_group("g");
    const auto add = [&] {
      for (int i = 0; i < 4; ++i) {
        have.fetch_add(1);
        s.set_bit(*g);
      }
    };
    const auto walk = [&] { for (int i = 0; i < 3; ++i) reg.reclaim({.priority = 0}); };
    interleave::run(seed, {add, add, walk, walk});
    reg.reclaim({.priority = 0});
    EXPECT_EQ(have.load(), 0u) << "an object was left behind without a bit";
  });
}

// Weakness 6: the id changes hands while walkers stumble over its bit.
TEST(Interleave, id_reuse_keeps_the_new_owners_bit) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    auto old = std::make_unique<Shrinker>(reg.alloc(ShrinkerFlags::kNone, "old"));
    old->set_count([](const ScanRequest&) { return CountReport::empty(); });
    old->set_scan([](const ScanRequest&) { return ScanReport{}; });
    old->register_();
    old->set_bit();
    Shrinker young;
    std::uint64_t have = 0;
    interleave::run(seed, {
      [&] { for (int i = 0; i < 3; ++i) reg.reclaim({.priority = 0}); },
      [&] {
        old->free();
        young = reg.alloc(ShrinkerFlags::kNone, "young");
        EXPECT_EQ(young.id(), 0u);
        young.set_count([&](const ScanRequest&) { return have != 0 ? CountReport{have, have, 0} : CountReport::empty(); });
        young.set_scan([&](const ScanRequest& q) {
          const auto n = std::min(q.nr_to_scan, have);
          have -= n;
          return ScanReport{n, n, n};
        });
        have = 5;
        young.set_bit();
        young.register_();
      }});
    reg.reclaim({.priority = 0});
    EXPECT_EQ(have, 0u);
  });
}

// L3: a block is freed and serves another id while a walker is about to take a reference on it.
TEST(Interleave, a_recycled_block_is_not_called_for_its_last_id) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    Registry::Impl& impl = RegistryAccess::impl(reg);
    impl.pool_max = 16;
    const auto fill = [](Shrinker& s) {
      s.set_count([](const ScanRequest&) { return CountReport{1, 1, 0}; });
      s.set_scan([](const ScanRequest&) { return ScanReport{1, 0, 0}; });
    };
    Shrinker old = reg.alloc(ShrinkerFlags::kNone, "old"), other = reg.alloc(ShrinkerFlags::kNone, "other");
    const ShrinkerImpl* block = RegistryAccess::impl(old);
    fill(old);
    old.register_();
    const auto look = [&] {
      for (int i = 0; i < 30; ++i) {
        if (ShrinkerRef s = impl.get(0)) { EXPECT_EQ(s->id, 0u); }
      }
    };
    interleave::run(seed, {look, look, look, look, [&] {
        old.free();
        other.free();  // the pool hands out the last block first, ids go from the lowest: they cross over
        Shrinker zero = reg.alloc(ShrinkerFlags::kNone, "zero"), one = reg.alloc(ShrinkerFlags::kNone, "one");
        EXPECT_EQ(one.id(), 1u);
        EXPECT_EQ(RegistryAccess::impl(one), block);
        fill(one);
        one.register_();
        for (int i = 0; i < 20; ++i) interleave_point();
        one.free();
      }});
  });
}

struct Obj : LruItem {};

// While the group goes: add and del find the same list. One thread per object, as a cache would have it.
TEST(Interleave, add_and_del_while_the_group_goes) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    ListLru lru(reg);
    Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "s");
    lru.attach(&s);
    GroupRef top = reg.create_group("top"), g = reg.create_group("g", top.get());
    Obj objs[4];
    const auto body = [&](int first) {
      return [&, first] {
        for (int round = 0; round < 2; ++round) {
          for (int i = first; i < first + 2; ++i) EXPECT_TRUE(lru.add(objs[i], *g, 0, 10));
          for (int i = first; i < first + 2; ++i) EXPECT_TRUE(lru.del(objs[i], *g, 0, 10));
        }
      };
    };
    interleave::run(seed, {body(0), body(2), [&] { EXPECT_EQ(reg.remove_group(*g), Errc::kOk); }});
    EXPECT_EQ(lru.count(*top, 0), 0u);
    EXPECT_EQ(lru.bytes(*top, 0), 0u);
    const std::uint32_t id = g->id();
    g.reset();
    GroupRef next = reg.create_group("next");
    EXPECT_EQ(next->id(), id);
    EXPECT_TRUE(lru.add(objs[0], *next));
    EXPECT_EQ(lru.count(*next, 0), 1u) << "the next group of the id has a list of its own";
    EXPECT_TRUE(lru.del(objs[0], *next));
  });
}

// Removing a group under adders: objects, deferred work and charges arrive in the parent exactly once.
TEST(Interleave, remove_group_moves_everything_once) {
  for_seeds([](std::uint64_t seed) {
    Registry reg(small());
    Registry::Impl& impl = RegistryAccess::impl(reg);
    ListLru lru(reg);
    Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware, "s");
    lru.attach(&s);
    s.set_count([&](const ScanRequest& q) { return lru.count(q); });
    s.set_scan([&](const ScanRequest& q) {
      return lru.walk(q, [](LruItem&, ListLru::Walker&) { return LruVerdict::kSkip; });
    });
    s.register_();
    GroupRef top = reg.create_group("top"), g = reg.create_group("g", top.get());
    Obj objs[6];
    const ShrinkerImpl& si = *RegistryAccess::impl(s);
    const auto add = [&](int first) {
      return [&, first] {
        for (int i = first; i < first + 3; ++i) {
          EXPECT_TRUE(lru.add(objs[i], *g, 0, 10));
          impl.add_deferred(*g, 0, si, 1, kWorkMax);
          EXPECT_TRUE(g->try_charge(5));
        }
      };
    };
    interleave::run(seed, {add(0), add(3), [&] { EXPECT_EQ(reg.remove_group(*g), Errc::kOk); }});
    EXPECT_EQ(lru.count(*top, 0), 6u);
    EXPECT_EQ(lru.bytes(*top, 0), 60u);
    EXPECT_EQ(impl.read_deferred(*g, 0, si), 0u);
    EXPECT_EQ(impl.read_deferred(*top, 0, si), 6u);
    EXPECT_EQ(top->usage_exact(), 30u);
    EXPECT_NE(impl.find_unit(*top, 0, 0)->map.load() & 1, 0u) << "the parent's bit";
    top->uncharge(30);
    EXPECT_EQ(reg.root()->usage_exact(), 0u);
    for (auto& o : objs) EXPECT_TRUE(lru.del(o, *g, 0, 10));
  });
}

// The runner itself must be able to find bugs: the known-wrong way to release a reference.
TEST(InterleaveSelf, finds_a_lost_update) {
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    Atomic<std::uint64_t> n{0};
    const auto body = [&] {
      for (int i = 0; i < 3; ++i) n.store(n.load() + 1);
    };
    interleave::run(seed, {body, body});
    lost += n.load() != 6;
  }
  EXPECT_GT(lost, 20);
}

}  // namespace
}  // namespace spillway::reclaim
