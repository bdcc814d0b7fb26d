// Q1, the arithmetic: proportional service within the bound that sfq.h derives, hierarchy, caps, return from idling.
#include "src/qos/sfq.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <random>

#include <gtest/gtest.h>

namespace spillway {
namespace {

struct Flow {
  SfqTree::Node* node = nullptr;
  uint32_t weight = 100;
  std::deque<SfqItem> items;  // stable addresses
  uint64_t most = 0;          // greatest cost
  SfqItem* add(uint64_t cost) {
    items.push_back({});
    items.back().cost = cost;
    most = std::max(most, cost);
    return &items.back();
  }
};

TEST(Sfq, Empty_popsNothing) {
  SfqTree t;
  EXPECT_EQ(t.pop(0), nullptr);
  EXPECT_EQ(t.next_ready(), SfqTree::kNever);
}

TEST(Sfq, TwoBacklogged_shareByWeightAndCost) {
  SfqTree t;
  Flow a, b;
  a.node = t.add(t.root(), 100);
  b.node = t.add(t.root(), 300);
  for (int i = 0; i < 4000; ++i) {
    t.push(a.node, a.add(10'000), 0);
    t.push(b.node, b.add(90'000), 0);
  }
  for (int i = 0; i < 4000; ++i) ASSERT_NE(t.pop(0), nullptr);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)) / static_cast<double>(SfqTree::served(a.node)), 3.0, 0.01);
}

TEST(Sfq, Idle_returnsWithoutBurstAndWithoutPenalty) {
  SfqTree t;
  Flow a, b;
  a.node = t.add(t.root(), 100);
  b.node = t.add(t.root(), 100);
  for (int i = 0; i < 1000; ++i) t.push(a.node, a.add(1000), 0);
  for (int i = 0; i < 500; ++i) t.pop(0);  // b idles meanwhile
  for (int i = 0; i < 400; ++i) t.push(b.node, b.add(1000), 0);
  const uint64_t before = SfqTree::served(a.node);
  for (int i = 0; i < 400; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node) - before), 200e3, 2e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)), 200e3, 2e3);
}

TEST(Sfq, Hierarchy_unusedShareGoesToSiblingsFirst) {
  SfqTree t;
  auto* tenant = t.add(t.root(), 100);
  Flow a, b, c;
  a.node = t.add(tenant, 100);
  b.node = t.add(tenant, 300);
  c.node = t.add(t.root(), 100);
  for (int i = 0; i < 4000; ++i) t.push(a.node, a.add(1000), 0), t.push(c.node, c.add(1000), 0);
  for (int i = 0; i < 1000; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node)), 500e3, 2e3);  // all of the tenant's half
  for (int i = 0; i < 4000; ++i) t.push(b.node, b.add(1000), 0);
  for (int i = 0; i < 1000; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)), 375e3, 3e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node)), 625e3, 3e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(c.node)), 1000e3, 3e3);
}

TEST(Sfq, Caps_holdTheRateAndLetOthersPass) {
  SfqTree t;
  Flow a, b;
  a.node = t.add(t.root(), 10000);
  b.node = t.add(t.root(), 1);
  t.set_caps(a.node, {.riops = 1000}, 0);
  for (int i = 0; i < 5000; ++i) t.push(a.node, a.add(1000), 0), t.push(b.node, b.add(1000), 0);
  uint64_t now = 1'000'000'000, got_a = 0, got_b = 0;
  const uint64_t end = now + 1'000'000'000;
  for (; now < end; now += 250'000) {  // a disk of 4000 IOPS
    SfqTree::Node* from = nullptr;
    ASSERT_NE(t.pop(now, &from), nullptr);  // work-conserving: b always has work
    ++(from == a.node ? got_a : got_b);
  }
  EXPECT_NEAR(static_cast<double>(got_a), 1010, 3);  // the rate and the burst of 10 ms
  EXPECT_EQ(got_a + got_b, 4000u);
}

TEST(Sfq, Caps_ofAParent_siblingsShareByWeight) {
  SfqTree t;
  auto* tenant = t.add(t.root(), 100);
  Flow a, b;
  a.node = t.add(tenant, 100);
  b.node = t.add(tenant, 300);
  t.set_caps(tenant, {.rbps = 4096 * 1000}, 0);
  for (int i = 0; i < 5000; ++i)
    for (auto* f : {&a, &b}) {
      auto* item = f->add(1000);
      item->bytes = 4096;
      t.push(f->node, item, 0);
    }
  for (uint64_t now = 0; now < 4'000'000'000; now = t.next_ready())
    while (t.pop(now) != nullptr) {}
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node) + SfqTree::served(b.node)), 4010e3, 20e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)) / static_cast<double>(SfqTree::served(a.node)), 3, 0.02);
}

// Parked for its reads, then for its writes: it comes back for whichever is due first.
TEST(Sfq, Caps_ofBothKinds_comeBackForTheEarlier) {
  SfqTree t;
  Flow a;
  a.node = t.add(t.root(), 100);
  t.set_caps(a.node, {.riops = 1, .wiops = 1000}, 0);
  for (int i = 0; i < 2; ++i) t.push(a.node, a.add(1000), 0);
  ASSERT_NE(t.pop(0), nullptr);
  ASSERT_EQ(t.pop(0), nullptr);
  EXPECT_EQ(t.next_ready(), 990'000'000u);
  for (int i = 0; i < 30; ++i) {
    auto* item = a.add(1000);
    item->is_write = true;
    t.push(a.node, item, 0);
  }
  uint64_t now = 0;
  int writes = 0;
  for (; now < 15'000'000; now = std::max(t.next_ready(), now + 1))
    while (SfqItem* item = t.pop(now)) {
      EXPECT_TRUE(item->is_write);
      ++writes;
    }
  EXPECT_NEAR(writes, 25, 1);  // the rate and the burst of 10 ms
}

// A cap on one kind earns nothing for the other: whoever waited for it for long is not ahead of others afterwards, and
// while others use what it does not restrict, those it holds back all go on.
TEST(Sfq, Caps_timeSpentUnderThem_earnsNothing_andNobodyStarves) {
  SfqTree t;
  auto* tenant = t.add(t.root(), 100);
  t.set_caps(tenant, {.riops = 100}, 0);
  Flow a, b, writer;
  a.node = t.add(tenant, 100);
  b.node = t.add(tenant, 100);
  writer.node = t.add(tenant, 100);
  auto write = [&](Flow& f) {
    auto* item = f.add(1000);
    item->is_write = true;
    t.push(f.node, item, 0);
  };
  for (int i = 0; i < 20000; ++i) t.push(a.node, a.add(1000), 0), t.push(b.node, b.add(1000), 0), write(writer);
  uint64_t now = 0;
  auto serve = [&](int n) {
    for (int i = 0; i < n; ++i, now += 1'000'000) ASSERT_NE(t.pop(now), nullptr);  // 1000 a second
  };
  serve(5000);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node)), 250e3, 10e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)), 250e3, 10e3);
  for (int i = 0; i < 5000; ++i) write(a);
  const uint64_t had = SfqTree::served(a.node), other = SfqTree::served(writer.node);
  serve(1000);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node) - had), 475e3, 30e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(writer.node) - other), 475e3, 30e3);
}

TEST(Sfq, Caps_removed_releaseAtOnce) {
  SfqTree t;
  Flow a;
  a.node = t.add(t.root(), 100);
  t.set_caps(a.node, {.wiops = 1}, 0);
  for (int i = 0; i < 3; ++i) {
    auto* item = a.add(1000);
    item->is_write = true;
    t.push(a.node, item, 0);
  }
  EXPECT_NE(t.pop(0), nullptr);
  EXPECT_EQ(t.pop(0), nullptr);
  EXPECT_NE(t.next_ready(), SfqTree::kNever);
  t.set_caps(a.node, {}, 0);
  EXPECT_NE(t.pop(0), nullptr);
  EXPECT_NE(t.pop(0), nullptr);
}

TEST(Sfq, Weight_changedLive_holdsFromTheNextItemOn) {
  SfqTree t;
  Flow a, b;
  a.node = t.add(t.root(), 100);
  b.node = t.add(t.root(), 100);
  for (int i = 0; i < 5000; ++i) t.push(a.node, a.add(1000), 0), t.push(b.node, b.add(1000), 0);
  for (int i = 0; i < 1000; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)), 500e3, 1e3);
  t.set_weight(b.node, 300);
  const uint64_t had = SfqTree::served(b.node);
  for (int i = 0; i < 400; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node) - had), 300e3, 2e3);
}

// A random tree, to four levels; everything below a node counts as its own.
struct Grove {
  struct Branch {
    SfqTree::Node* node = nullptr;
    int parent = -1;  // -1: the root
    uint32_t weight = 100;
    bool leaf = true;
    uint64_t most = 0;    // greatest cost below
    uint64_t queued = 0;  // items below
    QosCaps caps;
  };
  SfqTree tree;
  std::vector<Branch> all;
  std::vector<size_t> leaves;
  std::deque<SfqItem> items;

  Grove(std::mt19937_64& random, size_t nodes) {
    std::vector<int> depth;
    for (size_t i = 0; i < nodes; ++i) {
      Branch b;
      if (i > 0 && random() % 3 != 0) b.parent = static_cast<int>(random() % i);
      if (b.parent >= 0 && depth[static_cast<size_t>(b.parent)] >= 3) b.parent = -1;
      depth.push_back(b.parent < 0 ? 0 : depth[static_cast<size_t>(b.parent)] + 1);
      b.weight = static_cast<uint32_t>(random() % 4 == 0 ? 1 + random() % 10000 : 50 + random() % 500);
      if (b.parent >= 0) all[static_cast<size_t>(b.parent)].leaf = false;
      b.node = tree.add(b.parent < 0 ? tree.root() : all[static_cast<size_t>(b.parent)].node, b.weight);
      all.push_back(b);
    }
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].leaf) leaves.push_back(i);
  }
  SfqItem* push(size_t leaf, uint64_t cost, uint64_t now, uint64_t bytes = 0, bool write = false) {
    items.push_back({});
    SfqItem* item = &items.back();
    item->cost = cost, item->bytes = bytes, item->is_write = write;
    for (int i = static_cast<int>(leaf); i >= 0; i = at(i).parent) {
      at(i).most = std::max(at(i).most, cost);
      ++at(i).queued;
    }
    tree.push(at(static_cast<int>(leaf)).node, item, now);
    return item;
  }
  // The leaf's place, or -1.
  int pop(uint64_t now, SfqItem** item = nullptr) {
    SfqTree::Node* from = nullptr;
    SfqItem* got = tree.pop(now, &from);
    if (item != nullptr) *item = got;
    if (got == nullptr) return -1;
    for (size_t leaf : leaves)
      if (all[leaf].node == from) {
        for (int i = static_cast<int>(leaf); i >= 0; i = at(i).parent) --at(i).queued;
        return static_cast<int>(leaf);
      }
    return -1;
  }
  Branch& at(int i) { return all[static_cast<size_t>(i)]; }
};

// Any number of groups, weights, sizes and arrival patterns: over every interval in which f is backlogged, a sibling g,
// whatever it does (idle, come back, send one large request at a time), is not served more than the bound beyond what f
// is, each by its weight. For two that are both backlogged that is the bound in both directions. On every level: a
// subtree is backlogged while anything in it is. And something is always served.
TEST(Sfq, Property_boundHoldsOverEveryBackloggedInterval_onEveryLevelOfRandomTrees) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    std::mt19937_64 random(seed);
    Grove g(random, 2 + random() % 18);
    const uint64_t credit = seed % 3 == 0 ? 0 : random() % 500'000;
    g.tree.set_keep(credit == 0 ? 0 : random() % 3'000'000, credit);
    // Some bring a few at a time, some many at once, some (0) the next when the last was served.
    std::vector<unsigned> burst(g.all.size());
    for (auto& b : burst) b = random() % 3 == 0 ? 0 : random() % 2 == 0 ? 1 : 20 + static_cast<unsigned>(random() % 60);
    struct Pair {
      size_t f, g;
      bool in = false;
      double least = 0;  // of g's service minus f's, since f has been backlogged
    };
    std::vector<Pair> pairs;
    for (size_t f = 0; f < g.all.size(); ++f)
      for (size_t h = 0; h < g.all.size(); ++h)
        if (f != h && g.all[f].parent == g.all[h].parent) pairs.push_back({f, h});
    uint64_t now = 0;
    for (int step = 0; step < 1000; ++step) {
      now += random() % 200'000;
      for (size_t leaf : g.leaves)
        if (burst[leaf] == 0 ? g.all[leaf].queued == 0 : random() % (20 * burst[leaf]) < 7)
          for (unsigned i = 0; i < std::max(1u, burst[leaf]); ++i) g.push(leaf, 1000 + random() % 200'000, now);
      const bool had = g.tree.queued() > 0;
      ASSERT_EQ(had, g.pop(now) >= 0) << "seed " << seed;
      for (auto& p : pairs) {
        const auto &f = g.all[p.f], &h = g.all[p.g];
        if (f.queued == 0) {
          p.in = false;
          continue;
        }
        const double d = static_cast<double>(SfqTree::served(h.node)) / h.weight -
                         static_cast<double>(SfqTree::served(f.node)) / f.weight;
        if (!p.in) p.least = d, p.in = true;
        p.least = std::min(p.least, d);
        const double bound = static_cast<double>(f.most + credit) / f.weight +
                             static_cast<double>(h.most + credit) / h.weight + 0.01;
        ASSERT_LE(d - p.least, bound) << "seed " << seed << " step " << step << " nodes " << p.f << " " << p.g;
      }
    }
  }
}

// Away for a moment, a group catches up on what it missed, but on no more than the credit.
TEST(Sfq, Credit_isGivenAfterAShortGap_andIsBounded) {
  for (const bool in_time : {true, false}) {
    SfqTree t;
    t.set_keep(1000, 10'000);
    Flow a, b;
    a.node = t.add(t.root(), 100);
    b.node = t.add(t.root(), 100);
    for (int i = 0; i < 1000; ++i) t.push(b.node, b.add(1000), 0);
    t.push(a.node, a.add(1000), 0);
    for (int i = 0; i < 102; ++i) t.pop(0);  // a is dry after its one: 100 behind
    for (int i = 0; i < 1000; ++i) t.push(a.node, a.add(1000), in_time ? 1000 : 1001);
    const uint64_t had = SfqTree::served(a.node);
    for (int i = 0; i < 40; ++i) t.pop(2000);
    EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node) - had), in_time ? 25e3 : 20e3, 1001);
  }
}

// Caps anywhere in a random tree, against a second implementation of the bucket: an item is given out exactly when
// some group has one that no cap on its path holds back, next_ready() is no later than that, and no more than rate x
// time + burst + one item passes any capped node.
TEST(Sfq, Property_capsHoldAndNothingElseWaitsForThem) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    std::mt19937_64 random(seed);
    Grove g(random, 5 + random() % 10);
    struct Reference {  // when each would be in balance: reads and writes, bytes and numbers
      double bytes[2] = {}, ios[2] = {};
    };
    std::vector<Reference> reference(g.all.size());
    std::vector<std::array<double, 4>> passed(g.all.size(), {0, 0, 0, 0});
    auto rates = [](const QosCaps& c, bool write) {
      return std::pair(static_cast<double>(write ? c.wbps : c.rbps), static_cast<double>(write ? c.wiops : c.riops));
    };
    for (auto& b : g.all) {
      if (random() % 2 == 0) continue;
      for (uint64_t* cap : {&b.caps.rbps, &b.caps.wbps})
        if (random() % 3 == 0) *cap = 1'000'000 + random() % 100'000'000;
      for (uint64_t* cap : {&b.caps.riops, &b.caps.wiops})
        if (random() % 3 == 0) *cap = 100 + random() % 10'000;
      g.tree.set_caps(b.node, b.caps, 0);
    }
    constexpr double kRounding = 1.00005;  // intervals are whole ns
    constexpr double kBurst = static_cast<double>(SfqTree::kCapBurstNs);
    struct Asked {
      int order;
      uint64_t bytes;
    };
    std::vector<std::array<std::deque<Asked>, 2>> queues(g.all.size());  // reads, writes
    auto ready_at = [&](size_t leaf, bool write) {
      if (queues[leaf][write].empty()) return 1e30;
      double at = 0;
      for (int i = static_cast<int>(leaf); i >= 0; i = g.at(i).parent) {
        const auto [bps, iops] = rates(g.at(i).caps, write);
        const Reference& r = reference[static_cast<size_t>(i)];
        if (bps > 0) at = std::max(at, r.bytes[write] - kBurst);
        if (iops > 0) at = std::max(at, r.ios[write] - kBurst);
      }
      return at;
    };
    uint64_t now = 1'000'000'000;
    const uint64_t begin = now;
    for (int step = 0; step < 1500; ++step) {
      if (random() % 2 == 0) {
        const size_t leaf = g.leaves[random() % g.leaves.size()];
        const bool write = random() % 3 == 0;
        const uint64_t bytes = uint64_t{4096} << (random() % 6);
        queues[leaf][write].push_back({step, bytes});
        g.push(leaf, 1000 + random() % 100'000, now, bytes, write);
      }
      double first = 1e30;
      for (size_t leaf : g.leaves) first = std::min({first, ready_at(leaf, false), ready_at(leaf, true)});
      SfqItem* item = nullptr;
      const int leaf = g.pop(now, &item);
      const auto time = static_cast<double>(now);
      if (first < time - 2) ASSERT_GE(leaf, 0) << "seed " << seed << " step " << step << ": idle, and work may run";
      if (first > time + 2) ASSERT_LT(leaf, 0) << "seed " << seed << " step " << step << ": before its time";
      if (leaf < 0) {
        if (first < 1e30) {
          // Too early is allowed (another group may have used up a cap they share since), too late is not.
          ASSERT_GT(g.tree.next_ready(), now) << "seed " << seed << " step " << step;
          ASSERT_LE(static_cast<double>(g.tree.next_ready()), first + 4) << "seed " << seed << " step " << step;
          now = random() % 3 == 0 ? g.tree.next_ready() : now + random() % 2'000'000;
        } else {
          now += random() % 200'000;
        }
        continue;
      }
      const bool w = item->is_write;
      auto& queue = queues[static_cast<size_t>(leaf)][w];
      auto& other = queues[static_cast<size_t>(leaf)][!w];
      ASSERT_EQ(queue.front().bytes, item->bytes) << "seed " << seed << ": out of order";
      if (!other.empty() && other.front().order < queue.front().order)  // passed only if it was held back
        ASSERT_GT(ready_at(static_cast<size_t>(leaf), !w), time - 2) << "seed " << seed << ": out of order";
      queue.pop_front();
      for (int i = leaf; i >= 0; i = g.at(i).parent) {
        const auto [bps, iops] = rates(g.at(i).caps, w);
        auto& r = reference[static_cast<size_t>(i)];
        auto& sum = passed[static_cast<size_t>(i)];
        const double seconds = static_cast<double>(now - begin) / 1e9 + kBurst / 1e9;
        if (bps > 0) {
          ASSERT_LE(sum[w ? 1 : 0], bps * seconds * kRounding + 1) << "seed " << seed;
          r.bytes[w] = std::max(r.bytes[w], time) + std::floor(static_cast<double>(item->bytes) * 1e9 / bps);
        }
        if (iops > 0) {
          ASSERT_LE(sum[w ? 3 : 2], iops * seconds * kRounding + 1) << "seed " << seed;
          r.ios[w] = std::max(r.ios[w], time) + std::floor(1e9 / iops);  // whole ns, as there
        }
        sum[w ? 1 : 0] += static_cast<double>(item->bytes), sum[w ? 3 : 2] += 1;
      }
      if (random() % 4 != 0) now += random() % 300'000;
    }
  }
}

// To a group's own requests it is the same which of them goes first, but none is passed more than kMaxPassed times.
TEST(Sfq, Home_isPreferred_andNobodyIsPassedForEver) {
  SfqTree t;
  auto* group = t.add(t.root(), 100);
  std::deque<SfqItem> items;
  auto push = [&](uint32_t home) {
    items.push_back({});
    items.back().cost = 1000;
    items.back().home = home;
    t.push(group, &items.back(), 0);
    return &items.back();
  };
  SfqItem* foreign = push(1);
  int before = 0;
  for (int i = 0; i < 100; ++i) push(0);
  for (SfqItem* got = t.pop(0, nullptr, 0); got != foreign; got = t.pop(0, nullptr, 0)) {
    ASSERT_NE(got, nullptr);
    EXPECT_EQ(got->home, 0u);
    ASSERT_LE(++before, SfqTree::kMaxPassed);
  }
  EXPECT_EQ(before, SfqTree::kMaxPassed);
  for (int i = 0; i < 100 - before; ++i) ASSERT_NE(t.pop(0, nullptr, 1), nullptr);
  EXPECT_EQ(t.pop(0), nullptr);
}

// A group moved below another takes what is queued along, and what a mover owed or was owed stays behind.
TEST(Sfq, Move_takesTheQueueAlong_andSharesFollow) {
  SfqTree t;
  auto* tenant = t.add(t.root(), 100);
  Flow a, b, c;
  a.node = t.add(tenant, 100);
  b.node = t.add(t.root(), 100);
  c.node = t.add(t.root(), 100);
  for (int i = 0; i < 9000; ++i)
    for (auto* f : {&a, &b, &c}) t.push(f->node, f->add(1000), 0);
  for (int i = 0; i < 3000; ++i) t.pop(0);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node)), 1000e3, 3e3);
  t.move(b.node, tenant, 0);
  EXPECT_EQ(SfqTree::parent(b.node), tenant);
  const uint64_t b0 = SfqTree::served(b.node), a0 = SfqTree::served(a.node), c0 = SfqTree::served(c.node);
  for (int i = 0; i < 4000; ++i) ASSERT_NE(t.pop(0), nullptr);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(c.node) - c0), 2000e3, 3e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(a.node) - a0), 1000e3, 3e3);
  EXPECT_NEAR(static_cast<double>(SfqTree::served(b.node) - b0), 1000e3, 3e3);
}

// A tag left behind so far that it would look as if it lay ahead.
TEST(Sfq, VirtualTime_movesOnByMoreThanHalfItsRange_whoeverIdledIsStillServed) {
  SfqTree t;
  Flow idle;
  idle.node = t.add(t.root(), 100);
  auto* busy = t.add(t.root(), 1);
  SfqItem item;
  auto one = [&](uint64_t cost) {
    item = {}, item.cost = cost;
    t.push(busy, &item, 0);
    ASSERT_EQ(t.pop(0), &item);
  };
  t.push(idle.node, idle.add(1000), 0);
  ASSERT_NE(t.pop(0), nullptr);
  for (int i = 0; i < 40; ++i) one(uint64_t{1} << 42);  // each 2^58 of virtual time: 2^63 and more together
  std::deque<SfqItem> more(10);
  for (auto& m : more) m.cost = 1'000'000, t.push(busy, &m, 0);
  SfqItem* back = idle.add(1000);
  t.push(idle.node, back, 0);
  int before = 0;
  while (t.pop(0) != back) ASSERT_LT(++before, 3);
}

TEST(Sfq, VirtualTime_wraps_sharesHold) {
  SfqTree t;
  Flow a, b;
  a.node = t.add(t.root(), 1);
  b.node = t.add(t.root(), 2);
  SfqItem item[2];
  // Each step moves V by about 2^60: it wraps several times over.
  for (int round = 0; round < 90; ++round) {
    for (auto& i : item) i = {}, i.cost = uint64_t{1} << 42;
    t.push(a.node, &item[0], 0);
    t.push(b.node, &item[1], 0);
    ASSERT_NE(t.pop(0), nullptr);
    ASSERT_NE(t.pop(0), nullptr);
    ASSERT_EQ(t.pop(0), nullptr);
  }
  EXPECT_EQ(SfqTree::served(a.node), SfqTree::served(b.node));
}

}  // namespace
}  // namespace spillway
