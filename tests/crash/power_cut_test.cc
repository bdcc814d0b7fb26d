// Power-cut sweep (V2): a short load on an array whose disks record everything; then, for every moment of it, states
// that the disks could have been left in are opened again, whole and with one member gone. No block that was
// acknowledged and flushed may be lost or changed, and after recovery the redundancy is consistent.
//
// What may be otherwise: a block that was being written (or written and not flushed) is old or new; on a raid5 that
// lost a member at the same moment, such a block of *that member* may be neither (md's PPL has the same limit), and
// without a log the array refuses to start.
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
  ImageVolume(std::string name, std::vector<std::byte>* bytes)
      : Volume(std::move(name), bytes->size(), Geometry{}), bytes_(*bytes) {}
  std::string_view layer() const override { return "image"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    copy_to_iov(iov, 0, bytes_.data() + offset, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    copy_from_iov(bytes_.data() + offset, iov, 0, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }

 private:
  std::vector<std::byte>& bytes_;
};

constexpr uint64_t kComponent = 128 * kKiB;
constexpr uint64_t kMember = kMiB + kComponent;
constexpr uint64_t kChunk = 16 * kKiB;

struct Shape {
  const char* layer;
  const char* consistency;
  size_t disks;
  int writes;
};
void PrintTo(const Shape& s, std::ostream* os) { *os << s.layer << s.disks << "_" << s.consistency; }

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
  LayerSpec spec(const std::vector<VolumePtr>& members) const {
    LayerSpec s;
    s.name = "vol";
    s.layer = GetParam().layer;
    s.chunk = s.layer == "raid5" ? kChunk : 0;
    s.consistency = GetParam().consistency;
    s.members = members;
    s.rebuild_rate_min = kGiB;
    return s;
  }

  void run(uint64_t seed);
  void check(SimReactor& sim, const Client& client, uint64_t at, std::vector<std::vector<std::byte>>& image, size_t gone);
  uint64_t images = 0, refused = 0, degraded = 0;
};

Task<Status> load(Client* c, int writes, std::mt19937_64* random, uint64_t blocks, uint64_t share_of) {
  // Batches of requests to disjoint parts, a flush now and then beside them.
  size_t next = 0;
  c->writes.reserve(static_cast<size_t>(writes) + 8);
  c->flushes.reserve(static_cast<size_t>(writes) + 8);
  while (next < static_cast<size_t>(writes)) {
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

void PowerCut::check(SimReactor& sim, const Client& client, uint64_t at, std::vector<std::vector<std::byte>>& image,
                     size_t gone) {
  ++images;
  std::vector<VolumePtr> members;
  for (size_t i = 0; i < image.size(); ++i) {
    if (i == gone) {
      members.push_back(nullptr);
      continue;
    }
    members.push_back(std::make_shared<ImageVolume>(fmt::format("d{}", i), &image[i]));
  }
  auto opened = sim.block_on(assemble(spec(members)));
  if (!opened) {
    // Only a raid5 without a log may refuse, and only with a member gone.
    ASSERT_TRUE(gone < image.size() && spec({}).layer == "raid5" && spec({}).consistency != "ppl")
        << opened.error().message() << " at " << at;
    ASSERT_EQ(opened.error().kind(), ErrorKind::kDegraded) << opened.error().message();
    ++refused;
    return;
  }
  if (gone < image.size()) ++degraded;
  Volume& v = **opened;
  const uint64_t row = kChunk * (image.size() - 1);
  for (int pass = 0; pass < 2; ++pass) {
    auto all = sim.block_on(read_bytes(v, 0, v.size()));
    ASSERT_TRUE(all) << all.error().message();
    for (uint64_t b = 0; b < v.size() / kBlock; ++b) {
      bool settled = true;
      const auto ok = client.acceptable(b, at, &settled);
      if (!settled && gone < image.size() && spec({}).layer == "raid5") {
        const uint64_t r = b * kBlock / row, d = b * kBlock % row / kChunk;
        if (md::data_disk(md::Raid5Layout::kLeftSymmetric, static_cast<uint32_t>(image.size()), r, static_cast<uint32_t>(d)) == gone)
          continue;  // in flight on the member that is gone
      }
      uint64_t write, block;
      std::memcpy(&write, all->data() + b * kBlock, 8);
      std::memcpy(&block, all->data() + b * kBlock + 8, 8);
      std::byte expected[kBlock];
      fill(expected, write, b);
      ASSERT_TRUE(ok.count(write) != 0 && block == b && std::memcmp(expected, all->data() + b * kBlock, kBlock) == 0)
          << "cut at " << at << ", member gone " << gone << ", pass " << pass << ": block " << b << " shows write " << write
          << " of block " << block << ", allowed begin with " << *ok.begin();
    }
    sim.block_on(array_control(v)->wait_idle());
  }
  if (gone >= image.size()) {
    ASSERT_TRUE(sim.block_on(array_control(v)->start_scrub(ArrayControl::Scrub::kCheck)));
    sim.block_on(array_control(v)->wait_idle());
    ASSERT_EQ(array_status(v).mismatch_blocks, 0u) << "cut at " << at;
  }
  ASSERT_TRUE(sim.block_on(v.close()));
}

void PowerCut::run(uint64_t seed) {
  const Shape& setup = GetParam();
  SimReactor sim(seed);
  Trace trace(seed);
  std::mt19937_64 random(seed * 7919);
  std::vector<VolumePtr> members;
  std::vector<std::shared_ptr<RecordingVolume>> disks;
  for (size_t i = 0; i < setup.disks; ++i) {
    disks.push_back(std::make_shared<RecordingVolume>(fmt::format("d{}", i), kMember, i, &trace));
    members.push_back(disks.back());
  }
  CreateOptions create;
  create.assume_clean = true;
  auto plan = sim.block_on(create_array(spec(members), create));
  ASSERT_TRUE(plan) << plan.error().message();
  VolumePtr v = sim.block_on(assemble(spec(members))).value();
  ASSERT_TRUE(sim.block_on(fill_volume(v.get())));
  ASSERT_TRUE(sim.block_on(v->close()));
  v.reset();
  std::vector<std::vector<std::byte>> base;
  for (auto& d : disks) base.push_back(d->bytes());

  trace.recording = true;
  Client client{&trace, nullptr, {}, {}};
  v = sim.block_on(assemble(spec(members))).value();
  client.volume = v.get();
  Status s = sim.block_on(load(&client, setup.writes, &random, v->size() / kBlock, 4));
  ASSERT_TRUE(s) << s.error().message();
  // Long enough for the bitmap's daemon and the mark of a clean array, then a little more load over it.
  auto pause = []() -> Task<void> { co_await Reactor::current().sleep_for(16'000'000'000ull); };
  sim.block_on(pause());
  client.writes.push_back(ClientWrite{3, 5, false, 0, UINT64_MAX});
  ASSERT_TRUE(sim.block_on(client.write(client.writes.size() - 1)));
  ASSERT_TRUE(sim.block_on(v->close()));
  v.reset();
  trace.recording = false;

  std::vector<std::vector<std::byte>> image;
  for (uint64_t at = 1; at <= trace.clock && !HasFatalFailure(); ++at) {
    const Cut cut(trace, at, setup.disks);
    // All combinations for a few writes in the air, samples beyond; torn ones among them.
    const bool all = cut.possible() <= 3;
    const uint64_t n = all ? 1ull << cut.possible() : 5;
    for (uint64_t k = 0; k < n && !HasFatalFailure(); ++k) {
      cut.image(
          base, &image,
          [&](size_t i) -> int {
            if (all) return static_cast<int>(k >> i & 1);
            if (k == 0) return 0;
            if (k == 1) return 1;
            return static_cast<int>(random() % 3);
          },
          random);
      check(sim, client, at, image, random() % 2 == 0 ? SIZE_MAX : random() % setup.disks);
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
  std::printf("  %s%zu %s: %llu states opened, %llu of them degraded, %llu refused\n", GetParam().layer, GetParam().disks,
              GetParam().consistency, static_cast<unsigned long long>(images), static_cast<unsigned long long>(degraded),
              static_cast<unsigned long long>(refused));
  EXPECT_GT(images, 100u);
}

INSTANTIATE_TEST_SUITE_P(Arrays, PowerCut,
                         ::testing::Values(Shape{"mirror", "bitmap", 2, 20}, Shape{"mirror", "resync", 3, 15},
                                           Shape{"raid5", "ppl", 4, 20}, Shape{"raid5", "ppl", 3, 20},
                                           Shape{"raid5", "bitmap", 4, 15}, Shape{"raid5", "resync", 3, 12}),
                         [](const auto& test) {
                           std::ostringstream os;
                           PrintTo(test.param, &os);
                           return os.str();
                         });

}  // namespace
}  // namespace spillway
