// The filter on modelled disks: Q1 (shares, work conservation, flush, caps, live changes) and Q2.
#include "src/qos/qos.h"

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <thread>

#include <gtest/gtest.h>

#include "src/io/reactor_pool.h"
#include "src/io/sync.h"
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
// A small disk, so that a second of it is cheap: eight dies of 500 us, the knee is 8, and a window sees 320 requests.
Disk small_disk(std::shared_ptr<QosDomain> domain, QosOptions options) {
  Disk d;
  SimOptions o{.size = kTiB, .model = "ssd"};
  o.ssd.dies = 8;
  o.ssd.read_us = 500;
  d.sim = make_sim_volume("d0", o).value();
  d.probe = std::make_shared<Probe>(d.sim);
  d.qos = make_qos_volume(d.probe, options, std::move(domain)).value();
  return d;
}
constexpr double kSmallDiskIops = 16'000;

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
      c.run_until(std::string(model) == "ssd" ? 60 * kMs : 60 * kSecond);
      EXPECT_NEAR(static_cast<double>(b.done) / static_cast<double>(a.done), 3.0, 0.05) << model << reactors;
      stop(c, {&a, &b});
    }
  }
}

TEST(Qos, UnknownReactorsGroupsWeights_neverIdleWhileWorkWaits_sharesWithinBound) {
  for (uint64_t seed = 1; seed <= 16; ++seed) {
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
    c.run_until(10 * kMs, check);
    std::vector<uint64_t> before(n);
    for (size_t i = 0; i < n; ++i) before[i] = tallies[i].done;
    c.run_until(55 * kMs, check);
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

// All that a tenant has waits for a cap that would let it go in hours. Lifted, it is seen soon, though no request comes.
TEST(Qos, Caps_liftedWhileAllIsHeldBack_letGo) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "t", .caps = {.rbps = 1}}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(2, 3);
  Tally a;
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 4, 1);
  c.run_until(kSecond);
  EXPECT_EQ(a.done, 1u);  // what the bucket holds
  ASSERT_TRUE(domain->set(group(1), {.name = "t"}));
  c.run_until(kSecond + 110 * kMs);
  EXPECT_GT(a.done, 200u);
  stop(c, {&a});
}

// Two groups change places while both have work: neither may be below itself on the way.
TEST(Qos, Groups_thatChangePlaces_keepTheirWork) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b", .parent = group(1)}));
  Disk d = disk("ssd", domain, fixed(4));
  Cluster c(2, 3);
  Tally a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &a, 16, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &b, 16, 2);
  c.run_until(5 * kMs);
  for (int i = 0; i < 2; ++i) {
    const uint32_t above = i == 0 ? 2 : 1;
    ASSERT_TRUE(domain->set(group(3 - above), {.name = "x", .parent = GroupId::kRoot}));
    ASSERT_TRUE(domain->set(group(above), {.name = "y", .parent = GroupId::kRoot}));
    ASSERT_TRUE(domain->set(group(3 - above), {.name = "x", .parent = group(above)}));
    const uint64_t a0 = a.done, b0 = b.done;
    c.run_until(c.now_ns() + 20 * kMs);
    EXPECT_NEAR(static_cast<double>(a.done - a0), static_cast<double>(b.done - b0), 16);
  }
  stop(c, {&a, &b});
  EXPECT_EQ(a.failed + b.failed, 0u);
}

// A slow disk nobody calibrated, of which writes were learned first: a weak tenant's writes are then not a hundred times too
// dear beside reads (it went without one for ten seconds and more).
TEST(Qos, UncalibratedSlowDisk_weakTenantOfAnotherKind_getsItsShare) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "weak", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "strong", .weight = 900}));
  Disk d = disk("hdd", domain, {});
  Cluster c(2, 3);
  Tally learn, weak, strong;
  Load writes = reads(1, 4096);
  writes.write = true;
  start(c, 0, d.qos.get(), writes, &learn, 32, 1);
  c.run_until(60 * kSecond);
  stop(c, {&learn});
  EXPECT_GT(d.qos->sample().model_updates, 5u);
  const uint64_t at = c.now_ns();
  start(c, 0, d.qos.get(), writes, &weak, 2, 2);
  start(c, 1, d.qos.get(), reads(2, 4096), &strong, 64, 3);
  c.run_until(at + 20 * kSecond);
  EXPECT_GT(weak.done, 20u);
  EXPECT_GT(strong.done, 1000u);
  stop(c, {&weak, &strong});
  const uint64_t longest = *std::max_element(weak.latency_ns.begin(), weak.latency_ns.end());
  EXPECT_LT(longest, 4 * kSecond);
}

// All four of io.max, each against its own kind of request; the other kind passes untouched.
TEST(Qos, Caps_eachHoldsItsKindAndNoOther) {
  struct Case {
    QosCaps caps;
    bool write;
    double per_second;  // of 16 KiB requests
  };
  for (const Case& k : {Case{{.rbps = 8'192'000}, false, 500}, Case{{.riops = 700}, false, 700},
                        Case{{.wbps = 4'096'000}, true, 250}, Case{{.wiops = 300}, true, 300}}) {
    auto domain = std::make_shared<QosDomain>();
    ASSERT_TRUE(domain->set(group(1), {.name = "t", .caps = k.caps}));
    Disk d = disk("ssd", domain, fixed(16));
    Cluster c(2, 3);
    Tally capped, other;
    Load l = reads(1, 16384);
    l.write = k.write;
    start(c, 0, d.qos.get(), l, &capped, 4, 1);
    l.write = !k.write;
    l.length = kMiB;
    l.think_ns = kMs;
    start(c, 1, d.qos.get(), l, &other, 1, 2);
    c.run_until(2 * kSecond);
    // The rate and the burst of 10 ms.
    EXPECT_NEAR(static_cast<double>(capped.done), 2.01 * k.per_second, 6) << k.per_second;
    EXPECT_GT(other.done, 1500u) << k.per_second;
    stop(c, {&capped, &other});
  }
}

TEST(Qos, Hierarchy_sharesDownTheTree_andWhatIsUnusedGoesToSiblingsFirst) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "t", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "t/a", .parent = group(1), .weight = 100}));
  ASSERT_TRUE(domain->set(group(3), {.name = "t/b", .parent = group(1), .weight = 200}));
  ASSERT_TRUE(domain->set(group(4), {.name = "u", .weight = 300}));
  Disk d = disk("ssd", domain, fixed(16));
  Cluster c(3, 3);
  Tally t[5];  // the tenant's own requests are one more child of it, of weight 100
  for (uint32_t g = 1; g <= 4; ++g) start(c, g, d.qos.get(), reads(g, 4096), &t[g], 48, g);
  auto shares = [&](uint64_t until) {
    std::array<double, 5> had{}, got{};
    for (int g = 1; g <= 4; ++g) had[g] = static_cast<double>(t[g].done);
    c.run_until(until);
    double all = 0;
    for (int g = 1; g <= 4; ++g) all += got[g] = static_cast<double>(t[g].done) - had[g];
    for (int g = 1; g <= 4; ++g) got[g] /= all;
    return got;
  };
  c.run_until(5 * kMs);
  auto s = shares(45 * kMs);
  EXPECT_NEAR(s[1], 0.25 * 0.25, 0.005);
  EXPECT_NEAR(s[2], 0.25 * 0.25, 0.005);
  EXPECT_NEAR(s[3], 0.25 * 0.50, 0.005);
  EXPECT_NEAR(s[4], 0.75, 0.01);
  t[3].stop = true;
  c.run_until(50 * kMs);
  s = shares(90 * kMs);
  EXPECT_NEAR(s[1], 0.125, 0.005);
  EXPECT_NEAR(s[2], 0.125, 0.005);
  EXPECT_NEAR(s[4], 0.75, 0.01);
  t[1].stop = t[2].stop = true;
  c.run_until(95 * kMs);
  s = shares(115 * kMs);
  EXPECT_NEAR(s[4], 1, 0.001);
  stop(c, {&t[4]});
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

// A leaf that notes in which order it is given what.
class Order final : public Volume {
 public:
  Order(VolumePtr leaf, std::string* log) : Volume(leaf->name(), leaf->size(), leaf->geometry()), leaf_(leaf), log_(log) {}
  std::string_view layer() const override { return "order"; }

 protected:
  Task<Status> do_read(IoContext c, uint64_t o, Iov iov) override { return noted('r', leaf_->read(c, o, iov)); }
  Task<Status> do_write(IoContext c, uint64_t o, Iov iov) override { return noted('w', leaf_->write(c, o, iov)); }
  Task<Status> do_flush(IoContext c) override { return noted('F', leaf_->flush(c)); }

 private:
  Task<Status> noted(char what, Task<Status> t) {
    log_->push_back(what);  // runs when the task is resumed: when the filter lets it through
    co_return co_await t;
  }
  VolumePtr leaf_;
  std::string* log_;
};

// One request of group 1: a flush, or a write of 4 KiB at 0.
Task<void> flush_or_write(Volume* v, bool flush) {
  char data[4096] = {};
  iovec iov{data, sizeof data};
  IoContext ctx;
  ctx.group = group(1);
  Status s;
  if (flush) s = co_await v->flush(ctx);
  else s = co_await v->write(ctx, 0, Iov(&iov, 1));
  SPILLWAY_ASSERT(s.has_value());
}

TEST(Qos, Flush_waitsForItsTurn_behindWhatItsGroupQueuedBefore) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  std::string log;
  auto sim = make_sim("d0", {.size = kGiB, .model = "ssd"}).value();
  auto qos = make_qos(std::make_shared<Order>(sim, &log), fixed(1), domain).value();
  Cluster c(1, 0);
  for (int i = 0; i < 5; ++i) c.at(0).spawn(flush_or_write(qos.get(), false));
  c.at(0).spawn(flush_or_write(qos.get(), true));
  for (int i = 0; i < 3; ++i) c.at(0).spawn(flush_or_write(qos.get(), false));
  c.drain();
  EXPECT_EQ(log, "wwwwwFwww");
}

// Of a weak group, beside a strong one that keeps the disk busy: a flush gets its share of the disk and no more, so it
// neither passes the strong group's requests nor waits for ever.
TEST(Qos, Flushes_ofAWeakGroup_getItsShare) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "weak", .weight = 10}));
  ASSERT_TRUE(domain->set(group(2), {.name = "strong", .weight = 990}));
  QosOptions options = fixed(16);
  options.model.io[0] = {2'150, 0};
  options.model.flush_ns = 30'000;
  Disk d = disk("ssd", domain, options);
  Cluster c(2, 3);
  Tally f, r;
  Load flushes = reads(1, 4096);
  flushes.flush = true;
  start(c, 0, d.qos.get(), flushes, &f, 16, 1);
  start(c, 1, d.qos.get(), reads(2, 4096), &r, 48, 2);
  c.run_until(20 * kMs);
  const uint64_t f0 = f.done, r0 = r.done;
  c.run_until(220 * kMs);
  const double flushed = static_cast<double>(f.done - f0) * 30'000, read = static_cast<double>(r.done - r0) * 2'150;
  const double part = flushed / (flushed + read);
  EXPECT_NEAR(part, 0.01, 0.003);
  stop(c, {&f, &r});
}

// Guessed far too dear, then what it takes of the disk: alone in the device that is its time, beside others its part.
TEST(Qos, FlushCost_isLearnedFromWhatFlushesTake) {
  auto domain = std::make_shared<QosDomain>();
  QosOptions options = fixed(16);
  options.model.flush_ns = 2'000'000;
  options.adapt_cost = true;
  Disk d = disk("ssd", domain, options);  // 30 us, one after the other
  Cluster c(1, 3);
  Tally t;
  Load flushes = reads(0, 4096);
  flushes.flush = true;
  start(c, 0, d.qos.get(), flushes, &t, 32, 1);
  c.run_until(2 * kSecond);
  EXPECT_NEAR(d.qos->model().flush_ns, 30'000, 6'000);
  stop(c, {&t});
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
  // A write-back with a tenant is the tenant's, whoever carries it out; one without is the background's, as is a scrub.
  Tally orphan, scrub;
  l.ctx.io_class = IoClass::kWriteback;
  start(c, 0, d.qos.get(), l, &back, 1, 4);
  l.ctx.group = GroupId::kRoot;
  start(c, 0, d.qos.get(), l, &orphan, 1, 5);
  l.ctx.io_class = IoClass::kScrub;
  start(c, 1, d.qos.get(), l, &scrub, 1, 6);
  c.run_until(c.now_ns() + 1 * kMs);
  stop(c, {&back, &orphan, &scrub});
  std::map<std::pair<QosOwner::Part, Background>, uint64_t> had;
  for (auto& g : d.qos->sample().groups) {
    EXPECT_EQ(g.owner.group, g.owner.part == QosOwner::Part::kBackground ? GroupId::kRoot : group(1));
    had[{g.owner.part, g.owner.background}] = g.reads;
  }
  const std::map<std::pair<QosOwner::Part, Background>, uint64_t> wanted = {
      {{QosOwner::Part::kOwn, Background::kRebuild}, fore.done + back.done},
      {{QosOwner::Part::kReadAhead, Background::kRebuild}, ahead.done},
      {{QosOwner::Part::kBackground, Background::kRebuild}, rebuild.done},
      {{QosOwner::Part::kBackground, Background::kScrub}, scrub.done},
      {{QosOwner::Part::kBackground, Background::kWriteback}, orphan.done}};
  EXPECT_EQ(had, wanted);
}

// A weak tenant's large requests, as many as it likes: they may not fill the device, or whoever has few requests waits for
// all of them each time.
TEST(Qos, LargeRequestsOfAWeakGroup_doNotFillTheDevice) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "large", .weight = 100}));
  ASSERT_TRUE(domain->set(group(2), {.name = "small", .weight = 300}));
  QosOptions options = fixed(32);
  options.model.io[0] = {700, 0.35};  // what this disk takes
  Disk d = disk("ssd", domain, options);
  Cluster c(2, 3);
  Tally large, small;
  start(c, 0, d.qos.get(), reads(1, 131072), &large, 64, 1);
  c.run_until(10 * kMs);
  EXPECT_EQ(d.probe->in_flight, 32u);  // alone, it has the whole depth
  start(c, 1, d.qos.get(), reads(2, 4096), &small, 4, 2);
  c.run_until(20 * kMs);
  uint64_t most = 0;
  const uint64_t before = small.done;
  c.run_until(70 * kMs, [&] { most = std::max(most, d.probe->in_flight); });
  EXPECT_LE(most, 4u + 5u);  // all of the small ones, four or five large ones
  // Each small request waits for the transfer of some four large ones (46 us each), not of 28.
  EXPECT_GT(small.done - before, 700u);
  stop(c, {&large, &small});
}

// Neither of these is what the kind reaches when the disk is full of it.
TEST(Qos, Costs_areNotLearnedFromAShallowLoad_norWhileLargeRequestsAreHeldBack) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  ASSERT_TRUE(domain->set(group(2), {.name = "b"}));
  QosOptions options;
  options.depth = 32;
  options.adapt_depth = false;
  const double small = options.model.io[0].cost(4096), large = options.model.io[0].cost(131072);
  Disk d = disk("ssd", domain, options);
  Cluster c(2, 3);
  Tally one, a, b;
  start(c, 0, d.qos.get(), reads(1, 4096), &one, 4, 1);
  c.run_until(500 * kMs);
  stop(c, {&one});
  EXPECT_EQ(d.qos->sample().model_updates, 0u);
  start(c, 0, d.qos.get(), reads(1, 131072), &a, 16, 2);
  start(c, 1, d.qos.get(), reads(2, 131072), &b, 16, 3);
  c.run_until(c.now_ns() + 100 * kMs);
  stop(c, {&a, &b});
  EXPECT_NEAR(d.qos->model().io[0].cost(4096), small, 1);
  EXPECT_NEAR(d.qos->model().io[0].cost(131072), large, large * 0.001);
}

TEST(Qos, SequentialStreams_areKnown_evenSeveralOfThem) {
  auto domain = std::make_shared<QosDomain>();
  for (uint32_t g : {1u, 2u}) ASSERT_TRUE(domain->set(group(g), {.name = "g"}));
  Disk d = disk("ssd", domain, fixed(16));
  const QosModel model;
  Cluster c(1, 3);
  Tally streams[3], random;
  for (uint32_t i = 0; i < 3; ++i) {
    Load l = reads(1, 4096);
    l.sequential = true;
    l.offset = i * kGiB, l.length = kGiB;
    start(c, 0, d.qos.get(), l, &streams[i], 1, i);
  }
  start(c, 0, d.qos.get(), reads(2, 4096), &random, 1, 9);
  c.run_until(20 * kMs);
  stop(c, {&streams[0], &streams[1], &streams[2], &random});
  for (auto& g : d.qos->sample().groups) {
    const double cost = static_cast<double>(g.cost_ns) / static_cast<double>(g.reads);
    EXPECT_NEAR(cost, model.io[g.owner.group == group(1) ? 1 : 0].cost(4096), 60);
  }
}

// What comes while the completions of a round are being looked at waits for the end of the round, in order.
TEST(Qos, RequestsOfOneRound_keepTheirOrder) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "a"}));
  std::string log;
  auto sim = make_sim("d0", {.size = kGiB, .model = "ssd"}).value();
  auto qos = make_qos(std::make_shared<Order>(sim, &log), fixed(1), domain).value();
  Cluster c(1, 0);
  auto first = [&](Volume* v) -> Task<void> {
    co_await flush_or_write(v, false);
    // The slot is free, its hand-over not done yet: these are all queued before it.
    std::vector<Task<Status>> all;
    char data[4096] = {};
    iovec iov{data, sizeof data};
    IoContext ctx;
    ctx.group = group(1);
    for (const bool flush : {false, false, true, false})
      all.push_back(flush ? v->flush(ctx) : v->write(ctx, 0, Iov(&iov, 1)));
    SPILLWAY_ASSERT((co_await all_of(std::move(all))).has_value());
  };
  c.at(0).spawn(first(qos.get()));
  c.at(0).spawn(flush_or_write(qos.get(), false));
  c.drain();
  EXPECT_EQ(log, "wwwwFw");
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

// Q1: costs, not requests, are shared, and costs that were guessed wrong (here by a factor of four between the two) are
// corrected from what each kind reaches alone: afterwards each group gets its part of what it had alone, whichever of the
// two is the weak one.
TEST(Qos, MixedSizes_afterLearning_shareOfWhatEachHadAlone) {
  for (const uint32_t small_weight : {100u, 900u}) {
    auto domain = std::make_shared<QosDomain>();
    ASSERT_TRUE(domain->set(group(1), {.name = "small", .weight = small_weight}));
    ASSERT_TRUE(domain->set(group(2), {.name = "large", .weight = 300}));
    QosOptions options;
    options.depth = 16;
    options.adapt_depth = false;
    options.model.io[0] = {100'000, 0.05};
    Disk d = small_disk(domain, options);
    Cluster c(2, 3);
    auto alone = [&](const Load& load) {
      Tally t;
      start(c, load.ctx.group == group(1) ? 0 : 1, d.qos.get(), load, &t, 32, 1);
      uint64_t at = c.now_ns() + 1500 * kMs;
      c.run_until(at);
      const uint64_t before = t.done;
      c.run_until(at += 500 * kMs);
      const auto got = 2.0 * static_cast<double>(t.done - before);
      stop(c, {&t});
      return got;
    };
    const double a_alone = alone(reads(1, 4096)), b_alone = alone(reads(2, 131072));
    // Alone, nothing of the disk is lost to shares that nobody else wants.
    EXPECT_NEAR(a_alone, kSmallDiskIops, 320);
    EXPECT_NEAR(b_alone, kSmallDiskIops / 8, 40);
    Tally a, b;
    start(c, 0, d.qos.get(), reads(1, 4096), &a, 32, 3);
    start(c, 1, d.qos.get(), reads(2, 131072), &b, 32, 4);
    c.run_until(c.now_ns() + 100 * kMs);
    const uint64_t a0 = a.done, b0 = b.done;
    c.run_until(c.now_ns() + kSecond);
    const double ratio =
        static_cast<double>(b.done - b0) / b_alone / (static_cast<double>(a.done - a0) / a_alone);
    EXPECT_NEAR(ratio / (300.0 / small_weight), 1, 0.03) << small_weight;
    stop(c, {&a, &b});
  }
}

// On a disk with a long way to it, large requests need many in flight. One who is alone gets them, so what is learned is
// what the kind reaches alone; learned while large ones were held back, their cost would come out too great, hold them
// back more, and so on.
TEST(Qos, LargeRequestsAlone_haveTheWholeDepth_andTheirCostIsWhatTheyReach) {
  auto domain = std::make_shared<QosDomain>();
  ASSERT_TRUE(domain->set(group(1), {.name = "large"}));
  QosOptions options;
  options.depth = 64;
  options.adapt_depth = false;
  SimOptions o{.size = kTiB, .model = "ssd"};
  o.ssd.dies = 1024;
  o.ssd.read_us = 1000;  // 32 in flight need them: one gives 1000/s, 32 nearly 32'000/s of 4 KiB, 14'000/s of 128 KiB
  o.ssd.read_mb_s = 2000;
  auto sim = make_sim_volume("d0", o).value();
  auto qos = make_qos_volume(sim, options, domain).value();
  Cluster c(1, 3);
  Tally t;
  start(c, 0, qos.get(), reads(1, 131072), &t, 32, 1);
  c.run_until(700 * kMs);
  const uint64_t before = t.done;
  c.run_until(900 * kMs);
  const double per_second = 5.0 * static_cast<double>(t.done - before);
  EXPECT_GT(per_second, 14'000);
  EXPECT_NEAR(qos->model().io[0].cost(131072) * per_second / 1e9, 1, 0.03);
  stop(c, {&t});
}

// The search itself is tested in depth_test.cc; this is that it is fed what it needs and that its answer is used.
TEST(Qos, Depth_goesToTheKneeAndStays) {
  for (uint32_t from : {4u, 14u}) {
    QosOptions options;
    options.depth = from;
    Disk d = small_disk(std::make_shared<QosDomain>(), options);
    Cluster c(1, 3);
    Tally t;
    start(c, 0, d.qos.get(), reads(0, 4096), &t, 32, 1);
    c.run_until(7 * kSecond);
    EXPECT_GE(d.qos->sample().knee, 8u) << "from " << from;
    EXPECT_LE(d.qos->sample().knee, 11u) << "from " << from;
    stop(c, {&t});
    EXPECT_GT(t.done, 95'000u);
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
  EXPECT_NEAR(static_cast<double>(a.done - a0 + b.done - b0), kSmallDiskIops, 320);  // all the disk has
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
    Status s;
    if (i % 100 == 99) s = co_await v->flush(ctx);
    else s = co_await v->read(ctx, 0, Iov(&iov, 1));
    SPILLWAY_ASSERT(s.has_value());
  }
  left->fetch_sub(1);
}

// Threads for real, under the thread sanitizer too: nothing is lost, stuck or counted twice while weights, caps and
// groups change and reports are read. With a depth of one and a client a reactor nobody else's request would make up for
// a hand-over that was missed.
TEST(Qos, RealReactors_racingWithChangesAndReports_loseNothing) {
  struct Shape {
    uint32_t depth;
    int clients, each;
  };
  for (const Shape shape : {Shape{4, 12, 1000}, Shape{1, 1, 10000}}) {
    auto domain = std::make_shared<QosDomain>();
    auto qos = make_qos_volume(std::make_shared<Yield>(), {.depth = shape.depth}, domain).value();
    auto pool = ReactorPool::start({-1, -1, -1}).value();
    std::atomic<int> left{shape.clients * 3};
    for (size_t r = 0; r < 3; ++r)
      pool->at(r).post([&, r] {
        for (int i = 0; i < shape.clients; ++i)
          pool->at(r).spawn(count_down(qos.get(), static_cast<uint32_t>(i) % 4, shape.each, &left));
      });
    uint32_t turn = 0;
    uint64_t moved = 0, seen = UINT64_MAX;
    for (auto since = std::chrono::steady_clock::now(); left.load() > 0; ++turn) {
      ASSERT_TRUE(domain->set(group(1), {.name = "a", .weight = 1 + turn % 1000}));
      ASSERT_TRUE(domain->set(group(2), {.name = "b", .parent = turn % 2 == 0 ? group(1) : GroupId::kRoot}));
      ASSERT_TRUE(domain->set(group(3), {.name = "c", .caps = {.riops = turn % 3 == 0 ? 1'000'000u : 0u}}));
      if (turn % 5 == 0) ASSERT_TRUE(domain->remove(group(3)));
      const QosSample s = qos->sample();
      EXPECT_LE(s.in_flight, 256u);
      (void)qos->model();
      moved = 0;
      for (auto& g : s.groups) moved += g.reads + g.flushes;
      // Stuck for good, not slow: a minute without a single request.
      const auto now = std::chrono::steady_clock::now();
      if (moved != seen) seen = moved, since = now;
      ASSERT_LT(now - since, std::chrono::minutes(1)) << moved << " done, " << s.in_flight << " in flight, " << s.waiting
                                                      << " waiting";
      std::this_thread::yield();
    }
    pool.reset();  // at the end of the last round all slots have been given back
    const QosSample s = qos->sample();
    uint64_t reads = 0, flushes = 0;
    for (auto& g : s.groups) reads += g.reads, flushes += g.flushes;
    const auto n = static_cast<uint64_t>(3 * shape.clients * shape.each);
    EXPECT_EQ(reads, n - n / 100);
    EXPECT_EQ(flushes, n / 100);
    EXPECT_EQ(s.in_flight, 0u);
    EXPECT_EQ(s.waiting, 0u);
  }
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
