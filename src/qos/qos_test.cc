// The filter on modelled disks: Q1 (shares, work conservation, flush, caps, live changes) and Q2.
#include "src/qos/qos.h"

#include <atomic>
#include <thread>

#include <gtest/gtest.h>

#include "src/io/reactor_pool.h"
#include "src/qos/testing.h"
#include "src/volume/linear/linear.h"
#include "src/volume/sim/sim.h"
#include "src/volume/stripe/stripe.h"

namespace spillway {
namespace {

using testing::client;
using testing::Cluster;
using testing::Load;
using testing::Probe;
using testing::Tally;

constexpr uint64_t kMs = 1'000'000, kSecond = 1'000'000'000;

GroupId group(uint32_t n) { return GroupId{n}; }

// A disk under qos with a probe between.
struct Disk {
  std::shared_ptr<SimVolume> sim;
  std::shared_ptr<Probe> probe;
  std::shared_ptr<QosVolume> qos;
};
Disk disk(const std::string& model, std::shared_ptr<QosDomain> domain, QosOptions options) {
  Disk d;
  d.sim = make_sim_volume("d0", {.size = kTiB, .model = model}).value();
  d.probe = std::make_shared<Probe>(d.sim);
  d.qos = make_qos_volume(d.probe, options, std::move(domain)).value();
  return d;
}
QosOptions fixed(uint32_t depth) {
  return {.depth = depth, .adapt_depth = false, .adapt_cost = false};
}
void start(Cluster& c, size_t reactor, Volume* v, Load load, Tally* tally, int depth, uint64_t seed) {
  for (int i = 0; i < depth; ++i) c.at(reactor).spawn(client(v, load, tally, seed * 1000 + static_cast<uint64_t>(i)));
}
void stop(Cluster& c, std::initializer_list<Tally*> all) {
  for (Tally* t : all) t->stop = true;
  c.drain();
}
Load reads(uint32_t g, uint32_t bytes) {
  Load l;
  l.ctx.group = group(g);
  l.length = kTiB;
  l.bytes = bytes;
  return l;
}

TEST(Qos, TwoBackloggedGroups_shareByWeight_andTheDiskIsFull) {
  for (const char* model : {"ssd", "hdd"}) {
    for (size_t reactors : {1, 2, 3}) {
      auto domain = std::make_shared<QosDomain>();
      ASSERT_TRUE(domain->set(group(1), {.name = "a", .weight = 100}));
      ASSERT_TRUE(domain->set(group(2), {.name = "b", .weight = 300}));
      Disk d = disk(model, domain, fixed(24));
      Cluster c(reactors, 1);
      Tally a, b;
      start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 1);
      start(c, 1, d.qos.get(), reads(2, 4096), &b, 32, 2);
      c.run_until(std::string(model) == "ssd" ? kSecond / 4 : 60 * kSecond);
      EXPECT_NEAR(static_cast<double>(b.done) / static_cast<double>(a.done), 3.0, 0.05) << model << reactors;
      stop(c, {&a, &b});
    }
  }
}

TEST(Qos, UnknownReactorsGroupsWeights_neverIdleWhileWorkWaits_sharesWithinBound) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    std::mt19937_64 random(seed);
    auto domain = std::make_shared<QosDomain>();
    const uint32_t depth = 1 + static_cast<uint32_t>(random() % 24);
    QosOptions options = fixed(depth);
    // Costs that are the truth for this disk, so that shares can be judged in requests.
    for (auto& l : options.model.io) l = {20'000, 0};
    Disk d = disk("ssd", domain, options);
    Cluster c(1 + random() % 4, seed);
    const size_t n = 2 + random() % 6;
    std::vector<Tally> tallies(n);
    std::vector<uint32_t> weights(n), depths(n);
    for (size_t i = 0; i < n; ++i) {
      weights[i] = 10 + static_cast<uint32_t>(random() % 1000);
      ASSERT_TRUE(domain->set(group(static_cast<uint32_t>(i + 1)), {.name = "g", .weight = weights[i]}));
      Load load = reads(static_cast<uint32_t>(i + 1), 4096);
      load.sequential = random() % 2 == 0;
      load.think_ns = random() % 3 == 0 ? random() % 2'000'000 : 0;
      depths[i] = load.think_ns != 0 ? 1 + static_cast<uint32_t>(random() % 4) : 2 * depth + 2;
      for (uint32_t k = 0; k < depths[i]; ++k)
        c.at(random()).spawn(client(d.qos.get(), load, &tallies[i], seed * 100'000 + i * 1000 + k));
    }
    bool conserving = true;
    auto check = [&] {
      uint64_t outstanding = 0;
      for (auto& t : tallies) outstanding += t.outstanding;
      if (d.probe->in_flight != std::min<uint64_t>(outstanding, depth)) conserving = false;
    };
    c.run_until(20 * kMs, check);
    std::vector<uint64_t> before(n);
    for (size_t i = 0; i < n; ++i) before[i] = tallies[i].done;
    c.run_until(220 * kMs, check);
    EXPECT_TRUE(conserving) << "seed " << seed;
    // The bound of sfq.h in requests, with those in flight at both ends: credit is the depth. The groups that have
    // no think time are always backlogged.
    for (size_t f = 0; f < n; ++f)
      for (size_t g = 0; g < f; ++g) {
        if (depths[f] <= 2 * depth || depths[g] <= 2 * depth) continue;
        const double wf = weights[f], wg = weights[g];
        const double sf = static_cast<double>(tallies[f].done - before[f]) / wf;
        const double sg = static_cast<double>(tallies[g].done - before[g]) / wg;
        EXPECT_LE(std::abs(sf - sg), (1 + 2.0 * depth) * (1 / wf + 1 / wg)) << "seed " << seed;
      }
    for (auto& t : tallies) t.stop = true;
    c.drain();
    EXPECT_EQ(d.probe->in_flight, 0u);
    const QosSample s = d.qos->sample();
    EXPECT_EQ(s.in_flight, 0u);
    EXPECT_EQ(s.waiting, 0u);
  }
}

TEST(Qos, IdleGroupsShare_goesToTheOthersAtOnce_andItComesBackWithoutBurst) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b", .weight = 900}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(2, 3);
  Tally alone, a, b, back;
  start(c, 0, d.qos.get(), reads(1, 4096), &alone, 32, 1);
  c.run_until(50 * kMs);
  const uint64_t full = alone.done;
  stop(c, {&alone});
  uint64_t at = c.now_ns();
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &b, 32, 2);
  c.run_until(at += 50 * kMs);
  EXPECT_NEAR(static_cast<double>(a.done) / static_cast<double>(full), 0.1, 0.01);
  b.stop = true;
  c.run_until(at += 1 * kMs);
  const uint64_t had = a.done;
  c.run_until(at += 50 * kMs);
  EXPECT_NEAR(static_cast<double>(a.done - had) / static_cast<double>(full), 1.0, 0.01);
  const uint64_t before = a.done;
  start(c, 1, d.qos.get(), reads(2, 4096), &back, 32, 5);
  c.run_until(at += 20 * kMs);
  EXPECT_NEAR(static_cast<double>(back.done) / static_cast<double>(back.done + a.done - before), 0.9, 0.02);
  stop(c, {&a, &back});
}

TEST(Qos, Weight_changedLive_holdsAtOnce) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b"}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(2, 3);
  Tally a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &b, 32, 2);
  c.run_until(50 * kMs);
  EXPECT_NEAR(static_cast<double>(b.done) / static_cast<double>(a.done), 1.0, 0.02);
  ASSERT_TRUE(domain->set(group(2), {.name = "b", .weight = 300}));
  const uint64_t a0 = a.done, b0 = b.done;
  c.run_until(100 * kMs);
  EXPECT_NEAR(static_cast<double>(b.done - b0) / static_cast<double>(a.done - a0), 3.0, 0.06);
  // Removed: it counts for the root from now on, and nothing is lost or stuck.
  ASSERT_TRUE(domain->remove(group(2)));
  c.run_until(120 * kMs);
  stop(c, {&a, &b});
  EXPECT_EQ(a.failed + b.failed, 0u);
}

TEST(Qos, Caps_holdInAnUncontendedDisk) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "t", .caps = {.riops = 1000}}));
  ASSERT_TRUE(domain->set(group(2), {.name = "t/vm", .parent = group(1)}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(1, 3);
  Tally a;
  start(c, 0, d.qos.get(), reads(2, 4096), &a, 4, 1);
  c.run_until(2 * kSecond);
  EXPECT_NEAR(static_cast<double>(a.done), 2010, 6);
  ASSERT_TRUE(domain->set(group(1), {.name = "t"}));
  const uint64_t had = a.done;
  c.run_until(2 * kSecond + 100 * kMs);
  EXPECT_GT(a.done - had, 4000u);
  stop(c, {&a});
}

TEST(Qos, Caps_ofTheWholeDisk_stillShareByWeight) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(GroupId::kRoot, {.name = "/", .caps = {.riops = 2000}}));
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b"}));
  Disk d = disk("ssd", domain, {});
  Cluster c(2, 3);
  Tally a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 4, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &b, 16, 2);
  c.run_until(2 * kSecond);
  EXPECT_NEAR(static_cast<double>(a.done + b.done), 4020, 10);
  EXPECT_NEAR(static_cast<double>(a.done), static_cast<double>(b.done), 60);
  stop(c, {&a, &b});
}

TEST(Qos, Flushes_areChargedToWhoAsks_andDoNotStarveOthers) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "flusher"}));
  ASSERT_TRUE(domain->set(group(2), {.name = "reader"}));
  QosOptions options = fixed(16);
  options.model.io[0] = {2'150, 0};  // 465k IOPS
  options.model.flush_ns = 30'000;
  options.adapt_cost = true;
  Disk d = disk("ssd", domain, options);
  Cluster c(2, 3);
  Tally alone, f, r;
  start(c, 1, d.qos.get(), reads(2, 4096), &alone, 32, 2);
  c.run_until(50 * kMs);
  stop(c, {&alone});
  const uint64_t at = c.now_ns();
  Load flushes = reads(1, 4096);
  flushes.flush = true;
  start(c, 0, d.qos.get(), flushes, &f, 64, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &r, 32, 2);
  c.run_until(at + 50 * kMs);
  EXPECT_GT(static_cast<double>(r.done), 0.35 * static_cast<double>(alone.done));
  EXPECT_GT(f.done, 100u);
  stop(c, {&f, &r});
}

TEST(Qos, BackgroundClasses_haveGroupsOfTheirOwn) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "tenant", .weight = 100}));
  ASSERT_TRUE(domain->set_background(Background::kRebuild, {.weight = 50}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(2, 3);
  Tally fore, rebuild, ahead, back;
  Load l = reads(1, 4096);
  start(c, 0, d.qos.get(), l, &fore, 32, 1);
  l.ctx.io_class = IoClass::kReadAhead;  // shares the tenant's part 50:100 with its foreground
  start(c, 0, d.qos.get(), l, &ahead, 32, 2);
  l.ctx.io_class = IoClass::kRebuild;    // 50:100 beside the tenant, whoever's group it names
  start(c, 1, d.qos.get(), l, &rebuild, 32, 3);
  c.run_until(100 * kMs);
  const double all = static_cast<double>(fore.done + ahead.done + rebuild.done);
  EXPECT_NEAR(static_cast<double>(fore.done) / all, 4.0 / 9, 0.01);
  EXPECT_NEAR(static_cast<double>(ahead.done) / all, 2.0 / 9, 0.01);
  EXPECT_NEAR(static_cast<double>(rebuild.done) / all, 3.0 / 9, 0.01);
  stop(c, {&fore, &ahead, &rebuild});
  // A write-back with a tenant is the tenant's, one without is the background's.
  l.ctx.io_class = IoClass::kWriteback;
  start(c, 0, d.qos.get(), l, &back, 1, 4);
  c.run_until(c.now_ns() + 1 * kMs);
  stop(c, {&back});
  for (auto& g : d.qos->sample().groups) {
    if (g.owner.part == QosOwner::Part::kBackground) {
      EXPECT_EQ(g.owner.background, Background::kRebuild);
    } else if (g.owner.part == QosOwner::Part::kOwn) {
      EXPECT_EQ(g.reads, fore.done + back.done);
    }
  }
}

TEST(Qos, Error_givesTheSlotBack) {
  auto domain = std::make_shared<QosDomain>();
  Disk d = disk("ssd", domain, fixed(2));
  d.sim->inject(parse_sim_fault("read error p=0.5").value());
  Cluster c(1, 3);
  Tally t;
  start(c, 0, d.qos.get(), reads(0, 4096), &t, 16, 1);
  c.run_until(50 * kMs);
  stop(c, {&t});
  EXPECT_GT(t.failed, 100u);
  EXPECT_EQ(d.qos->sample().in_flight, 0u);
}

// Q1: costs, not requests, are shared, and costs that were guessed wrong are corrected from what each kind reaches
// alone: afterwards each group gets its part of what it had alone.
TEST(Qos, MixedSizes_afterLearning_shareOfWhatEachHadAlone) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "small", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "large", .weight = 300}));
  QosOptions options;
  options.depth = 16;
  options.adapt_depth = false;
  Disk d = disk("ssd", domain, options);
  Cluster c(2, 3);
  Tally a1, b1, a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &a1, 32, 1);
  c.run_until(2 * kSecond);
  const uint64_t a_before = a1.done;
  c.run_until(2 * kSecond + 200 * kMs);
  const double a_alone = static_cast<double>(a1.done - a_before) * 5;
  stop(c, {&a1});
  uint64_t at = c.now_ns();
  start(c, 1, d.qos.get(), reads(2, 131072), &b1, 32, 2);
  c.run_until(at += 2 * kSecond);
  const uint64_t b_before = b1.done;
  c.run_until(at += 200 * kMs);
  const double b_alone = static_cast<double>(b1.done - b_before) * 5;
  stop(c, {&b1});
  at = c.now_ns();
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 3);
  start(c, 1, d.qos.get(), reads(2, 131072), &b, 32, 4);
  c.run_until(at + kSecond);
  const double ratio = static_cast<double>(b.done) / b_alone / (static_cast<double>(a.done) / a_alone);
  EXPECT_NEAR(ratio, 3.0, 0.09);
  stop(c, {&a, &b});
}

// The disk of the depth tests: eight dies of 200 us, so the knee is 8 and a window sees some 800 requests.
Disk small_disk(std::shared_ptr<QosDomain> domain, QosOptions options) {
  Disk d;
  SimOptions o{.size = kTiB, .model = "ssd"};
  o.ssd.dies = 8;
  o.ssd.read_us = 200;
  d.sim = make_sim_volume("d0", o).value();
  d.probe = std::make_shared<Probe>(d.sim);
  d.qos = make_qos_volume(d.probe, options, std::move(domain)).value();
  return d;
}

TEST(Qos, Depth_goesToTheKneeAndStays) {
  for (uint32_t from : {2u, 40u}) {
    QosOptions options;
    options.depth = from;
    Disk d = small_disk(std::make_shared<QosDomain>(), options);
    Cluster c(1, 3);
    Tally t;
    start(c, 0, d.qos.get(), reads(0, 4096), &t, 64, 1);
    c.run_until(15 * kSecond);
    EXPECT_GE(d.qos->sample().knee, 8u) << "from " << from;
    EXPECT_LE(d.qos->sample().knee, 11u) << "from " << from;
    stop(c, {&t});
  }
}

// All that both tenants have fits into the device at the depth we began with, so nothing would ever wait and weights
// would mean nothing: depth comes down to where they work (Little's law), and no further.
TEST(Qos, Depth_whereAllOutstandingFits_comesDownForTheSakeOfShares) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b", .weight = 900}));
  QosOptions options;
  options.depth = 64;
  Disk d = small_disk(domain, options);
  Cluster c(2, 3);
  Tally a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &b, 32, 2);
  c.run_until(500 * kMs);
  const uint64_t a0 = a.done, b0 = b.done;
  c.run_until(1500 * kMs);
  EXPECT_NEAR(static_cast<double>(b.done - b0) / static_cast<double>(a.done - a0), 9.0, 0.25);
  EXPECT_NEAR(static_cast<double>(a.done - a0 + b.done - b0), 40'000, 800);  // 8 dies / 200 us: all the disk has
  stop(c, {&a, &b});
}

TEST(Qos, SharesWanted_followTheTreeOfThoseActive) {
  QosDomain domain;
  ASSERT_TRUE(domain.set(group(1), {.name = "a", .weight = 100}));
  ASSERT_TRUE(domain.set(group(2), {.name = "a/x", .parent = group(1), .weight = 300}));
  ASSERT_TRUE(domain.set(group(3), {.name = "b", .weight = 50}));
  const auto share = shares_wanted({{group(1)}, {group(2)}, {group(3)},
                                    {GroupId::kRoot, QosOwner::Part::kBackground, Background::kRebuild}},
                                   *domain.snapshot());
  ASSERT_EQ(share.size(), 4u);
  EXPECT_DOUBLE_EQ(share[0], 0.5 * 0.25);
  EXPECT_DOUBLE_EQ(share[1], 0.5 * 0.75);
  EXPECT_DOUBLE_EQ(share[2], 0.25);
  EXPECT_DOUBLE_EQ(share[3], 0.25);
}

// A leaf that suspends once: everything happens as fast as threads can race.
class Yield final : public Volume {
 public:
  Yield() : Volume("yield", kGiB, Geometry{}) {}
  std::string_view layer() const override { return "yield"; }

 protected:
  struct Suspend {
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const { Reactor::current().schedule(h); }
    void await_resume() const noexcept {}
  };
  static Task<Status> once() {
    co_await Suspend{};
    co_return Status{};
  }
  Task<Status> do_read(IoContext, uint64_t, Iov) override { return once(); }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return once(); }
  Task<Status> do_flush(IoContext) override { return once(); }
};

Task<void> count_down(Volume* v, uint32_t g, int n, std::atomic<int>* left) {
  char data[4096] = {};
  iovec iov{data, sizeof data};
  IoContext ctx;
  ctx.group = group(g);
  for (int i = 0; i < n; ++i) {
    Status s = i % 100 == 99 ? co_await v->flush(ctx) : co_await v->read(ctx, 0, Iov(&iov, 1));
    SPILLWAY_ASSERT(s.has_value());
  }
  left->fetch_sub(1);
}

// Threads for real, under the thread sanitizer too: nothing is lost, stuck or counted twice while weights, caps and
// groups change and reports are read.
TEST(Qos, RealReactors_racingWithChangesAndReports_loseNothing) {
  auto domain = std::make_shared<QosDomain>();
  auto qos = make_qos_volume(std::make_shared<Yield>(), {.depth = 4}, domain).value();
  auto pool = ReactorPool::start({-1, -1, -1}).value();
  constexpr int kClients = 12, kEach = 3000;
  std::atomic<int> left{kClients * 3};
  for (size_t r = 0; r < 3; ++r)
    pool->at(r).post([&, r] {
      for (uint32_t i = 0; i < kClients; ++i)
        pool->at(r).spawn(count_down(qos.get(), i % 4, kEach, &left));
    });
  uint32_t turn = 0;
  while (left.load() > 0) {
    ++turn;
    ASSERT_TRUE(domain->set(group(1), {.name = "a", .weight = 1 + turn % 1000}));
    ASSERT_TRUE(domain->set(group(2), {.name = "b", .parent = turn % 2 == 0 ? group(1) : GroupId::kRoot}));
    ASSERT_TRUE(domain->set(group(3), {.name = "c", .caps = {.riops = turn % 3 == 0 ? 1'000'000u : 0u}}));
    if (turn % 5 == 0) ASSERT_TRUE(domain->remove(group(3)));
    EXPECT_LE(qos->sample().in_flight, 256u);
    (void)qos->model();
    std::this_thread::yield();
  }
  // The last client's frame may still be on its way out: everything is counted before a request's caller goes on.
  const QosSample s = qos->sample();
  uint64_t reads = 0, flushes = 0;
  for (auto& g : s.groups) reads += g.reads, flushes += g.flushes;
  EXPECT_EQ(reads, 3u * kClients * (kEach - kEach / 100));
  EXPECT_EQ(flushes, 3u * kClients * (kEach / 100));
  EXPECT_EQ(s.in_flight, 0u);
  EXPECT_EQ(s.waiting, 0u);
  pool.reset();
}

// ---- Q2: two seeking disks, a tenant in each half of a volume above them ---------------------------------------------

struct Q2 {
  uint64_t alone = 0, together = 0;
};
Q2 neighbour(bool striped) {
  auto domain = std::make_shared<QosDomain>();
  SPILLWAY_ASSERT(domain->set(group(1), {.name = "a"}).has_value());
  SPILLWAY_ASSERT(domain->set(group(2), {.name = "b"}).has_value());
  std::vector<VolumePtr> disks;
  for (const char* name : {"d0", "d1"}) {
    auto leaf = make_sim(name, {.size = kTiB, .model = "hdd"}).value();
    disks.push_back(make_qos(leaf, {.depth = 16, .adapt_depth = false}, domain).value());
  }
  auto volume = striped ? make_stripe("v", disks, 64 * kKiB).value() : make_linear("v", disks).value();
  Cluster c(2, 7);
  Load la = reads(1, 4096), lb = reads(2, 4096);
  la.length = lb.length = volume->size() / 2;
  lb.offset = volume->size() / 2;
  Tally alone, a, b;
  Q2 q;
  start(c, 0, volume.get(), la, &alone, 8, 1);
  c.run_until(20 * kSecond);
  q.alone = alone.done;
  stop(c, {&alone});
  const uint64_t at = c.now_ns();
  start(c, 0, volume.get(), la, &a, 8, 1);
  start(c, 1, volume.get(), lb, &b, 64, 2);
  c.run_until(at + 20 * kSecond);
  q.together = a.done;
  stop(c, {&a, &b});
  return q;
}

TEST(Qos, Q2_linear_tenantsOnTheirOwnRegionsDoNotSlowOneAnother) {
  const Q2 q = neighbour(false);
  EXPECT_NEAR(static_cast<double>(q.together), static_cast<double>(q.alone), 0.02 * static_cast<double>(q.alone));
}

TEST(Qos, Q2_stripe_couplesThem) {
  const Q2 q = neighbour(true);
  EXPECT_LT(static_cast<double>(q.together), 0.75 * static_cast<double>(q.alone));
}

}  // namespace
}  // namespace spillway
