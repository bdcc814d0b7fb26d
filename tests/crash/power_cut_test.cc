// Power-cut sweep (V2): a short load on an array whose disks record everything; then, for every moment of it, states
// that the disks could have been left in are opened again, whole and with one member gone. No block that was
// acknowledged and flushed may be lost or changed, and after recovery the redundancy is consistent.
//
// What may be otherwise: a block that was being written (or written and not flushed) is old or new; on a raid5 that
// lost a member at the same moment, such a block of *that member* may be neither (md's PPL has the same limit), and
// without a log the array refuses to start.
//
// Also: sets below a stripe or a linear volume; a member that fails during the load and is there again afterwards, with
// what it had (it must not be believed), and a spare that is being filled under the load; a second cut in the middle of the recovery from the first; and each state read
// without writing anything, which must show no less.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "src/base/log.h"
#include "src/io/sim_reactor.h"
#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/md/layout.h"
#include "src/volume/testing.h"
#include "tests/crash/recording.h"

namespace spillway {
namespace {

using crash::Cut;
using crash::Event;
using crash::RecordingVolume;
using crash::Trace;
using testing_support::read_bytes;

constexpr uint64_t kBlock = 512;

// A disk over somebody else's bytes.
class ImageVolume final : public Volume {
 public:
  // After *budget writes to any disk nothing reaches the bytes any more: the next cut.
  ImageVolume(std::string name, std::vector<std::byte>* bytes, std::shared_ptr<uint64_t> budget, bool read_only)
      : Volume(std::move(name), bytes->size(), Geometry{.read_only = read_only}), bytes_(*bytes), budget_(std::move(budget)) {}
  std::string_view layer() const override { return "image"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    copy_to_iov(iov, 0, bytes_.data() + offset, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    if (*budget_ == 0) return Task<Status>::ready(fail(ErrorKind::kIo, "power is off"));
    --*budget_;
    copy_from_iov(bytes_.data() + offset, iov, 0, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override {
    if (*budget_ == 0) return Task<Status>::ready(fail(ErrorKind::kIo, "power is off"));
    return Task<Status>::ready();
  }

 private:
  std::vector<std::byte>& bytes_;
  const std::shared_ptr<uint64_t> budget_;
};

constexpr uint64_t kComponent = 128 * kKiB;
constexpr uint64_t kMember = kMiB + kComponent;
constexpr uint64_t kChunk = 16 * kKiB;

struct Shape {
  const char* layer;
  const char* consistency;
  size_t disks;  // of a set
  int writes;
  bool dies = false;          // one member, half way
  const char* top = nullptr;  // "stripe", "linear": over two such sets
  bool spare = false;         // takes the place of the one that dies
};
void PrintTo(const Shape& s, std::ostream* os) {
  if (s.top != nullptr) *os << s.top << "_";
  *os << s.layer << s.disks << "_" << s.consistency << (s.dies ? "_dies" : "") << (s.spare ? "_rebuilds" : "");
}

// A write by the client; contents are a function of its number and the block.
struct ClientWrite {
  uint64_t first, count;  // blocks
  bool fua;
  uint64_t issued = 0, acked = UINT64_MAX;
};
struct ClientFlush {
  uint64_t issued = 0, acked = UINT64_MAX;
};

void fill(std::byte* to, uint64_t write, uint64_t block) {
  for (uint64_t i = 0; i < kBlock; i += 16) {
    std::memcpy(to + i, &write, 8);
    std::memcpy(to + i + 8, &block, 8);
  }
}

struct Client {
  Trace* trace;
  Volume* volume;
  std::vector<ClientWrite> writes;
  std::vector<ClientFlush> flushes;

  Task<Status> write(size_t i) {
    ClientWrite& w = writes[i];
    AlignedBuffer data(w.count * kBlock);
    for (uint64_t b = 0; b < w.count; ++b) fill(data.data() + b * kBlock, i + 1, w.first + b);
    const iovec v = data.iov();
    IoContext ctx;
    ctx.fua = w.fua;
    w.issued = trace->next();
    Status s = co_await volume->write(ctx, w.first * kBlock, Iov(&v, 1));
    if (s) w.acked = trace->next();
    co_return s;
  }
  Task<Status> flush(size_t i) {
    flushes[i].issued = trace->next();
    Status s = co_await volume->flush({});
    if (s) flushes[i].acked = trace->next();
    co_return s;
  }

  // Numbers of the writes a block may show after a cut: the last one that is stable, or any later one.
  // `settled`: no write to the block but stable ones was ever issued.
  std::set<uint64_t> acceptable(uint64_t block, uint64_t at, bool* settled) const {
    std::set<uint64_t> ok{0};
    *settled = true;
    for (size_t i = 0; i < writes.size(); ++i) {
      const ClientWrite& w = writes[i];
      if (w.issued == 0 || w.issued > at || block < w.first || block >= w.first + w.count) continue;
      bool stable = w.fua && w.acked <= at;
      for (const ClientFlush& f : flushes) stable |= w.acked < f.issued && f.acked <= at;
      if (stable) {
        ok = {i + 1};
        *settled = true;
      } else {
        ok.insert(i + 1);
        *settled = false;
      }
    }
    return ok;
  }
};

class PowerCut : public ::testing::TestWithParam<Shape> {
 protected:
  size_t sets() const { return GetParam().top != nullptr ? 2 : 1; }
  size_t disks() const { return GetParam().disks * sets() + GetParam().spare; }
  bool raid5() const { return std::string_view(GetParam().layer) == "raid5"; }
  bool logged() const { return std::string_view(GetParam().consistency) == "ppl"; }
  LayerSpec spec(size_t set, const std::vector<VolumePtr>& members) const {
    LayerSpec s;
    s.name = fmt::format("vol{}", set);
    s.layer = GetParam().layer;
    s.chunk = raid5() ? kChunk : 0;
    s.consistency = GetParam().consistency;
    for (size_t i = 0; i < GetParam().disks; ++i) s.members.push_back(members[set * GetParam().disks + i]);
    if (GetParam().spare) s.spares.push_back(members.back());
    s.rebuild_rate_min = kGiB;
    return s;
  }
  struct Opened {
    VolumePtr top;
    std::vector<VolumePtr> sets;
    void idle(SimReactor& sim) {
      for (auto& v : sets) sim.block_on(array_control(*v)->wait_idle());
    }
  };
  Result<Opened> open(SimReactor& sim, const std::vector<VolumePtr>& members, bool read_only = false) const {
    Opened o;
    for (size_t i = 0; i < sets(); ++i) {
      LayerSpec s = spec(i, members);
      s.read_only = read_only;
      auto v = sim.block_on(assemble(s));
      if (!v) {
        for (auto& other : o.sets) (void)sim.block_on(other->close());
        return std::unexpected(std::move(v).error());
      }
      o.sets.push_back(std::move(*v));
    }
    if (GetParam().top == nullptr) {
      o.top = o.sets[0];
      return o;
    }
    LayerSpec t;
    t.name = "top";
    t.layer = GetParam().top;
    t.chunk = kChunk;
    t.metadata = "none";
    t.members = o.sets;
    o.top = sim.block_on(assemble(t)).value();
    return o;
  }

  void run(uint64_t seed);
  void check(SimReactor& sim, const Client& client, uint64_t at, std::vector<std::vector<std::byte>>& image, size_t gone,
             std::mt19937_64& random);
  void check_contents(SimReactor& sim, Volume& v, const Client& client, uint64_t at, size_t gone, const char* when);
  size_t dead = SIZE_MAX;
  uint64_t images = 0, refused = 0, degraded = 0, interrupted = 0;
};

Task<Status> load(Client* c, int writes, std::mt19937_64* random, uint64_t blocks, uint64_t share_of) {
  // Batches of requests to disjoint parts, a flush now and then beside them.
  size_t next = c->writes.size();
  const size_t end = next + static_cast<size_t>(writes);
  c->writes.reserve(end + 8);
  c->flushes.reserve(c->flushes.size() + static_cast<size_t>(writes) + 8);
  while (next < end) {
    std::vector<Task<Status>> tasks;
    const uint64_t k = 1 + (*random)() % 3;
    const uint64_t share = blocks / share_of;
    std::set<uint64_t> used;
    for (uint64_t i = 0; i < k; ++i) {
      const uint64_t part = (*random)() % share_of;
      if (!used.insert(part).second) continue;
      ClientWrite w{};
      w.first = part * share + (*random)() % share;
      const uint64_t longest = (*random)() % 4 == 0 ? share : 9;
      w.count = std::min(1 + (*random)() % longest, (part + 1) * share - w.first);
      w.fua = (*random)() % 5 == 0;
      c->writes.push_back(w);
      tasks.push_back(c->write(next++));
    }
    if ((*random)() % 3 == 0) {
      c->flushes.emplace_back();
      tasks.push_back(c->flush(c->flushes.size() - 1));
    }
    Status s = co_await all_of(std::move(tasks));
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> fill_volume(Volume* v) {
  for (uint64_t at = 0; at < v->size(); at += 64 * kKiB) {
    const uint64_t n = std::min<uint64_t>(64 * kKiB, v->size() - at);
    AlignedBuffer data(n);
    for (uint64_t b = 0; b < n / kBlock; ++b) fill(data.data() + b * kBlock, 0, at / kBlock + b);
    const iovec iov = data.iov();
    Status s = co_await v->write({}, at, Iov(&iov, 1));
    if (!s) co_return s;
  }
  co_return co_await v->flush({});
}

void PowerCut::check_contents(SimReactor& sim, Volume& v, const Client& client, uint64_t at, size_t gone, const char* when) {
  auto all = sim.block_on(read_bytes(v, 0, v.size()));
  ASSERT_TRUE(all) << all.error().message();
  const uint64_t row = kChunk * (GetParam().disks - 1);
  for (uint64_t b = 0; b < v.size() / kBlock; ++b) {
    bool settled = true;
    const auto ok = client.acceptable(b, at, &settled);
    if (!settled && gone < disks() && raid5()) {
      const uint64_t r = b * kBlock / row, d = b * kBlock % row / kChunk;
      if (sets() > 1 || md::data_disk(md::Raid5Layout::kLeftSymmetric, static_cast<uint32_t>(GetParam().disks), r,
                                      static_cast<uint32_t>(d)) == gone)
        continue;  // in flight on the member that is gone (nested: on some member)
    }
    uint64_t write, block;
    std::memcpy(&write, all->data() + b * kBlock, 8);
    std::memcpy(&block, all->data() + b * kBlock + 8, 8);
    std::byte expected[kBlock];
    fill(expected, write, b);
    ASSERT_TRUE(ok.count(write) != 0 && block == b && std::memcmp(expected, all->data() + b * kBlock, kBlock) == 0)
        << "cut at " << at << ", member gone " << gone << ", " << when << ": block " << b << " shows write " << write
        << " of block " << block << ", allowed begin with " << *ok.begin();
  }
}

void PowerCut::check(SimReactor& sim, const Client& client, uint64_t at, std::vector<std::vector<std::byte>>& image,
                     size_t gone, std::mt19937_64& random) {
  ++images;
  const auto members = [&](uint64_t writes, bool read_only) {
    std::vector<VolumePtr> v;
    auto budget = std::make_shared<uint64_t>(writes);
    for (size_t i = 0; i < image.size(); ++i)
      v.push_back(i == gone ? nullptr : std::make_shared<ImageVolume>(fmt::format("d{}", i), &image[i], budget, read_only));
    return v;
  };
  // A member that failed is missing, too, once the others know.
  const size_t lost = gone < disks() ? gone : dead;
  const auto acceptable_refusal = [&](const Error& e) {
    // Only a raid5 without a log may refuse, and only without a member.
    return lost < disks() && raid5() && !logged() && e.kind() == ErrorKind::kDegraded;
  };
  {
    auto opened = open(sim, members(0, true), true);
    ASSERT_TRUE(opened) << opened.error().message() << " at " << at;
    bool guess = false;  // dirty, degraded, no log: said in a warning, and refused below
    for (auto& set : opened->sets) guess |= raid5() && !logged() && array_status(*set).state == "degraded";
    if (!guess) ASSERT_NO_FATAL_FAILURE(check_contents(sim, *opened->top, client, at, lost, "read-only"));
    ASSERT_TRUE(sim.block_on(opened->top->close()));
  }
  if (random() % 3 == 0) {
    ++interrupted;
    auto opened = open(sim, members(random() % 12, false));
    if (opened) {
      opened->idle(sim);
      (void)sim.block_on(opened->top->close());
    }
  }
  auto opened = open(sim, members(UINT64_MAX, false));
  if (!opened) {
    ASSERT_TRUE(acceptable_refusal(opened.error())) << opened.error().message() << " at " << at;
    ++refused;
    return;
  }
  bool whole = true;
  for (auto& set : opened->sets) whole &= array_status(*set).state != "degraded";
  degraded += !whole;
  Volume& v = *opened->top;
  ASSERT_NO_FATAL_FAILURE(check_contents(sim, v, client, at, lost, "at once"));
  opened->idle(sim);
  ASSERT_NO_FATAL_FAILURE(check_contents(sim, v, client, at, lost, "after recovery"));
  for (auto& set : opened->sets) {
    if (array_status(*set).state == "degraded") {
      ASSERT_FALSE(GetParam().spare) << "cut at " << at << ": the spare was not taken";
      continue;
    }
    ASSERT_TRUE(sim.block_on(array_control(*set)->start_scrub(ArrayControl::Scrub::kCheck)));
    sim.block_on(array_control(*set)->wait_idle());
    ASSERT_EQ(array_status(*set).mismatch_blocks, 0u) << "cut at " << at;
  }
  ASSERT_TRUE(sim.block_on(v.close()));
}

void PowerCut::run(uint64_t seed) {
  const Shape& setup = GetParam();
  SimReactor sim(seed);
  Trace trace(seed);
  std::mt19937_64 random(seed * 7919);
  std::vector<VolumePtr> members;
  std::vector<std::shared_ptr<RecordingVolume>> recorders;
  for (size_t i = 0; i < disks(); ++i) {
    recorders.push_back(std::make_shared<RecordingVolume>(fmt::format("d{}", i), kMember, i, &trace));
    members.push_back(recorders.back());
  }
  CreateOptions create;
  create.assume_clean = true;
  for (size_t i = 0; i < sets(); ++i) {
    auto plan = sim.block_on(create_array(spec(i, members), create));
    ASSERT_TRUE(plan) << plan.error().message();
  }
  auto made = open(sim, members);
  ASSERT_TRUE(made) << made.error().message();
  ASSERT_TRUE(sim.block_on(fill_volume(made->top.get())));
  ASSERT_TRUE(sim.block_on(made->top->close()));
  std::vector<std::vector<std::byte>> base;
  for (auto& d : recorders) base.push_back(d->bytes());

  trace.recording = true;
  Client client{&trace, nullptr, {}, {}};
  made = open(sim, members);
  VolumePtr v = made->top;
  client.volume = v.get();
  const uint64_t blocks = v->size() / kBlock;
  dead = SIZE_MAX;
  Status s = sim.block_on(load(&client, setup.dies ? setup.writes / 2 : setup.writes, &random, blocks, 4));
  ASSERT_TRUE(s) << s.error().message();
  if (setup.dies) {
    dead = random() % (disks() - setup.spare);
    recorders[dead]->die();
    s = sim.block_on(load(&client, setup.writes, &random, blocks, 4));
    ASSERT_TRUE(s) << s.error().message();
  }
  // Long enough for the bitmap's daemon and the mark of a clean array, then a little more load over it.
  auto pause = []() -> Task<void> { co_await Reactor::current().sleep_for(16'000'000'000ull); };
  sim.block_on(pause());
  // Several at once: all of them find the array clean.
  std::vector<Task<Status>> again;
  client.writes.reserve(client.writes.size() + 3);
  for (uint64_t i = 0; i < 3; ++i) {
    client.writes.push_back(ClientWrite{3 + i * (blocks / 4), 5, false, 0, UINT64_MAX});
    again.push_back(client.write(client.writes.size() - 1));
  }
  ASSERT_TRUE(sim.block_on(all_of(std::move(again))));
  s = sim.block_on(v->close());
  ASSERT_TRUE(s || setup.dies) << s.error().message();
  v.reset();
  made = Opened{};
  trace.recording = false;

  const bool thorough = std::getenv("SPILLWAY_CRASH_SEEDS") != nullptr;
  std::vector<std::vector<std::byte>> image;
  for (uint64_t at = 1; at <= trace.clock && !HasFatalFailure(); ++at) {
    const Cut cut(trace, at, disks());
    // All combinations for a few writes in the air, whole and without each of the members; samples beyond, torn ones
    // among them.
    const bool all = cut.possible() <= 3;
    const uint64_t n = all ? 1ull << cut.possible() : 5;
    for (uint64_t k = 0; k < n && !HasFatalFailure(); ++k) {
      const auto take = [&](size_t gone) {
        cut.image(
            base, &image,
            [&](size_t i) -> int {
              if (all) return static_cast<int>(k >> i & 1);
              if (k == 0) return 0;
              if (k == 1) return 1;
              return static_cast<int>(random() % 3);
            },
            random);
        check(sim, client, at, image, gone, random);
      };
      if (setup.dies) {
        take(random() % 3 == 0 ? dead : SIZE_MAX);
      } else if (all && k == 0 && (thorough || at % 4 == 0)) {
        for (size_t gone = 0; gone <= disks() && !HasFatalFailure(); ++gone) take(gone < disks() ? gone : SIZE_MAX);
      } else {
        take(random() % 2 == 0 ? SIZE_MAX : random() % disks());
      }
    }
  }
}

TEST_P(PowerCut, no_flushed_block_is_lost_at_any_moment) {
  set_log_level(LogLevel::kError);
  const char* env = std::getenv("SPILLWAY_CRASH_SEEDS");
  const uint64_t seeds = env != nullptr ? std::strtoull(env, nullptr, 10) : 1;
  for (uint64_t seed = 1; seed <= seeds && !HasFatalFailure(); ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    run(seed);
  }
  RecordProperty("images", static_cast<int>(images));
  std::ostringstream name;
  PrintTo(GetParam(), &name);
  fmt::print("  {}: {} states, {} opened degraded, {} refused, {} recoveries interrupted\n", name.str(), images, degraded,
             refused, interrupted);
  EXPECT_GT(images, 100u);
}

INSTANTIATE_TEST_SUITE_P(Arrays, PowerCut,
                         ::testing::Values(Shape{"mirror", "bitmap", 2, 20}, Shape{"mirror", "resync", 3, 15},
                                           Shape{"raid5", "ppl", 4, 20}, Shape{"raid5", "ppl", 3, 20},
                                           Shape{"raid5", "bitmap", 4, 15}, Shape{"raid5", "resync", 3, 12},
                                           Shape{"mirror", "bitmap", 2, 16, true}, Shape{"mirror", "resync", 3, 12, true},
                                           Shape{"raid5", "ppl", 4, 10, true}, Shape{"raid5", "bitmap", 3, 12, true},
                                           Shape{"mirror", "bitmap", 2, 8, false, "stripe"},
                                           Shape{"raid5", "ppl", 3, 6, false, "stripe"},
                                           Shape{"raid5", "bitmap", 3, 5, false, "linear"},
                                           Shape{"raid5", "ppl", 3, 6, true, "linear"},
                                           Shape{"raid5", "ppl", 3, 8, true, nullptr, true},
                                           Shape{"raid5", "bitmap", 3, 8, true, nullptr, true},
                                           Shape{"mirror", "bitmap", 2, 8, true, nullptr, true}),
                         [](const auto& test) {
                           std::ostringstream os;
                           PrintTo(test.param, &os);
                           return os.str();
                         });

}  // namespace
}  // namespace spillway
