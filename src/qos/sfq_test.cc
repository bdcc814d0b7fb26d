// Q1, the arithmetic: proportional service within the bound that sfq.h derives, hierarchy, caps, return from idling.
#include "src/qos/sfq.h"

#include <algorithm>
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
  a.node = t.add(t.root(), 1);
  b.node = t.add(t.root(), 10000);
  for (int i = 0; i < 3000; ++i) t.push(a.node, a.add(1000), 0), t.push(b.node, b.add(1000), 0);
  for (int i = 0; i < 1000; ++i) t.pop(0);
  t.set_weight(a.node, 10000);
  const uint64_t had = SfqTree::served(a.node);
  // What it already owes for its last item was priced at the old weight; move() and idling would forgive it as well.
  for (int i = 0; i < 2000; ++i) t.pop(0);
  EXPECT_GE(SfqTree::served(a.node), had);
}

// Any number of groups, weights, sizes and arrival patterns: over every interval in which two siblings are backlogged,
// their normalised service differs by no more than the stated bound; and something is always served.
TEST(Sfq, Property_boundHoldsOverEveryBackloggedInterval) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    std::mt19937_64 random(seed);
    SfqTree t;
    const uint64_t credit = seed % 3 == 0 ? 0 : random() % 500'000;
    t.set_keep(credit == 0 ? 0 : random() % 3'000'000, credit);
    auto* group = seed % 2 == 0 ? t.root() : t.add(t.root(), 1 + random() % 10000);
    std::vector<Flow> flows(2 + random() % 12);
    std::vector<uint64_t> since(flows.size(), 0);  // start of the backlogged interval, as a step
    std::vector<std::vector<double>> tags(flows.size());
    for (auto& f : flows) {
      f.weight = static_cast<uint32_t>(random() % 4 == 0 ? 1 + random() % 10000 : 50 + random() % 500);
      f.node = t.add(group, f.weight);
    }
    uint64_t now = 0;
    const int steps = 1500;
    std::vector<std::vector<double>> served(flows.size(), std::vector<double>(steps + 1, 0));
    std::vector<std::vector<char>> busy(flows.size(), std::vector<char>(steps + 1, 0));
    for (int s = 1; s <= steps; ++s) {
      now += random() % 200'000;
      for (auto& f : flows) {
        const unsigned roll = random() % 100;
        const unsigned n = roll < 5 ? 20 : roll < 30 ? 1 : 0;
        for (unsigned i = 0; i < n; ++i) t.push(f.node, f.add(1000 + random() % 200'000), now);
      }
      const bool had = t.queued() > 0;
      SfqItem* item = t.pop(now);
      ASSERT_EQ(had, item != nullptr) << "seed " << seed;
      for (size_t i = 0; i < flows.size(); ++i) {
        served[i][s] = static_cast<double>(SfqTree::served(flows[i].node)) / flows[i].weight;
        busy[i][s] = SfqTree::queued_at(flows[i].node) > 0;
      }
    }
    for (size_t f = 0; f < flows.size(); ++f)
      for (size_t g = f + 1; g < flows.size(); ++g) {
        const double bound = static_cast<double>(flows[f].most + credit) / flows[f].weight +
                             static_cast<double>(flows[g].most + credit) / flows[g].weight + 0.01;
        double low = 0, high = 0;
        bool in = false;
        for (int s = 1; s <= steps; ++s) {
          if (!busy[f][s] || !busy[g][s]) {
            in = false;
            continue;
          }
          const double d = served[f][s] - served[g][s];
          if (!in) low = high = d, in = true;
          low = std::min(low, d), high = std::max(high, d);
          ASSERT_LE(high - low, bound) << "seed " << seed << " flows " << f << " " << g;
        }
      }
  }
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
