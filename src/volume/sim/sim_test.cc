#include "src/volume/sim/sim.h"

#include <cstring>
#include <random>

#include <gtest/gtest.h>

#include "src/io/sim_reactor.h"
#include "src/io/sync.h"

namespace spillway {
namespace {

std::shared_ptr<SimVolume> sim(SimOptions o) { return make_sim_volume("s", std::move(o)).value(); }

Task<Status> put(Volume* v, uint64_t offset, char fill, size_t length, bool fua) {
  std::vector<char> data(length, fill);
  iovec iov{data.data(), data.size()};
  IoContext ctx;
  ctx.fua = fua;
  co_return co_await v->write(ctx, offset, Iov(&iov, 1));
}
Task<Result<std::vector<char>>> get(Volume* v, uint64_t offset, size_t length) {
  std::vector<char> data(length, 'x');
  iovec iov{data.data(), data.size()};
  Status s = co_await v->read(IoContext{}, offset, Iov(&iov, 1));
  if (!s) co_return fail(std::move(s).error());
  co_return data;
}
// Reads at each offset one after the other; the mean time in ms.
Task<double> mean_ms(Volume* v, std::vector<uint64_t> offsets, size_t length) {
  std::vector<char> data(length);
  iovec iov{data.data(), data.size()};
  const uint64_t begin = Reactor::current().now_ns();
  for (uint64_t o : offsets) {
    Status s = co_await v->read(IoContext{}, o, Iov(&iov, 1));
    SPILLWAY_ASSERT(s.has_value());
  }
  co_return static_cast<double>(Reactor::current().now_ns() - begin) / 1e6 / static_cast<double>(offsets.size());
}
Task<Status> ignore(Task<double> t) {
  co_await t;
  co_return Status{};
}

TEST(Sim, Contents_unwrittenReadsZero_writtenReadsBack) {
  SimReactor r;
  auto v = sim({.size = 4 * kMiB, .model = "null"});
  ASSERT_TRUE(r.block_on(put(v.get(), 65536 - 512, 'a', 1024, false)));
  auto back = r.block_on(get(v.get(), 65536 - 1024, 2048)).value();
  EXPECT_EQ(std::string(back.begin(), back.end()),
            std::string(512, '\0') + std::string(1024, 'a') + std::string(512, '\0'));
  EXPECT_EQ(v->allocated_bytes(), 2 * 64 * kKiB);
  ASSERT_TRUE(r.block_on(v->discard({}, 0, 128 * kKiB)));
  EXPECT_EQ(v->allocated_bytes(), 0u);
}

TEST(Sim, Hdd_randomReads_takeSeekAndHalfATurn) {
  SimReactor r;
  auto v = sim({.size = kTiB});
  std::mt19937_64 rnd(7);
  std::vector<uint64_t> at;
  for (int i = 0; i < 4000; ++i) at.push_back(rnd() % (kTiB / 4096) * 4096);
  // 8.5 seek + 4.17 half a turn + 0.05 command + transfer.
  EXPECT_NEAR(r.block_on(mean_ms(v.get(), at, 4096)), 12.8, 0.3);
}

TEST(Sim, Hdd_oneStream_readsAtMediaRate) {
  SimReactor r;
  auto v = sim({.size = kTiB});
  std::vector<uint64_t> at;
  for (uint64_t i = 0; i < 1000; ++i) at.push_back(i * kMiB);
  const double ms = r.block_on(mean_ms(v.get(), at, kMiB));
  EXPECT_NEAR(1.048576 / ms * 1000, 105, 2);
}

TEST(Sim, Hdd_manyOutstanding_areReorderedAndFaster) {
  SimReactor r;
  auto v = sim({.size = kTiB});
  std::mt19937_64 rnd(7);
  const uint64_t begin = r.now_ns();
  std::vector<Task<Status>> all;
  for (int s = 0; s < 32; ++s) {
    std::vector<uint64_t> at;
    for (int i = 0; i < 100; ++i) at.push_back(rnd() % (kTiB / 4096) * 4096);
    all.push_back(ignore(mean_ms(v.get(), at, 4096)));
  }
  ASSERT_TRUE(r.block_on(all_of(std::move(all))));
  const double iops = 3200 / (static_cast<double>(r.now_ns() - begin) / 1e9);
  EXPECT_GT(iops, 120);  // 78 one at a time
  EXPECT_LT(iops, 260);
}

TEST(Sim, Ssd_depth_reachesPublishedRates) {
  SimReactor r;
  auto v = sim({.size = kTiB, .model = "ssd"});
  std::vector<Task<Status>> all;
  for (uint64_t s = 0; s < 128; ++s)
    all.push_back(ignore(mean_ms(v.get(), std::vector<uint64_t>(100, s * kMiB), 4096)));
  ASSERT_TRUE(r.block_on(all_of(std::move(all))));
  EXPECT_NEAR(12800 / (static_cast<double>(r.now_ns()) / 1e9), 465e3, 20e3);
  const uint64_t begin = r.now_ns();
  EXPECT_NEAR(r.block_on(mean_ms(v.get(), {0}, 4096)), 0.077 + 4096 / 2850e3, 0.001);
  EXPECT_GT(r.now_ns(), begin);
}

TEST(Sim, SameSeed_sameTimes) {
  uint64_t ends[2];
  for (auto& end : ends) {
    SimReactor r(42);
    auto v = sim({.size = kGiB, .faults = {parse_sim_fault("read delay=3ms p=0.2").value()}});
    std::vector<Task<Status>> all;
    for (uint64_t s = 0; s < 8; ++s)
      all.push_back(ignore(mean_ms(v.get(), {s * 77 * kMiB, s * 3 * kMiB, s * kMiB}, 4096)));
    ASSERT_TRUE(r.block_on(all_of(std::move(all))));
    end = r.now_ns();
  }
  EXPECT_EQ(ends[0], ends[1]);
}

TEST(Sim, Faults_rangeNthKindAndDeath) {
  SimReactor r;
  auto v = sim({.size = kMiB, .model = "null"});
  uint64_t id = v->inject(parse_sim_fault("read error 64K+4K").value());
  EXPECT_TRUE(r.block_on(get(v.get(), 0, 4096)));
  EXPECT_EQ(r.block_on(get(v.get(), 65536 + 3584, 512)).error().to_errno(), EIO);
  v->clear(id);
  EXPECT_TRUE(r.block_on(get(v.get(), 65536, 512)));
  v->inject(parse_sim_fault("write enospc nth=2 count=1").value());
  EXPECT_TRUE(r.block_on(put(v.get(), 0, 'a', 512, false)));
  EXPECT_EQ(r.block_on(put(v.get(), 0, 'b', 512, false)).error().kind(), ErrorKind::kNoSpace);
  EXPECT_TRUE(r.block_on(put(v.get(), 0, 'c', 512, false)));
  v->inject(parse_sim_fault("flush error count=1").value());
  EXPECT_FALSE(r.block_on(v->flush({})));
  EXPECT_TRUE(r.block_on(v->flush({})));
  v->inject(parse_sim_fault("write short").value());
  EXPECT_FALSE(r.block_on(put(v.get(), 0, 'd', 1024, false)));
  auto half = r.block_on(get(v.get(), 0, 1024)).value();
  EXPECT_EQ(half[0], 'd');
  EXPECT_EQ(half[512], '\0');
  v->clear_faults();
  v->kill();
  EXPECT_FALSE(r.block_on(get(v.get(), 0, 512)));
  v->revive();
  EXPECT_TRUE(r.block_on(get(v.get(), 0, 512)));
}

Task<void> into(Volume* v, bool* done) {
  auto got = co_await get(v, 0, 512);
  *done = got.has_value();
}

TEST(Sim, Stuck_untilReleased) {
  SimReactor r;
  auto v = sim({.size = kMiB, .faults = {parse_sim_fault("read stuck count=1").value()}});
  bool done = false;
  r.spawn(into(v.get(), &done));
  r.run_until(60'000'000'000);
  EXPECT_FALSE(done);
  v->release_stuck();
  r.run_until_idle();
  EXPECT_TRUE(done);
}

TEST(Sim, Crash_keepsFlushedAndFua_tearsTheRestBySector) {
  SimReactor r;
  auto v = sim({.size = kMiB, .model = "null", .volatile_cache = true});
  ASSERT_TRUE(r.block_on(put(v.get(), 0, 'a', 64 * 512, false)));
  ASSERT_TRUE(r.block_on(v->flush({})));
  ASSERT_TRUE(r.block_on(put(v.get(), 0, 'b', 32 * 512, false)));
  ASSERT_TRUE(r.block_on(put(v.get(), 64 * 512, 'c', 512, true)));
  v->crash(3);
  auto back = r.block_on(get(v.get(), 0, 65 * 512)).value();
  int fresh = 0;
  for (int s = 0; s < 32; ++s) {
    EXPECT_TRUE(back[s * 512] == 'a' || back[s * 512] == 'b');
    fresh += back[s * 512] == 'b' ? 1 : 0;
  }
  EXPECT_GT(fresh, 0);
  EXPECT_LT(fresh, 32);
  for (int s = 32; s < 64; ++s) EXPECT_EQ(back[s * 512], 'a');
  EXPECT_EQ(back[64 * 512], 'c');
}

TEST(Sim, Options_nonsense_isRefusedByName) {
  EXPECT_FALSE(make_sim("s", {.size = 1000}));
  EXPECT_FALSE(make_sim("s", {.model = "tape"}));
  EXPECT_FALSE(parse_sim_fault("read explode"));
  EXPECT_FALSE(parse_sim_fault(""));
  EXPECT_FALSE(parse_sim_fault("write 1M+0"));
  EXPECT_EQ(parse_sim_fault("any delay=1.5ms 1M+64K nth=3 count=2 p=0.5")->delay_ns, 1'500'000u);
}

}  // namespace
}  // namespace spillway
