#include "benchmarks/leak/auc.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace spillway::bench {
namespace {

TEST(Auc, KnownScores_countPairs) {
  // 3 of 4 pairs in order.
  const Auc a = auc({1, 3, 2, 4}, {false, false, true, true});
  EXPECT_DOUBLE_EQ(a.value, 0.75);
  EXPECT_DOUBLE_EQ(auc({1, 1, 1}, {false, true, true}).value, 0.5);
  EXPECT_DOUBLE_EQ(auc({1, 2, 3}, {false, true, true}).value, 1);
  EXPECT_DOUBLE_EQ(auc({3, 2, 1}, {false, true, true}).value, 0);
  EXPECT_DOUBLE_EQ(auc({1, 2}, {true, true}).value, 0.5);
}

TEST(Auc, Noise_intervalCoversOneHalf_asOftenAsItSays) {
  std::mt19937_64 r(7);
  std::normal_distribution<> noise;
  int covered = 0;
  constexpr int kTrials = 400;
  for (int t = 0; t < kTrials; ++t) {
    std::vector<Auc> runs;
    for (int k = 0; k < 10; ++k) {
      std::vector<double> s(200);
      std::vector<bool> l(200);
      for (size_t i = 0; i < s.size(); ++i) s[i] = noise(r), l[i] = r() % 2 == 0;
      runs.push_back(auc(s, l));
    }
    const Pooled p = pool(runs, 1.96);
    covered += std::abs(p.mean - 0.5) <= p.half_width;
  }
  EXPECT_NEAR(static_cast<double>(covered) / kTrials, 0.95, 0.035);
}

TEST(Classifier, WeakSignalInTwoFeatures_isFound_noiseIsNot) {
  std::mt19937_64 r(3);
  std::normal_distribution<> noise;
  auto draw = [&](double signal, std::vector<std::vector<double>>& rows, std::vector<bool>& label) {
    for (int i = 0; i < 2000; ++i) {
      const bool l = r() % 2 == 0;
      rows.push_back({noise(r), noise(r) + (l ? signal : 0), noise(r) - (l ? signal : 0)});
      label.push_back(l);
    }
  };
  for (double signal : {0.0, 0.5}) {
    std::vector<std::vector<double>> train, test;
    std::vector<bool> a, b;
    draw(signal, train, a);
    draw(signal, test, b);
    Classifier c;
    c.train(train, a);
    std::vector<double> s;
    for (auto& row : test) s.push_back(c.score(row));
    const double got = auc(s, b).value;
    if (signal == 0) EXPECT_NEAR(got, 0.5, 0.04);
    else EXPECT_GT(got, 0.65);
  }
}

TEST(NormalScores, Ranks_notSizes_count) {
  const auto s = normal_scores({1, 1000000, 2});
  EXPECT_NEAR(s[2], 0, 1e-9);
  EXPECT_NEAR(s[0], -s[1], 1e-9);
}

}  // namespace
}  // namespace spillway::bench
