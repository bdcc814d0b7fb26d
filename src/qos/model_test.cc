// What costs are learned from, and what not.
#include "src/qos/model.h"

#include <cmath>

#include <gtest/gtest.h>

namespace spillway {
namespace {

struct Window {
  double ns[kIoKinds][kSizeClasses] = {};
};
constexpr auto kRead = static_cast<size_t>(IoKind::kReadRandom), kWrite = static_cast<size_t>(IoKind::kWriteRandom);

TEST(CostTable, PureWindows_bringTheCostToTheInverseOfThroughput) {
  QosModel model;
  model.calibrated = true;
  CostTable table(model);
  const double before = static_cast<double>(table.cost(IoKind::kReadRandom, 0, 4096));
  // 50'000 a second, in windows of 20 ms.
  for (int i = 0; i < 300; ++i) {
    Window w;
    w.ns[kRead][0] = 1000.0 * static_cast<double>(table.cost(IoKind::kReadRandom, 0, 4096));
    EXPECT_TRUE(table.learn(w.ns, 20e6));
  }
  EXPECT_NEAR(static_cast<double>(table.cost(IoKind::kReadRandom, 0, 4096)), 20'000, 50);
  EXPECT_GT(std::abs(before - 20'000), 1000);
  // Nothing else has changed.
  const CostTable fresh(model);
  EXPECT_EQ(table.cost(IoKind::kReadRandom, 1, 8192), fresh.cost(IoKind::kReadRandom, 1, 8192));
  EXPECT_EQ(table.cost(IoKind::kWriteRandom, 0, 4096), fresh.cost(IoKind::kWriteRandom, 0, 4096));
}

TEST(CostTable, NoisyWindows_areAveraged) {
  CostTable table(QosModel{});
  for (int i = 0; i < 600; ++i) {
    Window w;
    const double n = i % 2 == 0 ? 700 : 1300;  // 30 % off, to either side
    w.ns[kRead][0] = n * static_cast<double>(table.cost(IoKind::kReadRandom, 0, 4096));
    table.learn(w.ns, 20e6);
  }
  // The inverse of the mean, not the last of them, and not the mean of the inverses (10 % more).
  EXPECT_NEAR(static_cast<double>(table.cost(IoKind::kReadRandom, 0, 4096)), 20'000, 20'000 * 0.02);
}

TEST(CostTable, MixedWindows_andLargeOnesThatWereHeldBack_teachNothing) {
  CostTable table(QosModel{});
  const CostTable fresh(QosModel{});
  Window mixed;
  mixed.ns[kRead][0] = mixed.ns[kWrite][0] = 1e6;
  EXPECT_FALSE(table.learn(mixed.ns, 20e6));
  mixed.ns[kWrite][0] = 0.05e6;  // 5 % are still too much
  EXPECT_FALSE(table.learn(mixed.ns, 20e6));
  Window large;
  large.ns[kRead][5] = 1e6;
  EXPECT_FALSE(table.learn(large.ns, 20e6, 1));
  EXPECT_FALSE(table.learn(Window{}.ns, 20e6));
  for (size_t cls : {0, 5})
    EXPECT_EQ(table.cost(IoKind::kReadRandom, cls, 4096), fresh.cost(IoKind::kReadRandom, cls, 4096));
  EXPECT_TRUE(table.learn(large.ns, 20e6));
}

// A disk a thousand times slower than guessed, of which writes are learned first: reads beside them are not a thousandth of it.
TEST(CostTable, WhatWasNotLearnedYet_keepsItsRatioToWhatWas) {
  CostTable table{QosModel()};
  const auto cost = [&](IoKind k, uint64_t bytes) { return static_cast<double>(table.cost(k, size_class(bytes), bytes)); };
  const double ratio = cost(IoKind::kReadRandom, 4096) / cost(IoKind::kWriteRandom, 4096);
  const double truth = 1000 * cost(IoKind::kWriteRandom, 4096);
  for (int i = 0; i < 4; ++i) {
    double done[kIoKinds][kSizeClasses] = {};
    done[static_cast<size_t>(IoKind::kWriteRandom)][0] = 100 * cost(IoKind::kWriteRandom, 4096);
    ASSERT_TRUE(table.learn(done, 100 * truth));
  }
  EXPECT_NEAR(cost(IoKind::kWriteRandom, 4096) / truth, 1, 0.01);
  EXPECT_NEAR(cost(IoKind::kReadRandom, 4096) / cost(IoKind::kWriteRandom, 4096) / ratio, 1, 0.01);
  table.learn_slow(IoKind::kFlush, 5e6);
  EXPECT_NEAR(cost(IoKind::kFlush, 0), 5e6, 5e4);
}

}  // namespace
}  // namespace spillway
