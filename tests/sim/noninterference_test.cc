// Non-interference (P3, P4): tenant A's sequence of hits, misses and errors is a function of A's requests and of its
// entitlement, whatever the others do.
//
// One trace of A is replayed alone and then beside random tenants on the virtual clock: reads, writes, partial writes,
// flushes, discards, zeroes, attach and detach in all modes, scans and flush storms, their evictions, on the node A uses
// and on others, with a disk whose delays depend on all of them; host pressure comes at the same steps of A's trace each
// time (fixed entitlements). A's own requests come one at a time and in batches that do not wait for each other. A
// schedule is a pair (trace, seed of the rest), so a failure replays from the numbers it prints.
// SPILLWAY_SCHEDULES sets how many; default 600. SPILLWAY_SEED begins elsewhere. Mutants that break one rule each must
// be caught.
#include <gtest/gtest.h>

#include <malloc.h>

#include <array>
#include <cstdlib>
#include <tuple>

#include "src/cache/testing.h"
#include "src/cache/volume_filter.h"
#include "spillway/reclaim/registry.h"

namespace spillway {
namespace {

using namespace cache::testing;
using Mutant = Cache::Impl::Mutant;

constexpr uint64_t P = kPageSize;
constexpr uint64_t kNodePages = 512;
constexpr uint64_t kOtherPages = 256;

struct Op {
  enum class Kind : uint8_t { kRead, kWrite, kPartial, kFlush, kDiscard, kZero, kBatch, kPressure } kind;
  uint64_t page, count, seed;
};
struct Seen {
  uint64_t hits, misses;
  bool error;
  bool operator==(const Seen& o) const { return error == o.error && hits == o.hits && misses == o.misses; }
};

struct Style {
  bool faults;   // some pages cannot be read, some not written
  bool ahead;    // read-ahead
  bool limited;  // A's group has a limit below its share
};

std::vector<Op> make_trace(uint64_t seed, int length, Style style) {
  std::mt19937_64 r(seed);
  std::vector<Op> t;
  const uint64_t hot = r() % (kNodePages - 64);
  uint64_t stream = r() % (kNodePages - 8);
  for (int k = 0; k < length; ++k) {
    const uint64_t page = r() % 3 == 0 ? r() % kNodePages : hot + r() % 48;
    const uint64_t count = 1 + r() % std::min<uint64_t>(8, kNodePages - page);
    switch (r() % 16) {
      case 0: case 1: t.push_back({Op::Kind::kWrite, page, count, r()}); break;
      case 2: t.push_back({Op::Kind::kPartial, page, 1, r()}); break;
      case 3: t.push_back({Op::Kind::kFlush, 0, 0, 0}); break;
      // What A discards while another sees it is zeroed by writing, which a bad disk refuses: shared data again.
      case 4: t.push_back({style.faults ? Op::Kind::kRead : Op::Kind::kDiscard, page, count, 0}); break;
      case 5: t.push_back({style.faults || r() % 4 != 0 ? Op::Kind::kBatch : Op::Kind::kZero, std::min(page, kNodePages - 4), 4, r()});
        break;
      case 6: t.push_back({Op::Kind::kPressure, 0, r() % 60, 0}); break;
      case 7: case 8:
        for (int s = 0; s < 6; ++s) {
          const uint64_t n = r() % 3 == 0 ? 1 + r() % 8 : 1;
          t.push_back({Op::Kind::kRead, stream, n, 0});
          stream = (stream + n) % (kNodePages - 8);
        }
        break;
      default: t.push_back({Op::Kind::kRead, page, count, 0});
    }
  }
  return t;
}

// One world for many schedules; reset() brings it back to its first state.
struct World {
  SimReactor sim;
  std::mt19937_64 random;
  reclaim::Registry registry;
  std::vector<reclaim::GroupRef> groups;
  std::shared_ptr<TestDisk> disk = std::make_shared<TestDisk>(kNodePages * P);
  std::shared_ptr<TestDisk> other = std::make_shared<TestDisk>(kOtherPages * P);
  std::unique_ptr<Cache> cache;
  VolumePtr v, o;
  uint64_t load = 0;  // others' requests under way: the disk is slower

  World(uint64_t seed, Style style, Mutant mutant) : sim(seed | 1), random(seed) {
    mallopt(M_TRIM_THRESHOLD, 1 << 28);  // buffers come and go; the kernel need not see it
    mallopt(M_MMAP_THRESHOLD, 1 << 24);
    for (const char* name : {"a", "b", "c", "d"}) groups.push_back(registry.create_group(name));
    groups[1]->set_weight(300);
    if (style.limited) groups[0]->set_max(48 * P);
    CacheOptions opt;
    opt.capacity_bytes = 384 * P;
    opt.dirty_bytes_max = 96 * P;
    opt.registry = &registry;
    opt.background = &sim;
    opt.dirty_expire_ns = 2'000'000;
    opt.grow_back_ns = 0;  // entitlements move with A's own steps only
    opt.read_ahead_max_bytes = style.ahead ? 16 * P : 0;
    cache = std::move(*Cache::create(opt));
    cache->impl().mutant = mutant;
    disk->keep_log = other->keep_log = false;
    disk->keep_stable = other->keep_stable = false;
    disk->delay_ns = other->delay_ns = [this] { return random() % (50'000 + load * 100'000); };
    if (style.faults) {
      disk->bad_read = {7, 100, 101, 333};
      disk->bad_write = {50, 200};
    }
    v = *cache->attach(disk, CacheMode::kIsolated, "shared");
    o = *cache->attach(other, CacheMode::kIsolated, "others");
  }
  ~World() {
    disk->bad_write.clear();
    disk->bad_read.clear();
    Status s = sim.block_on(cache->close());
    EXPECT_TRUE(s);
    v.reset();
    o.reset();
    sim.run_until_idle();
  }
  GroupId id(size_t t) const { return GroupId{groups[t]->id()}; }
  void reset() {
    auto bad = std::exchange(disk->bad_write, {});
    sim.run_until_idle();
    Status s = sim.block_on(cache->flush_all());
    ASSERT_TRUE(s);
    Cache::Impl& c = cache->impl();
    for (auto& t : c.tenants_) {
      c.forget_view(*t);
      t->scale.store(cache::Tenant::kScaleOne);
    }
    cache->refresh_entitlements();
    disk->bad_write = std::move(bad);
    ASSERT_EQ(cache->stats().resident_bytes, 0u);
    ASSERT_EQ(cache->stats().dirty_bytes, 0u);
    // Streams of read-ahead are A's own state as well: new volumes.
    v = *c_attach("shared", disk);
    o = *c_attach("others", other);
  }
  Result<VolumePtr> c_attach(const char* key, std::shared_ptr<TestDisk> d) {
    return cache->attach(std::move(d), CacheMode::kIsolated, key);
  }
};

// One of a batch. Which of two of A's own requests on a bad page wins is A's own affair: `error` may be null.
Task<void> one_of(Volume& v, GroupId g, uint64_t kind, uint64_t page, uint64_t count, bool* error, bool* begun,
                  AsyncCounter& left) {
  std::vector<std::byte> d(count * P, std::byte(page));
  *begun = true;  // the request is issued in the same breath
  Status s{};
  switch (kind % 8) {
    case 0: s = co_await write_at(v, g, page * P, d); break;
    case 1: {
      const uint64_t in = kind / 8 % 4 * 512;
      d.resize(d.size() - in - 512);  // both ends are parts of pages
      s = co_await write_at(v, g, page * P + in, d);
      break;
    }
    case 2: s = co_await flush_of(v, g); break;
    case 3:
      if (error != nullptr) {  // no faults in this world
        s = co_await v.discard(IoContext{.group = g}, page * P, count * P);
        break;
      }
      [[fallthrough]];
    default: s = co_await read_at(v, g, page * P, d);
  }
  if (error != nullptr) *error |= !s;
  left.done();
}

Task<void> play(World& w, const std::vector<Op>& trace, std::vector<Seen>& seen, bool* done) {
  const GroupId g = w.id(0);
  Volume& v = *w.v;
  std::vector<std::byte> first(P);
  (void)co_await read_at(v, g, 0, first);  // binds the group
  cache::Tenant* a = w.cache->impl().tenant_of(g);
  auto sum = [&](auto member) {
    uint64_t n = 0;
    for (auto& c : a->counters) n += (c.*member).load();
    return n;
  };
  for (const Op& op : trace) {
    const uint64_t hits = sum(&cache::Tenant::Counters::hits), misses = sum(&cache::Tenant::Counters::misses);
    bool error = false;
    std::vector<std::byte> d(std::max<uint64_t>(op.count, 1) * P, std::byte(op.seed));
    switch (op.kind) {
      case Op::Kind::kRead: {
        Status s = co_await read_at(v, g, op.page * P, d);
        error = !s;
        break;
      }
      case Op::Kind::kWrite: {
        Status s = co_await write_at(v, g, op.page * P, d, op.seed % 8 == 0);
        error = !s;
        break;
      }
      case Op::Kind::kPartial: {
        d.resize(512);
        Status s = co_await write_at(v, g, op.page * P + op.seed % 8 * 512, d);
        error = !s;
        break;
      }
      case Op::Kind::kFlush: {
        Status s = co_await flush_of(v, g);
        error = !s;
        break;
      }
      case Op::Kind::kDiscard: {
        Status s = co_await v.discard(IoContext{.group = g}, op.page * P, op.count * P);
        error = !s;
        break;
      }
      case Op::Kind::kZero: {
        Status s = co_await v.write_zeroes(IoContext{.group = g}, op.page * P, op.count * P, true);
        error = !s;
        break;
      }
      case Op::Kind::kBatch: {
        // Issued in order without waiting; what they see is compared as one.
        AsyncCounter left;
        std::mt19937_64 r(op.seed);
        const bool faults = !w.disk->bad_read.empty();
        for (uint64_t k = 0; k < op.count; ++k) {
          left.add();
          bool begun = false;
          uint64_t page = r() % (kNodePages - 16), kind = r(), count = 1 + r() % 6;
          if (r() % 3 != 0) page = op.page % (kNodePages - 16) + r() % 8;
          // Whether a page that cannot be written is still in the view when its data comes, and the error is the
          // write's or the next flush's, is up to A's own requests beside it.
          for (uint64_t bad : w.disk->bad_write)
            if (kind % 8 <= 1 && bad >= page && bad < page + count) kind = 7;
          Reactor::current().spawn(one_of(v, g, kind, page, count, faults ? nullptr : &error, &begun, left));
          while (!begun) co_await Reactor::current().sleep_for(0);
          // Long enough that a quiet disk has answered and a busy one has not.
          if (r() % 2 == 0) co_await Reactor::current().sleep_for(r() % 60'000);
        }
        co_await left.wait_idle();
        break;
      }
      case Op::Kind::kPressure: w.cache->apply_pressure(static_cast<double>(op.count) / 100); break;
    }
    seen.push_back({sum(&cache::Tenant::Counters::hits) - hits, sum(&cache::Tenant::Counters::misses) - misses, error});
  }
  *done = true;
}

// A neighbour: what it likes, until A is done.
Task<void> neighbour(World& w, size_t tenant, uint64_t seed, const bool* done) {
  std::mt19937_64 r(seed);
  const GroupId g = w.id(tenant);
  VolumePtr mine = w.v;
  const bool calm = r() % 4 == 0;
  const uint64_t habit = r() % 6;  // 0 scans, 1 flushes without end, else anything
  uint64_t scan = 0;
  for (int k = 0; k < 400 && !*done; ++k) {
    if (calm || r() % 8 == 0) co_await Reactor::current().sleep_for(r() % 400'000);
    ++w.load;
    Volume& v = r() % 4 == 0 ? *w.o : *mine;
    const uint64_t pages = v.size() / P;
    uint64_t page = r() % pages;
    if (habit == 0) page = scan = (scan + 24) % pages;
    const uint64_t count = habit == 0 ? std::min<uint64_t>(24, pages - page) : 1 + r() % std::min<uint64_t>(24, pages - page);
    std::vector<std::byte> d(count * P, std::byte(k));
    // Who zeroes or discards bytes that A wrote and the disk refuses takes A's error away: that is shared data, not a
    // trace in the cache.
    const bool forbidden = !w.disk->bad_write.empty() && &v == mine.get();
    uint64_t kind = r() % 12;
    if (habit == 0 && r() % 8 != 0) kind = 11;
    if (habit == 1 && r() % 2 != 0) kind = 3;
    if (forbidden && (kind == 5 || kind == 6)) kind = 11;
    switch (kind) {
      case 0: case 1: (void)co_await write_at(v, g, page * P, d, r() % 8 == 0); break;
      case 2:
        d.resize(512);
        (void)co_await write_at(v, g, page * P + 1024, d);
        break;
      case 3: (void)co_await flush_of(v, g); break;
      case 5: (void)co_await v.discard(IoContext{.group = g}, page * P, count * P); break;
      case 6: (void)co_await v.write_zeroes(IoContext{.group = g}, page * P, count * P, true); break;
      case 4: {  // detach and attach
        constexpr CacheMode kModes[] = {CacheMode::kIsolated, CacheMode::kIsolated, CacheMode::kTrusted, CacheMode::kNone};
        auto again = w.cache->attach(w.disk, kModes[r() % 4], "shared");
        if (again) mine = *again;
        break;
      }
      default: (void)co_await read_at(v, g, page * P, d);
    }
    --w.load;
  }
}

Task<void> scene(World& w, const std::vector<Op>& trace, uint64_t others, std::vector<Seen>& seen) {
  bool done = false;
  std::mt19937_64 r(others);
  const size_t n = others == 0 ? 0 : 1 + r() % 3;
  AsyncCounter left;
  auto counted = [](Task<void> t, AsyncCounter& l) -> Task<void> {
    co_await t;
    l.done();
  };
  for (size_t k = 1; k <= n; ++k) {
    left.add();
    Reactor::current().spawn(counted(neighbour(w, k, r(), &done), left));
  }
  // They may be there before A comes.
  if (n != 0 && r() % 2 == 0) co_await Reactor::current().sleep_for(r() % 5'000'000);
  co_await play(w, trace, seen, &done);
  co_await left.wait_idle();
}

struct Outcome {
  uint64_t schedules = 0, differing = 0, events = 0;
  std::string first;
};

uint64_t number(const char* name, uint64_t otherwise) {
  const char* n = std::getenv(name);
  return n != nullptr ? std::strtoull(n, nullptr, 10) : otherwise;
}

// style null: each world has its own.
Outcome explore(uint64_t schedules, const Style* fixed, Mutant mutant, uint64_t seed, bool stop_at_first) {
  constexpr uint64_t kPerTrace = 16, kTracesPerWorld = 12;
  Outcome out;
  std::unique_ptr<World> w;
  // SPILLWAY_TRACE=N replays from the world of that trace on.
  for (uint64_t t = number("SPILLWAY_TRACE", 0) / kTracesPerWorld * kTracesPerWorld; out.schedules < schedules; ++t) {
    const uint64_t kind = t / kTracesPerWorld + 1;
    const Style style = fixed != nullptr ? *fixed : Style{(kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0};
    if (t % kTracesPerWorld == 0) {
      w.reset();
      w = std::make_unique<World>(seed * 1000 + t, style, mutant);
    }
    const auto trace = make_trace(seed * 7919 + t, 60, style);
    std::vector<Seen> alone;
    w->reset();
    w->sim.block_on(scene(*w, trace, 0, alone));
    for (uint64_t k = 1; k <= kPerTrace && out.schedules < schedules; ++k) {
      std::vector<Seen> seen;
      w->reset();
      if (::testing::Test::HasFatalFailure()) return out;
      w->sim.block_on(scene(*w, trace, t * kPerTrace + k, seen));
      ++out.schedules;
      out.events += seen.size();
      if (seen == alone) continue;
      ++out.differing;
      if (out.first.empty())
        for (size_t i = 0; i < seen.size(); ++i)
          if (!(seen[i] == alone[i])) {
            out.first = std::string(style.faults ? "faults " : "") + (style.ahead ? "ahead " : "") +
                        (style.limited ? "limited " : "") + "seed " + std::to_string(seed) + " trace " + std::to_string(t) + " schedule " +
                        std::to_string(k) + " step " + std::to_string(i) + " kind " +
                        std::to_string(static_cast<int>(trace[i].kind)) + ": alone " +
                        std::to_string(alone[i].hits) + " hits " + std::to_string(alone[i].misses) + " misses error " +
                        std::to_string(alone[i].error) + ", beside others " + std::to_string(seen[i].hits) + " " +
                        std::to_string(seen[i].misses) + " " + std::to_string(seen[i].error);
            break;
          }
      if (stop_at_first) return out;
    }
  }
  EXPECT_EQ(w->cache->stats().frame_shortage, 0u);
  return out;
}

TEST(NonInterference, Isolated_anyNeighbours_sameHitsMissesErrors) {
  const Outcome o = explore(number("SPILLWAY_SCHEDULES", 600), nullptr, Mutant::kNone, number("SPILLWAY_SEED", 1), true);
  EXPECT_EQ(o.differing, 0u) << o.first;
  std::printf("%lu schedules, %lu events of A compared\n", o.schedules, o.events);
}

// P4 seen directly: the view of a tenant that does nothing, its order included, before and after all others did what they
// like. By list position: node, leaf and the state of each page.
std::vector<std::tuple<std::string, uint64_t, std::array<uint8_t, cache::kLeafPages>>> view_of(World& w, GroupId g) {
  std::vector<std::tuple<std::string, uint64_t, std::array<uint8_t, cache::kLeafPages>>> out;
  cache::ViewList& list = w.cache->impl().tenant_of(g)->lists[0];
  for (uint64_t k = 0; k < list.chunks(); ++k) {
    cache::ViewChunk* c = list.chunk_at(k);
    std::array<uint8_t, cache::kLeafPages> states{};
    for (unsigned i = 0; i < cache::kLeafPages; ++i) states[i] = c->get(i);
    out.emplace_back(c->leaf->node->key, c->leaf->number, states);
  }
  return out;
}

// How many of `seeds` idle tenants had something changed.
uint64_t steered(uint64_t seeds, Mutant mutant) {
  uint64_t changed = 0;
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    World w(seed, {.faults = false, .ahead = true, .limited = false}, mutant);
    const GroupId g = w.id(0);
    std::mt19937_64 r(seed);
    std::vector<std::byte> d(4 * P);
    for (int k = 0; k < 80; ++k) {
      Volume& v = r() % 3 == 0 ? *w.o : *w.v;
      const uint64_t at = r() % (v.size() / P / 4) * 4 * P;
      Status s = w.sim.block_on(r() % 4 == 0 ? write_at(v, g, at, d) : read_at(v, g, at, d));
      EXPECT_TRUE(s);
    }
    w.sim.run_until_idle();  // nothing is dirty or on its way any more
    const auto before = view_of(w, g);
    EXPECT_GT(before.size(), 4u);
    const bool done = false;
    for (size_t k = 1; k <= 3; ++k) w.sim.spawn(neighbour(w, k, seed * 31 + k, &done));
    w.sim.run_until_idle();
    changed += before != view_of(w, g);
  }
  return changed;
}

TEST(NoSteering, IdleTenant_anythingOthersDo_viewAndItsOrderStay) {
  EXPECT_EQ(steered(number("SPILLWAY_SCHEDULES", 600) / 20, Mutant::kNone), 0u);
  EXPECT_GT(steered(10, Mutant::kDiscardDropsOthers), 0u);
}

// Each mutant breaks one rule; the property must fail within 4000 schedules (most do at once).
struct MutantTest : ::testing::TestWithParam<Mutant> {};

TEST_P(MutantTest, Mutant_brokenRule_isCaught) {
  const Style style{.faults = false, .ahead = true, .limited = GetParam() >= Mutant::kRoomBeforeUse};
  const Outcome o = explore(4000, &style, GetParam(), 3, true);
  EXPECT_GT(o.differing, 0u);
  std::printf("caught after %lu schedules: %s\n", o.schedules, o.first.c_str());
}
INSTANTIATE_TEST_SUITE_P(Mutants, MutantTest,
                         ::testing::Values(Mutant::kUseResidentAtOnce, Mutant::kEvictFewestViews,
                                           Mutant::kShrinkByUsage, Mutant::kDiscardDropsOthers,
                                           Mutant::kAheadOnLoading, Mutant::kRoomBeforeUse, Mutant::kUseAfterWait));

}  // namespace
}  // namespace spillway
