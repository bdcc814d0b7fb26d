// The search for the knee on made-up curves: no disk, no clock.
#include "src/qos/depth.h"

#include <algorithm>
#include <functional>
#include <random>

#include <gtest/gtest.h>

namespace spillway {
namespace {

// Windows of a disk whose throughput by depth is `curve`, each off by a normal error of `noise`.
void run(DepthControl& control, int windows, double noise, const std::function<double(double)>& curve,
         uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> error(1, noise);
  for (int i = 0; i < windows; ++i) control.window(curve(control.depth()) * error(random), true, 0, 0);
}
double sharp(double depth) { return std::min(depth, 16.0); }

TEST(DepthControl, SharpKnee_isFoundFromEitherSide) {
  for (const uint32_t from : {4u, 100u}) {
    DepthControl control(from, 2, 256);
    run(control, 4000, 0.01, sharp);
    EXPECT_GE(control.knee(), 15u) << from;
    EXPECT_LE(control.knee(), 20u) << from;
  }
}

TEST(DepthControl, NoiseAlone_movesNothing) {
  // A quarter more gives 0.8 % (1.2 % are wanted), a fifth less takes 1 % (0.6 % are allowed): the knee is here.
  const auto here = [](double d) { return d > 40 ? 1.008 : d < 40 ? 0.99 : 1.0; };
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    DepthControl control(40, 2, 256);
    run(control, 5000, 0.03, here, seed);
    EXPECT_EQ(control.knee(), 40u) << seed;
  }
}

TEST(DepthControl, Floor_isNotPassedBelow) {
  DepthControl control(40, 2, 256, 32);
  run(control, 4000, 0.005, [](double) { return 1.0; });  // any depth would do
  EXPECT_EQ(control.knee(), 32u);
}

TEST(DepthControl, UnsaturatedWindows_sayNothing) {
  DepthControl control(40, 2, 256);
  for (int i = 0; i < 4000; ++i) control.window(sharp(control.depth()), false, 0, 0);
  EXPECT_EQ(control.knee(), 40u);
}

TEST(DepthControl, Shares_holdDepthBelowWhatFits_whatIsMissedTightensIt_andItComesBack) {
  DepthControl control(64, 2, 256);
  for (int i = 0; i < 2000; ++i) control.window(64, true, 40, 0);
  EXPECT_EQ(control.depth(), 39u);  // 98 % of it: nothing is lost
  EXPECT_EQ(control.knee(), 64u);   // and that is no place to look for the knee
  for (int i = 0; i < 2000; ++i) control.window(64, true, 40, 0.03);
  EXPECT_EQ(control.depth(), 24u);  // 60 %, not less
  for (int i = 0; i < 2000; ++i) control.window(64, true, 40, 0);
  EXPECT_EQ(control.depth(), 39u);
  // One bad moment is no reason.
  control.window(64, true, 40, 0.2);
  EXPECT_GE(control.depth(), 38u);
  // A tenant with so little outstanding is limited by itself: the disk is not throttled for it. Nor for none.
  for (const double fits : {20.0, 0.0}) {
    control.window(64, true, fits, 0);
    EXPECT_GE(control.depth(), 51u) << fits;  // the knee, or what is tried beside it
  }
}

}  // namespace
}  // namespace spillway
