#include "src/qos/calibrate.h"

#include <gtest/gtest.h>

#include "src/io/sim_reactor.h"
#include "src/volume/sim/sim.h"

namespace spillway {
namespace {

TEST(Calibrate, ModelledSsd_givesItsPublishedFigures) {
  SimReactor r;
  auto d = make_sim("d0", {.size = kGiB, .model = "ssd"}).value();
  CalibrateOptions o;
  o.seconds = 0.3;
  o.rounds = 3;
  o.writes = true;
  auto c = r.block_on(calibrate(d, o));
  ASSERT_TRUE(c) << c.error().message();
  EXPECT_NEAR(1e9 / c->model.io[0].cost(4096), 32 / 78.4e-6, 20e3);  // 32 at a time: not quite all its dies
  EXPECT_NEAR(131072 / c->model.io[0].cost(131072), 2.85, 0.1);      // bytes per ns
  EXPECT_NEAR(1e9 / c->model.io[2].cost(4096), 70e3, 3e3);
  EXPECT_GE(c->model.depth, 32u);
  EXPECT_LE(c->model.depth, 64u);
  EXPECT_GE(c->model.flush_ns, c->model.io[2].cost(4096));
  auto again = QosModel::parse(c->to_text());
  ASSERT_TRUE(again);
  EXPECT_EQ(again->to_text(), c->model.to_text());
}

TEST(Calibrate, ModelledHdd_knowsThatSeeksCost) {
  SimReactor r;
  auto d = make_sim("d0", {.size = kTiB}).value();
  CalibrateOptions o;
  o.seconds = 60;
  o.rounds = 1;
  auto c = r.block_on(calibrate(d, o));
  ASSERT_TRUE(c);
  EXPECT_GT(c->model.io[0].cost(4096), 20 * c->model.io[1].cost(4096));
}

TEST(Calibrate, FailingDisk_saysSo) {
  SimReactor r;
  auto d = make_sim("d0", {.size = kGiB, .model = "ssd", .faults = {parse_sim_fault("read error nth=500").value()}});
  CalibrateOptions o;
  o.seconds = 1;
  auto c = r.block_on(calibrate(d.value(), o));
  ASSERT_FALSE(c);
  EXPECT_NE(c.error().message().find("d0"), std::string::npos);
}

TEST(QosModel, Text_nonsense_isRefusedByName) {
  EXPECT_FALSE(QosModel::parse("read-random.fixed_ns"));
  EXPECT_FALSE(QosModel::parse("read-random.colour 5"));
  EXPECT_FALSE(QosModel::parse("depth minus"));
}

}  // namespace
}  // namespace spillway
