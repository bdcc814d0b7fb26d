// What goes wrong at awkward moments: errors the array cannot survive, marks of a clean array, replacement, growth,
// logs of arrays that are not in sync (V2, V5).
#include <gtest/gtest.h>

#include <map>

#include "src/volume/md/bitmap.h"
#include "src/volume/md/testing.h"

namespace spillway {
namespace {

using namespace md::testing_support;

const Shape kThree{"raid5", 3, "left-symmetric", "bitmap", 16 * kKiB};

// What is on the disks now, as after a kill -9.
void snapshot(Rig& from, std::vector<Disk>* to) {
  to->clear();
  for (auto& d : from.disks) {
    to->push_back(disk(d->name(), d->size(), d->geometry().block_size));
    auto all = from.sim.block_on(read_bytes(*d, 0, d->size()));
    ASSERT_TRUE(all);
    ASSERT_TRUE(from.sim.block_on(write_bytes(*to->back(), 0, *all)));
  }
}

void pass_time(Rig& rig, uint64_t ns) {
  auto wait = [](uint64_t n) -> Task<void> { co_await Reactor::current().sleep_for(n); };
  rig.sim.block_on(wait(ns));
}

md::Superblock superblock(Rig& rig, Volume& v) { return **rig.sim.block_on(md::read_superblock(v)); }

TEST(Raid5_degraded_write_error, leaves_no_wrong_data_of_the_missing_member) {
  Rig rig(kThree);
  VolumePtr v = rig.open();
  const auto data = random_bytes(1, v->size());
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, data)));
  rig.disks[2]->kill();
  // In every row the write goes to one of d0, d1 as data or as parity; the other half of it fails.
  SimFault once;
  once.ops = SimFault::kWrite;
  once.count = 1;
  once.offset = kMiB;
  rig.disks[0]->inject(once);
  const uint64_t row = 32 * kKiB;
  Status s{};
  uint64_t at = 0;
  for (; at < 6 * row && s; at += 16 * kKiB) s = rig.sim.block_on(write_bytes(*v, at, random_bytes(at + 2, 4096)));
  ASSERT_FALSE(s);
  const uint64_t failed_at = at - 16 * kKiB;
  // The rest of that row: right, or an error.
  for (uint64_t b = align_down(failed_at, row); b < align_down(failed_at, row) + row; b += 512) {
    if (b % (16 * kKiB) < 4096) continue;  // written (or meant to be) above
    auto got = rig.sim.block_on(read_bytes(*v, b, 512));
    if (got) EXPECT_TRUE(std::equal(got->begin(), got->end(), data.begin() + static_cast<ptrdiff_t>(b))) << b;
  }
  EXPECT_EQ(array_status(*v).state, "failed");
  EXPECT_FALSE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(3, 4096))));
  (void)rig.sim.block_on(v->close());
}

TEST(Clean_mark, does_not_cover_a_write_that_ended_during_its_flush) {
  Rig rig({"mirror", 2, "", "resync", 0});
  VolumePtr v = rig.open();
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(1, 4096))));
  SimFault slow;
  slow.kind = SimFault::Kind::kDelay;
  slow.ops = SimFault::kFlush;
  slow.delay_ns = 100'000'000;
  for (auto& d : rig.disks) d->inject(slow);
  pass_time(rig, 5'050'000'000);  // the daemon's flush is under way
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 8192, random_bytes(2, 4096))));
  pass_time(rig, 100'000'000);    // it has ended
  EXPECT_FALSE(superblock(rig, *rig.disks[0]).clean());
  pass_time(rig, 20'000'000'000);
  EXPECT_TRUE(superblock(rig, *rig.disks[0]).clean());
  rig.close(v);
}

// The second of two writes that find the array clean must not take the first one's intention for the deed.
TEST(Active_mark, is_stable_before_any_of_the_writes_that_wait_for_it) {
  for (const char* consistency : {"resync", "bitmap", "ppl"}) {
    Rig rig({"raid5", 3, "left-symmetric", consistency, 16 * kKiB});
    VolumePtr v = rig.open();
    ASSERT_TRUE(v);
    SimFault slow;
    slow.kind = SimFault::Kind::kDelay;
    slow.ops = SimFault::kWrite;
    slow.offset = 4096;  // the superblock
    slow.length = 4096;
    slow.delay_ns = 100'000'000;
    for (auto& d : rig.disks) d->inject(slow);
    const auto data = random_bytes(1, 4096);
    bool early = false;  // anything in the data areas before the superblocks are written
    auto probe = [](Rig* r, bool* out) -> Task<Status> {
      co_await Reactor::current().sleep_for(50'000'000);
      for (auto& d : r->disks) {
        auto all = co_await read_bytes(*d, kMiB, d->size() - kMiB);
        if (!all) co_return fail(std::move(all).error());
        for (std::byte b : *all) *out |= b != std::byte{0};
      }
      co_return Status{};
    };
    std::vector<Task<Status>> tasks;
    for (uint64_t i = 0; i < 4; ++i) tasks.push_back(write_bytes(*v, i * 64 * kKiB, data));
    tasks.push_back(probe(&rig, &early));
    ASSERT_TRUE(rig.sim.block_on(all_of(std::move(tasks))));
    EXPECT_FALSE(early) << consistency;
    rig.close(v);
  }
}

TEST(Spare_with_an_old_event_count, is_still_a_spare) {
  Rig rig(kThree);
  LayerSpec spec = rig.spec();
  Disk spare = disk("spare");
  spec.spares = {spare};
  VolumePtr v = rig.sim.block_on(assemble(spec)).value();
  rig.close(v);
  md::Superblock sb = superblock(rig, *spare);
  sb.raw.events = 0;
  ASSERT_TRUE(rig.sim.block_on(md::write_superblock(*spare, sb)));
  v = rig.sim.block_on(assemble(spec)).value();
  EXPECT_EQ(state_of(*v, "spare"), "spare");
  rig.close(v);
}

TEST(Member_that_cannot_be_read, counts_as_missing) {
  Rig rig(kThree);
  VolumePtr v = rig.open();
  Model model(v->size(), 512, 1);
  model.steps(rig.sim, *v, 10);
  rig.close(v);
  rig.disks[1]->kill();
  v = rig.open();
  ASSERT_TRUE(v);
  EXPECT_EQ(array_status(*v).state, "degraded");
  model.check(rig.sim, *v);
  rig.close(v);
}

TEST(Bitmap_needs_sync, looks_at_the_whole_range) {
  md::RawBitmapHeader h{};
  h.chunk_size = 4096;
  md::Bitmap b(h, kMiB, 64 * kKiB);
  const std::byte bits[] = {std::byte{0b10}};
  b.merge(bits, true);
  EXPECT_FALSE(b.needs_sync(0, 4096));
  EXPECT_TRUE(b.needs_sync(0, 3 * 4096));
  EXPECT_TRUE(b.needs_sync(4096 + 512, 4096 + 1024));
  EXPECT_FALSE(b.needs_sync(2 * 4096, kMiB));
}

// --- replacement ---

class Replacement : public ::testing::TestWithParam<Shape> {
 protected:
  // An array with contents, and a copy onto `fresh` under way.
  void begin(uint64_t delay_ns = 10'000'000) {
    v = rig.open();
    ASSERT_TRUE(v);
    model = std::make_unique<Model>(v->size(), v->geometry().block_size, 9);
    model->steps(rig.sim, *v, 30);
    SimFault slow;  // so that it does not finish at once
    slow.kind = SimFault::Kind::kDelay;
    slow.delay_ns = delay_ns;
    slow.offset = kMiB;
    fresh->inject(slow);
    Status s = rig.sim.block_on(array_control(*v)->replace_member("d1", fresh));
    ASSERT_TRUE(s) << s.error().message();
    EXPECT_EQ(state_of(*v, "fresh"), "replacing");
    EXPECT_EQ(state_of(*v, "d1"), "active");
    EXPECT_NE(array_status(*v).state, "degraded");
    model->steps(rig.sim, *v, 20);
    pass_time(rig, 20'000'000);
  }
  void finish() {
    fresh->clear_faults();
    rig.sim.block_on(array_control(*v)->wait_idle());
    EXPECT_EQ(state_of(*v, "fresh"), "active");
    EXPECT_EQ(array_status(*v).operation, "idle");
  }
  // Everything is there, agrees, and does not depend on the old member.
  void check(bool scrub = true) {
    model->check(rig.sim, *v);
    model->steps(rig.sim, *v, 20);
    if (scrub) {
      ASSERT_TRUE(rig.sim.block_on(array_control(*v)->start_scrub(ArrayControl::Scrub::kCheck)));
      rig.sim.block_on(array_control(*v)->wait_idle());
      EXPECT_EQ(array_status(*v).mismatch_blocks, 0u);
      rig.disks[0]->kill();
    }
    model->check(rig.sim, *v);
    rig.close(v);
  }
  std::vector<VolumePtr> all() {
    LayerSpec s = rig.spec();
    s.members.push_back(fresh);
    return s.members;
  }
  Rig rig{GetParam(), 6 * kMiB};
  Disk fresh = disk("fresh", 6 * kMiB);
  VolumePtr v;
  std::unique_ptr<Model> model;
};

TEST_P(Replacement, copies_under_load_while_the_old_member_stays_in_use) {
  ASSERT_NO_FATAL_FAILURE(begin());
  finish();
  EXPECT_EQ(state_of(*v, "d1"), "faulty");
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->remove_member("d1")));
  EXPECT_EQ(array_status(*v).advice, "nothing to do");
  check();
  // Assembled from everything that lies around: the old one is not believed.
  rig.disks[0]->revive();
  LayerSpec s = rig.spec();
  s.layer = "md";
  s.members = all();
  s.members.erase(s.members.begin());
  v = rig.sim.block_on(assemble(s)).value();
  EXPECT_EQ(state_of(*v, "d1"), "-");
  EXPECT_EQ(state_of(*v, "fresh"), "active");
  check(false);
}

TEST_P(Replacement, old_member_fails_meanwhile) {
  ASSERT_NO_FATAL_FAILURE(begin());
  rig.disks[1]->kill();
  model->steps(rig.sim, *v, 10);
  for (int i = 0; i < 50 && state_of(*v, "fresh") != "rebuilding"; ++i) pass_time(rig, 100'000'000);
  EXPECT_EQ(state_of(*v, "fresh"), "rebuilding");
  EXPECT_EQ(state_of(*v, "d1"), "faulty");
  model->steps(rig.sim, *v, 10);
  finish();
  check();
}

TEST_P(Replacement, new_member_fails_meanwhile) {
  ASSERT_NO_FATAL_FAILURE(begin());
  fresh->kill();
  model->steps(rig.sim, *v, 20);
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(state_of(*v, "fresh"), "faulty");
  EXPECT_EQ(state_of(*v, "d1"), "active");
  EXPECT_NE(array_status(*v).state, "degraded");
  check();
}

TEST_P(Replacement, another_member_fails_meanwhile) {
  ASSERT_NO_FATAL_FAILURE(begin());
  rig.disks[0]->kill();
  model->steps(rig.sim, *v, 20);
  finish();
  EXPECT_EQ(state_of(*v, "d0"), "faulty");
  check(false);
}

TEST_P(Replacement, goes_on_after_a_restart) {
  ASSERT_NO_FATAL_FAILURE(begin(30'000'000));
  pass_time(rig, 200'000'000);
  rig.close(v);
  md::Superblock sb = superblock(rig, *fresh);
  EXPECT_TRUE(sb.has(md::kFeatureReplacement));
  EXPECT_GT(sb.raw.recovery_offset, 0u);
  EXPECT_LT(sb.raw.recovery_offset, sb.raw.size);
  EXPECT_EQ(sb.own_role(), 1);
  LayerSpec s = rig.spec();
  s.layer = "md";
  s.members = all();
  s.read_only = true;
  v = rig.sim.block_on(assemble(s)).value();
  model->check(rig.sim, *v);
  rig.close(v);
  s.read_only = false;
  v = rig.sim.block_on(assemble(s)).value();
  EXPECT_EQ(state_of(*v, "fresh"), "replacing");
  finish();
  check();
}

TEST_P(Replacement, after_a_kill_starts_again) {
  ASSERT_NO_FATAL_FAILURE(begin(30'000'000));
  pass_time(rig, 300'000'000);
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, 0, random_bytes(77, 4096))));
  const auto now = random_bytes(77, 4096);
  std::copy(now.begin(), now.end(), model->bytes().begin());
  std::vector<Disk> copies;
  rig.disks.push_back(fresh);
  ASSERT_NO_FATAL_FAILURE(snapshot(rig, &copies));
  rig.disks.pop_back();
  rig.close(v);
  // What was in flight may have reached one of the two only.
  ASSERT_TRUE(rig.sim.block_on(write_bytes(*copies.back(), kMiB + 4096, random_bytes(5, 512))));
  fresh = copies.back();
  copies.pop_back();
  rig.disks = copies;
  LayerSpec s = rig.spec();
  s.layer = "md";
  s.members = all();
  v = rig.sim.block_on(assemble(s)).value();
  finish();
  check();
}

INSTANTIATE_TEST_SUITE_P(Shapes, Replacement,
                         ::testing::Values(Shape{"mirror", 2, "", "bitmap", 0}, kThree,
                                           Shape{"raid5", 4, "right-asymmetric", "ppl", 16 * kKiB},
                                           Shape{"raid5", 3, "left-asymmetric", "resync", 64 * kKiB}),
                         [](const auto& test) {
                           std::string n = fmt::format("{}_{}_{}", test.param.layer, test.param.disks, test.param.consistency);
                           return n;
                         });

// --- rebuild and kill -9 ---

TEST(Rebuild_under_load_killed, goes_on_from_its_last_checkpoint) {  // V2
  Rig rig({"raid5", 4, "left-symmetric", "ppl", 16 * kKiB}, 8 * kMiB);
  VolumePtr v = rig.open();
  ASSERT_TRUE(v);
  Model model(v->size(), 512, 11);
  model.steps(rig.sim, *v, 20);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->fail_member("d2")));
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->remove_member("d2")));
  Disk target = disk("new", 8 * kMiB);
  SimFault slow;  // 448 rows take nine seconds; a checkpoint follows the fifth
  slow.kind = SimFault::Kind::kDelay;
  slow.delay_ns = 20'000'000;
  slow.offset = kMiB;
  target->inject(slow);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->add_member(target)));
  pass_time(rig, 6'000'000'000);
  model.steps(rig.sim, *v, 5);
  ASSERT_EQ(array_status(*v).operation, "rebuild");
  rig.disks[2] = target;
  std::vector<Disk> copies;
  ASSERT_NO_FATAL_FAILURE(snapshot(rig, &copies));
  rig.close(v);
  const md::Superblock sb = superblock(rig, *copies[2]);
  EXPECT_FALSE(sb.clean());
  EXPECT_GT(sb.raw.recovery_offset, sb.raw.size / 3);
  EXPECT_LT(sb.raw.recovery_offset, sb.raw.size);
  rig.disks = copies;
  const uint64_t before = copies[2]->counters().written_bytes;
  v = rig.open();
  ASSERT_TRUE(v);
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(state_of(*v, "new"), "active");
  EXPECT_LT(copies[2]->counters().written_bytes - before, 5 * kMiB);
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->start_scrub(ArrayControl::Scrub::kCheck)));
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(array_status(*v).mismatch_blocks, 0u);
  rig.disks[0]->kill();
  model.check(rig.sim, *v);
  rig.close(v);
}

// --- the log of an array that is not in sync ---

TEST(Ppl_of_an_array_not_in_sync, does_not_make_it_clean) {
  Rig rig({"raid5", 3, "left-symmetric", "ppl", 16 * kKiB});
  for (auto& d : rig.disks)
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*d, kMiB, random_bytes(d->name()[1], kMiB))));
  LayerSpec s = rig.spec();
  s.background = false;  // the first resync gets nowhere
  CreateOptions force;
  force.force = true;
  ASSERT_TRUE(rig.sim.block_on(create_array(s, force)));
  VolumePtr v = rig.sim.block_on(assemble(s)).value();
  for (uint64_t at = 0; at < 8 * 32 * kKiB; at += 32 * kKiB)
    ASSERT_TRUE(rig.sim.block_on(write_bytes(*v, at, random_bytes(at, 4096))));
  std::vector<Disk> copies;
  ASSERT_NO_FATAL_FAILURE(snapshot(rig, &copies));
  rig.close(v);
  rig.disks = copies;
  v = rig.open();
  EXPECT_EQ(array_status(*v).advice, "wait for the resync");
  rig.sim.block_on(array_control(*v)->wait_idle());
  ASSERT_TRUE(rig.sim.block_on(array_control(*v)->start_scrub(ArrayControl::Scrub::kCheck)));
  rig.sim.block_on(array_control(*v)->wait_idle());
  EXPECT_EQ(array_status(*v).mismatch_blocks, 0u);
  rig.close(v);
}

// --- growth of an md linear array ---

struct LinearRig {
  LinearRig() {
    s.name = "lin";
    s.layer = "linear";
    s.chunk = 64 * kKiB;
    s.members = {a, b};
    EXPECT_TRUE(rig.sim.block_on(create_array(s, {})));
  }
  VolumePtr open() {
    auto v = rig.sim.block_on(assemble(s));
    if (!v) ADD_FAILURE() << v.error().message();
    return v ? *v : nullptr;
  }
  Rig rig{kThree};
  Disk a = disk("a"), b = disk("b", 3 * kMiB), c = disk("c", 5 * kMiB);
  LayerSpec s;
};

TEST(Md_linear_grows, and_its_superblocks_with_it) {  // V5
  LinearRig l;
  VolumePtr v = l.open();
  Model model(v->size(), 512, 3);
  model.steps(l.rig.sim, *v, 20);
  const uint64_t before = v->size();
  uint64_t heard = 0;
  v->add_resize_listener([&](uint64_t n) { heard = n; });
  Status s = l.rig.sim.block_on(grow(*v, l.c));
  ASSERT_TRUE(s) << s.error().message();
  EXPECT_EQ(v->size(), before + 4 * kMiB);
  EXPECT_EQ(heard, v->size());
  model.bytes().resize(v->size());
  model.steps(l.rig.sim, *v, 40);
  model.check(l.rig.sim, *v);
  s = l.rig.sim.block_on(grow(*v, l.c));
  ASSERT_FALSE(s);
  EXPECT_NE(s.error().message().find("is a member already"), std::string::npos) << s.error().message();
  ASSERT_TRUE(l.rig.sim.block_on(v->close()));
  for (auto& d : {l.a, l.b, l.c}) {
    const md::Superblock sb = superblock(l.rig, *d);
    EXPECT_EQ(sb.raw.raid_disks, 3u);
    EXPECT_EQ(sb.raw.events, superblock(l.rig, *l.c).raw.events);
  }
  // The config without the new member is refused, in one line; in any order with it.
  auto old = l.rig.sim.block_on(assemble(l.s));
  ASSERT_FALSE(old);
  EXPECT_EQ(old.error().message(), "volume lin: 2 members but the superblocks say 3");
  l.s.members = {l.c, l.a, l.b};
  v = l.open();
  ASSERT_TRUE(v);
  model.check(l.rig.sim, *v);
  ASSERT_TRUE(l.rig.sim.block_on(v->close()));
}

TEST(Md_linear_half_grown, opens_with_the_new_member_and_can_be_grown_again) {
  LinearRig l;
  VolumePtr v = l.open();
  Model model(v->size(), 512, 3);
  model.steps(l.rig.sim, *v, 20);
  SimFault broken;
  broken.ops = SimFault::kWrite;
  broken.count = 1;
  l.b->inject(broken);  // its superblock: the last to be written
  const uint64_t before = v->size();
  Status s = l.rig.sim.block_on(grow(*v, l.c));
  ASSERT_FALSE(s);
  EXPECT_NE(s.error().message().find("half grown"), std::string::npos) << s.error().message();
  EXPECT_EQ(v->size(), before);
  std::vector<Disk> copies;
  l.rig.disks = {l.a, l.b, l.c};
  ASSERT_NO_FATAL_FAILURE(snapshot(l.rig, &copies));
  s = l.rig.sim.block_on(grow(*v, l.c));
  ASSERT_TRUE(s) << s.error().message();
  model.bytes().resize(v->size());
  model.check(l.rig.sim, *v);
  ASSERT_TRUE(l.rig.sim.block_on(v->close()));
  for (auto& d : l.rig.disks) EXPECT_EQ(superblock(l.rig, *d).raw.raid_disks, 3u);

  l.s.members = {copies[0], copies[1], copies[2]};
  v = l.open();
  ASSERT_TRUE(v);
  EXPECT_EQ(v->size(), before + 4 * kMiB);
  model.check(l.rig.sim, *v);
  ASSERT_TRUE(l.rig.sim.block_on(v->close()));
}

}  // namespace
}  // namespace spillway
