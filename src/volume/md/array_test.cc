// mirror and raid5 over disks that fail (V2): contents against a model, faults, rebuild, scrub, refusals.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "src/io/sim_reactor.h"
#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/linear/linear.h"
#include "src/volume/md/superblock.h"
#include "src/volume/memory/memory.h"
#include "src/volume/sim/sim.h"
#include "src/volume/slice/slice.h"
#include "src/volume/md/raid0.h"
#include "src/volume/md/testing.h"

namespace spillway {
namespace {

using namespace md::testing_support;

class Redundant : public ::testing::TestWithParam<Shape> {};

TEST_P(Redundant, survives_failure_rebuild_and_another_failure) {  // V2
  Rig rig(GetParam());
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  ArrayControl* control = array_control(*v);
  ASSERT_NE(control, nullptr);
  Model model(v->size(), v->geometry().block_size, 7);
  model.steps(rig.sim, *v, 60);
  model.check(rig.sim, *v);

  rig.disks[1]->kill();
  model.steps(rig.sim, *v, 60);
  model.check(rig.sim, *v);
  EXPECT_EQ(state_of(*v, "d1"), "faulty");
  EXPECT_EQ(array_status(*v).state, "degraded");

  Disk fresh = disk("fresh", 2 * kMiB, GetParam().block);
  Status s = rig.sim.block_on(control->add_member(fresh));
  ASSERT_TRUE(s) << s.error().message();
  model.steps(rig.sim, *v, 30);  // while it rebuilds
  rig.sim.block_on(control->wait_idle());
  EXPECT_EQ(state_of(*v, "fresh"), "active");
  model.check(rig.sim, *v);
  ASSERT_TRUE(rig.sim.block_on(control->start_scrub(ArrayControl::Scrub::kCheck)));
  rig.sim.block_on(control->wait_idle());
  EXPECT_EQ(array_status(*v).mismatch_blocks, 0u);

  rig.disks[0]->kill();  // now everything of d0 comes from the others, fresh among them
  model.check(rig.sim, *v);
  model.steps(rig.sim, *v, 40);
  model.check(rig.sim, *v);
  rig.close(v);

  // Assembled again from what is left; the members that failed are not believed.
  rig.disks[0]->revive();
  rig.disks[1]->revive();
  rig.disks[1] = fresh;
  v = rig.open();
  ASSERT_TRUE(v);
  EXPECT_EQ(state_of(*v, "d0"), "-");
  EXPECT_EQ(array_status(*v).state, "degraded");
  model.check(rig.sim, *v);
  rig.close(v);
}

TEST_P(Redundant, reopens_clean_with_the_same_contents) {
  Rig rig(GetParam());
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  Model model(v->size(), v->geometry().block_size, 3);
  for (int round = 0; round < 3; ++round) {
    model.steps(rig.sim, *v, 30);
    rig.close(v);
    for (auto& d : rig.disks) {
      auto sb = rig.sim.block_on(md::read_superblock(*d));
      ASSERT_TRUE(sb && *sb);
      EXPECT_TRUE((*sb)->clean());
    }
    v = rig.open();
    ASSERT_TRUE(v);
    EXPECT_EQ(array_status(*v).operation, "idle");
    model.check(rig.sim, *v);
  }
  rig.close(v);
}

TEST_P(Redundant, read_errors_are_corrected_from_redundancy) {
  Rig rig(GetParam());
  LayerSpec spec = rig.spec();
  std::vector<std::shared_ptr<testing_support::BadSectors>> media;
  for (auto& m : spec.members) {
    media.push_back(std::make_shared<testing_support::BadSectors>(m));
    m = media.back();
  }
  VolumePtr v = rig.sim.block_on(assemble(spec)).value();
  Model model(v->size(), v->geometry().block_size, 5);
  model.steps(rig.sim, *v, 40);
  // One bad sector in many places, never two in one row.
  size_t k = 0;
  for (uint64_t at = kMiB + 4096; at < 2 * kMiB; at += 65536) media[k++ % media.size()]->spoil(at);
  model.steps(rig.sim, *v, 20);
  model.check(rig.sim, *v);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->start_scrub(ArrayControl::Scrub::kRepair)));
  rig.sim.block_on(array_control(*v)->wait_idle());
  for (const auto& m : media) EXPECT_EQ(m->bad(), 0u);
  uint64_t corrected = 0;
  for (const auto& m : array_status(*v).members) corrected += m.read_errors;
  EXPECT_GT(corrected, 0u);
  EXPECT_NE(array_status(*v).state, "degraded");
  model.check(rig.sim, *v);
  rig.close(v);
}

TEST_P(Redundant, member_changed_behind_our_back_is_found_and_repaired) {
  Rig rig(GetParam());
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  Model model(v->size(), v->geometry().block_size, 6);
  model.steps(rig.sim, *v, 40);
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*rig.disks.back(), kMiB + 64 * kKiB, random_bytes(9, 8192))));
  ArrayControl* control = array_control(*v);
  for (auto mode : {ArrayControl::Scrub::kCheck, ArrayControl::Scrub::kRepair, ArrayControl::Scrub::kCheck}) {
    ASSERT_TRUE(rig.sim.block_on(control->start_scrub(mode)));
    rig.sim.block_on(control->wait_idle());
    static int round = 0;
    EXPECT_EQ(array_status(*v).mismatch_blocks, ++round % 3 == 0 ? 0u : 16u);
  }
  rig.close(v);
}

TEST_P(Redundant, two_failures_fail_the_array_and_only_then) {
  Rig rig(GetParam());
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  const auto data = random_bytes(1, 128 * kKiB);
  rig.disks[0]->kill();
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, data)));
  rig.disks[1]->kill();
  Status s = rig.sim.block_on(write_bytes(*v, 0, data));
  EXPECT_EQ(s.has_value(), std::string_view(GetParam().layer) == "mirror" && GetParam().disks > 2);
  (void)rig.sim.block_on(v->close());
}

std::vector<Shape> shapes() {
  std::vector<Shape> all = {{"mirror", 2, "", "bitmap", 0}, {"mirror", 3, "", "resync", 0}, {"mirror", 2, "", "bitmap", 0, 4096}};
  for (const char* layout : {"left-symmetric", "left-asymmetric", "right-symmetric", "right-asymmetric"})
    all.push_back({"raid5", 3, layout, "bitmap", 32 * kKiB});
  all.push_back({"raid5", 5, "left-symmetric", "ppl", 16 * kKiB});
  all.push_back({"raid5", 4, "right-asymmetric", "ppl", 64 * kKiB});
  all.push_back({"raid5", 5, "left-symmetric", "resync", 4 * kKiB});
  all.push_back({"raid5", 4, "left-symmetric", "ppl", 16 * kKiB, 4096});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, Redundant, ::testing::ValuesIn(shapes()), [](const auto& test) {
  std::ostringstream os;
  PrintTo(test.param, &os);
  std::string n = os.str();
  std::replace(n.begin(), n.end(), '-', '_');
  return n;
});

const Shape kFour{"raid5", 4, "left-symmetric", "resync", 64 * kKiB};

TEST(Raid5_full_rows, are_written_without_reading) {
  Rig rig(kFour);
  VolumePtr v = rig.open();
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(1, 192 * kKiB))));  // activates
  uint64_t reads = 0, written = 0, writes = 0;
  for (auto& d : rig.disks) reads -= d->counters().reads, written -= d->counters().written_bytes, writes -= d->counters().writes;
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 192 * kKiB, random_bytes(2, 2 * 192 * kKiB))));
  for (auto& d : rig.disks) reads += d->counters().reads, written += d->counters().written_bytes, writes += d->counters().writes;
  EXPECT_EQ(writes, 4u);  // one to each member, for both rows
  EXPECT_EQ(reads, 0u);
  EXPECT_EQ(written, 2 * 256 * kKiB);
  rig.close(v);
}

TEST(Raid5_partial_writes, read_whichever_is_less) {
  Rig rig({"raid5", 6, "left-symmetric", "resync", 64 * kKiB});
  VolumePtr v = rig.open();
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(1, 4096))));
  const auto reads = [&](uint64_t at, uint64_t n) {
    uint64_t r = 0;
    for (auto& d : rig.disks) r -= d->counters().read_bytes;
    EXPECT_TRUE(rig.sim.block_on(write_bytes(*v, at, random_bytes(at, n))));
    for (auto& d : rig.disks) r += d->counters().read_bytes;
    return r;
  };
  EXPECT_EQ(reads(4096, 4096), 2 * 4096u);                       // old data + parity, not four others
  EXPECT_EQ(reads(0, 4 * 64 * kKiB), 64 * kKiB);                 // the one disk not written
  EXPECT_EQ(reads(64 * kKiB, 3 * 64 * kKiB), 2 * 64 * kKiB);     // two not written
  rig.close(v);
}

TEST(Raid5_dirty_degraded, is_refused_without_force_and_readable) {
  Rig rig(kFour);
  VolumePtr v = rig.open();
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(1, 4096))));
  // The daemon is "killed" here: the superblocks say dirty. The copies below are what is on the disks.
  std::vector<Disk> copies;
  for (auto& d : rig.disks) {
    copies.push_back(disk(d->name()));
    auto all = rig.sim.block_on(read_bytes(*d, 0, d->size()));
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*copies.back(), 0, *all)));
  }
  rig.close(v);
  rig.disks = copies;
  LayerSpec spec = rig.spec();
  spec.members[2] = nullptr;
  auto r = rig.sim.block_on(assemble(spec));
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().kind(), ErrorKind::kDegraded);
  EXPECT_NE(r.error().message().find("--force"), std::string::npos) << r.error().message();
  spec.read_only = true;
  auto ro = rig.sim.block_on(assemble(spec));
  ASSERT_TRUE(ro) << ro.error().message();
  spec.read_only = false;
  spec.force = true;
  auto forced = rig.sim.block_on(assemble(spec));
  ASSERT_TRUE(forced) << forced.error().message();
  EXPECT_TRUE(rig.sim.block_on(write_bytes(**forced, 0, random_bytes(1, 4096))));
  EXPECT_TRUE(rig.sim.block_on((*forced)->close()));
}

TEST(Raid5_hot_spare, takes_over_by_itself) {
  Rig rig(kFour);
  LayerSpec spec = rig.spec();
  Disk spare = disk("spare");
  spec.spares = {spare};
  VolumePtr v = rig.sim.block_on(assemble(spec)).value();
  Model model(v->size(), 512, 4);
  model.steps(rig.sim, *v, 20);
  rig.disks[3]->kill();
  model.steps(rig.sim, *v, 20);
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(state_of(*v, "spare"), "active");
  EXPECT_NE(array_status(*v).state, "degraded");
  rig.disks[0]->kill();
  model.check(rig.sim, *v);
  rig.close(v);
}

TEST(Rebuild_interrupted_by_close, goes_on_where_it_was) {
  Rig rig(kFour, 8 * kMiB);
  VolumePtr v = rig.open();
  Model model(v->size(), 512, 4);
  model.steps(rig.sim, *v, 20);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->fail_member("d2")));
  rig.close(v);
  LayerSpec spec = rig.spec();
  spec.members[2] = disk("new", 8 * kMiB);
  SimFault slow;  // so that the rebuild does not finish at once
  slow.kind = SimFault::Kind::kDelay;
  slow.delay_ns = 10'000'000;
  auto* target = dynamic_cast<SimVolume*>(spec.members[2].get());
  v = rig.sim.block_on(assemble(spec)).value();
  target->inject(slow);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->add_member(spec.members[2])));
  auto wait = []() -> Task<void> { co_await Reactor::current().sleep_for(400'000'000); };
  rig.sim.block_on(wait());
  EXPECT_EQ(array_status(*v).operation, "rebuild");
  rig.close(v);
  target->clear_faults();
  auto sb = rig.sim.block_on(md::read_superblock(*target));
  ASSERT_TRUE(sb && *sb);
  EXPECT_GT((*sb)->raw.recovery_offset, 0u);
  EXPECT_LT((*sb)->raw.recovery_offset, (*sb)->raw.size);
  const uint64_t before = target->counters().written_bytes;
  v = rig.sim.block_on(assemble(spec)).value();
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(state_of(*v, "new"), "active");
  EXPECT_LT(target->counters().written_bytes - before, 6 * kMiB);
  rig.disks[0]->kill();
  model.check(rig.sim, *v);
  rig.close(v);
}

TEST(Nested_layers, distribution_root_and_linear_over_raid5) {  // V1: the two model cases
  SimReactor sim{3};
  LayerSpec m;
  m.name = "root";
  m.layer = "mirror";
  m.members = {disk("a", 6 * kMiB), disk("b", 6 * kMiB)};
  VolumePtr mirror = sim.block_on(assemble(m)).value();
  std::vector<VolumePtr> parts = {make_slice("p0", mirror, kMiB, kMiB).value(), make_slice("p1", mirror, 3 * kMiB, kMiB).value()};
  VolumePtr lv = make_linear("lv", parts).value();
  Model model(lv->size(), 512, 4);
  model.steps(sim, *lv, 50);
  model.check(sim, *lv);

  // linear over two stripes, each over two raid5 sets of three disks
  std::vector<VolumePtr> stripes;
  std::vector<Disk> disks;
  for (int s = 0; s < 2; ++s) {
    LayerSpec st;
    st.name = fmt::format("s{}", s);
    st.layer = "stripe";
    st.chunk = 32 * kKiB;
    for (int k = 0; k < 2; ++k) {
      LayerSpec r;
      r.name = fmt::format("r{}{}", s, k);
      r.layer = "raid5";
      r.chunk = 16 * kKiB;
      for (int d = 0; d < 3; ++d) {
        disks.push_back(disk(fmt::format("x{}{}{}", s, k, d)));
        r.members.push_back(disks.back());
      }
      st.members.push_back(sim.block_on(assemble(r)).value());
    }
    stripes.push_back(sim.block_on(assemble(st)).value());
  }
  VolumePtr top = make_linear("top", stripes).value();
  EXPECT_EQ(top->geometry().independent_region, stripes[0]->size());  // V3
  Model model2(top->size(), 512, 8);
  model2.steps(sim, *top, 50);
  for (size_t i = 0; i < disks.size(); i += 3) disks[i]->kill();  // one disk of every raid5
  model2.steps(sim, *top, 50);
  model2.check(sim, *top);
  EXPECT_TRUE(sim.block_on(lv->close()));
  EXPECT_TRUE(sim.block_on(top->close()));
}

// --- bad input: one clear line each, nothing written ---

uint64_t written(const std::vector<Disk>& disks) {
  uint64_t n = 0;
  for (const auto& d : disks) n += d->counters().written_bytes;
  return n;
}

std::string refusal(Rig& rig, LayerSpec spec) {
  const uint64_t before = written(rig.disks);
  auto r = rig.sim.block_on(assemble(std::move(spec)));
  EXPECT_FALSE(r);
  EXPECT_EQ(written(rig.disks), before);
  if (r) {
    (void)rig.sim.block_on((*r)->close());
    return "";
  }
  EXPECT_EQ(r.error().message().find('\n'), std::string::npos);
  return r.error().message();
}
#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

class BadInput : public ::testing::Test {
 protected:
  void SetUp() override {
    VolumePtr v = rig.open();
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(1, 4096))));
    rig.close(v);
  }
  md::Superblock sb(int i) { return **rig.sim.block_on(md::read_superblock(*rig.disks[static_cast<size_t>(i)])); }
  void put(int i, md::Superblock s) {
    ASSERT_TRUE(rig.sim.block_on(md::write_superblock(*rig.disks[static_cast<size_t>(i)], s)));
  }
  Rig rig{{"raid5", 3, "left-symmetric", "bitmap", 64 * kKiB}};
};

TEST_F(BadInput, bit_flips_in_the_superblock) {
  auto page = rig.sim.block_on(read_bytes(*rig.disks[1], 4096, 512)).value();
  for (size_t bit = 32; bit < 260 * 8; bit += 7) {
    auto bad = page;
    bad[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*rig.disks[1], 4096, bad)));
    const std::string text = refusal(rig, rig.spec());
    EXPECT_SAYS(text, "member d1");
  }
}

TEST_F(BadInput, config_contradicts_superblock) {
  LayerSpec s = rig.spec();
  s.chunk = 128 * kKiB;
  EXPECT_SAYS(refusal(rig, s), "chunk 131072 but the superblocks say 65536");
  s = rig.spec();
  s.layer = "mirror";
  EXPECT_SAYS(refusal(rig, s), "layer \"mirror\" but the superblocks say md raid5");
  s = rig.spec();
  s.raid5_layout = "right-symmetric";
  EXPECT_SAYS(refusal(rig, s), "layout right-symmetric but");
  s = rig.spec();
  s.consistency = "ppl";
  EXPECT_SAYS(refusal(rig, s), "consistency ppl but the superblocks say bitmap");
  s = rig.spec();
  s.members.pop_back();
  EXPECT_SAYS(refusal(rig, s), "2 members but the superblocks say 3");
}

TEST_F(BadInput, foreign_cloned_and_missing_members) {
  Rig other({"raid5", 3, "left-symmetric", "bitmap", 64 * kKiB}, 2 * kMiB, &rig.sim);
  VolumePtr v = other.open();
  other.close(v);
  LayerSpec s = rig.spec();
  s.members[2] = other.disks[2];
  EXPECT_SAYS(refusal(rig, s), "members of different arrays");
  Disk clone = disk("clone");
  ASSERT_TRUE(rig.sim.block_on(
      write_bytes(*clone, 0, rig.sim.block_on(read_bytes(*rig.disks[0], 0, clone->size())).value())));
  s = rig.spec();
  s.members[1] = clone;
  EXPECT_SAYS(refusal(rig, s), "are copies of one member");
  s = rig.spec();
  s.members[1] = s.members[0];
  EXPECT_SAYS(refusal(rig, s), "listed twice");
  s = rig.spec();
  s.members[0] = s.members[1] = nullptr;
  EXPECT_SAYS(refusal(rig, s), "1 of 3 members usable, needs 2");
  Disk used = disk("used");
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*used, 0, random_bytes(3, 4096))));
  s = rig.spec();
  s.members[0] = used;
  EXPECT_SAYS(refusal(rig, s), "member used has no md superblock");
}

TEST_F(BadInput, other_levels_versions_and_features_by_name) {
  struct Case {
    std::function<void(md::RawSuperblock&)> change;
    const char* says;
  };
  const Case cases[] = {
      {[](auto& r) { r.level = 6; }, "md raid6 is not supported"},
      {[](auto& r) { r.level = 10; }, "md raid10 is not supported"},
      {[](auto& r) { r.level = 77; }, "md level 77 is not supported"},
      {[](auto& r) { r.major_version = 2; }, "md superblock version 2"},
      {[](auto& r) { r.feature_map |= md::kFeatureReshape; }, "reshape"},
      {[](auto& r) { r.feature_map |= md::kFeatureJournal; }, "journal"},
      {[](auto& r) { r.feature_map |= md::kFeatureBadBlocks; }, "bad block log"},
      {[](auto& r) { r.feature_map |= 1u << 20; }, "unknown md features 0x100000"},
      {[](auto& r) { r.layout = 16; }, "raid5 layout 16"},
      {[](auto& r) { r.data_size = 1 << 30; }, "too small"},
      {[](auto& r) { r.raid_disks = 0; }, "0 members"},
      {[](auto& r) { r.chunk_sectors = 3; }, "chunk of 3 sectors"},
      {[](auto& r) { r.dev_number = 500; }, "device number 500"},
      {[](auto& r) { r.bitmap_offset = -9; }, "bitmap"},
      {[](auto& r) { r.bitmap_offset = 1 << 30; }, "bitmap"},
  };
  const md::Superblock good = sb(0);
  for (const Case& c : cases) {
    md::Superblock s = good;
    c.change(s.raw);
    s.raw.events += 1;  // so that this member is the one believed
    put(0, s);
    EXPECT_SAYS(refusal(rig, rig.spec()), c.says);
  }
  put(0, good);
  // Truncated: the member lost its end.
  LayerSpec s = rig.spec();
  s.members[0] = make_slice("short", rig.disks[0], 0, kMiB + 64 * kKiB).value();
  EXPECT_SAYS(refusal(rig, s), "member short: too small");
}

TEST_F(BadInput, bitmap_of_another_array_or_torn) {
  auto page = rig.sim.block_on(read_bytes(*rig.disks[0], 8192, 4096)).value();
  for (size_t byte : {0u, 4u, 8u, 40u, 52u}) {
    auto bad = page;
    bad[byte] ^= std::byte{0x55};
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*rig.disks[0], 8192, bad)));
    EXPECT_SAYS(refusal(rig, rig.spec()), "member d0");
  }
}

TEST(Create_over_data, needs_force_and_dry_run_writes_nothing) {
  Rig rig(kFour);
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*rig.disks[1], 0, random_bytes(1, 4096))));
  EXPECT_SAYS(refusal(rig, rig.spec()), "`spillway volume create vol`");
  const uint64_t before = written(rig.disks);
  CreateOptions o;
  o.dry_run = true;
  auto plan = rig.sim.block_on(create_array(rig.spec(), o));
  ASSERT_TRUE(plan) << plan.error().message();
  EXPECT_TRUE(plan->destroys);
  o.dry_run = false;
  EXPECT_FALSE(rig.sim.block_on(create_array(rig.spec(), o)));
  EXPECT_EQ(written(rig.disks), before);
  o.force = true;
  plan = rig.sim.block_on(create_array(rig.spec(), o));
  ASSERT_TRUE(plan) << plan.error().message();
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  rig.sim.block_on(array_control(*v)->wait_idle());  // the first resync
  EXPECT_EQ(array_status(*v).state, "clean");
  rig.close(v);
}

TEST(Create_stripe_and_linear, carry_superblocks_when_asked) {
  SimReactor sim;
  for (const char* layer : {"stripe", "linear"}) {
    LayerSpec s;
    s.name = "x";
    s.layer = layer;
    s.chunk = 64 * kKiB;
    s.members = {disk("a"), disk("b", 4 * kMiB), disk("c", 3 * kMiB)};
    ASSERT_TRUE(sim.block_on(create_array(s, {})));
    auto v = sim.block_on(assemble(s));
    ASSERT_TRUE(v) << v.error().message();
    EXPECT_EQ((*v)->size(), 6 * kMiB);
    Model model((*v)->size(), 512, 5);
    model.steps(sim, **v, 60);
    model.check(sim, **v);
    s.layer = "md";
    std::swap(s.members[0], s.members[2]);
    auto again = sim.block_on(assemble(s));
    ASSERT_TRUE(again) << again.error().message();
    model.check(sim, **again);
  }
}

// As Debian 12's kernel said of two members of 10240 sectors with chunks of 12 KiB.
TEST(Raid0_chunks_no_power_of_two, end_where_the_kernel_ends_the_array) {
  EXPECT_EQ(md::raid0_size({5 * kMiB, 5 * kMiB}, 12 * kKiB), 10452992u);
  EXPECT_EQ(md::raid0_size({5 * kMiB, 3 * kMiB + 512}, 64 * kKiB), 8 * kMiB);
  SimReactor sim;
  LayerSpec s;
  s.name = "x";
  s.layer = "stripe";
  s.chunk = 12 * kKiB;
  s.members = {disk("a", 6 * kMiB), disk("b", 6 * kMiB)};
  auto plan = sim.block_on(create_array(s, {}));
  ASSERT_TRUE(plan) << plan.error().message();
  EXPECT_EQ(plan->array_size, 10452992u);
  auto v = sim.block_on(assemble(s));
  ASSERT_TRUE(v) << v.error().message();
  EXPECT_EQ((*v)->size(), 10452992u);
  Model model((*v)->size(), 512, 5);
  model.steps(sim, **v, 40);
  model.check(sim, **v);
  ASSERT_TRUE(sim.block_on((*v)->close()));
}

TEST(Advice, names_chunk_width_and_region) {  // V3
  SimReactor sim;
  std::vector<VolumePtr> sets;
  for (int i = 0; i < 2; ++i) {
    LayerSpec s;
    s.name = fmt::format("r{}", i);
    s.layer = "raid5";
    s.chunk = 64 * kKiB;
    for (int d = 0; d < 5; ++d) s.members.push_back(disk(fmt::format("d{}{}", i, d), 65 * kMiB));
    sets.push_back(sim.block_on(assemble(s)).value());
  }
  VolumePtr top = make_linear("top", sets).value();
  const MkfsAdvice a = advise_mkfs(*top, "/dev/vda");
  EXPECT_EQ(a.command, "mkfs.xfs -d su=64k,sw=4,agsize=268435456 /dev/vda");
  EXPECT_EQ(a.agsize, sets[0]->size());
  const uint64_t size = top->size();
  EXPECT_TRUE(sim.block_on(top->close()));
  if (std::system("command -v mkfs.xfs >/dev/null 2>&1") != 0) GTEST_SKIP() << "mkfs.xfs is not installed";
  const std::string image = (std::filesystem::temp_directory_path() / fmt::format("spillway-mkfs-{}", ::getpid())).string();
  std::FILE* f = std::fopen(image.c_str(), "w");
  ASSERT_NE(f, nullptr);
  ASSERT_EQ(::ftruncate(::fileno(f), static_cast<off_t>(size)), 0);
  std::fclose(f);
  // -N: says what it would do, writes nothing.
  const std::string command = advise_mkfs(*top, image).command;
  FILE* p = ::popen((command + " -N 2>&1").c_str(), "r");
  std::string out;
  char line[256];
  while (std::fgets(line, sizeof line, p) != nullptr) out += line;
  EXPECT_EQ(::pclose(p), 0) << out;
  std::filesystem::remove(image);
  EXPECT_SAYS(out, "agcount=2, agsize=65536 blks");
  EXPECT_SAYS(out, "sunit=16     swidth=64 blks");
}

}  // namespace
}  // namespace spillway
