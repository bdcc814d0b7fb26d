// kill -9 of the worker under load: the connection goes on, no request is lost, answered twice or answered with an error,
// and what was answered is there (issue 4; ARCHITECTURE "What survives the daemon").
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "src/export/vhost_user/testing.h"

namespace spillway::vhost {
namespace {

using testing::Client;
constexpr uint64_t kAll = ~uint64_t{0};
constexpr uint64_t kSize = 16 << 20;

struct Holder {
  explicit Holder(unsigned queues) {
    char name[] = "/tmp/spillway-kill-XXXXXX";
    SPILLWAY_ASSERT(::mkdtemp(name) != nullptr);
    dir = name;
    std::ofstream(dir + "/disk");
    std::filesystem::resize_file(dir + "/disk", kSize);
    const std::string disk = dir + "/disk", socket = dir + "/s", pid = dir + "/pid", n = std::to_string(queues);
    const char* argv[] = {VHOST_WORKER, disk.c_str(), socket.c_str(), pid.c_str(), n.c_str(), nullptr};
    SPILLWAY_ASSERT(::posix_spawn(&holder, VHOST_WORKER, nullptr, nullptr, const_cast<char**>(argv), environ) == 0);
  }
  // The worker that serves now; waits for one other than `before`.
  pid_t worker(pid_t before) const {
    for (int i = 0; i < 2000; ++i) {
      pid_t p = 0;
      std::ifstream(dir + "/pid") >> p;
      if (p != 0 && p != before) return p;
      ::usleep(10'000);
    }
    return 0;
  }
  ~Holder() {
    ::kill(holder, SIGTERM);
    int status = 0;
    ::waitpid(holder, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    std::filesystem::remove_all(dir);
  }
  std::string dir;
  pid_t holder = 0;
};

struct Mode {
  const char* name;
  uint64_t features;
  bool inflight;  // the front-end keeps the log
};
class Kill : public ::testing::TestWithParam<Mode> {};
INSTANTIATE_TEST_SUITE_P(all, Kill,
                         ::testing::Values(Mode{"split", kAll & ~virtio::kFeaturePacked, false},
                                           Mode{"split_log", kAll & ~virtio::kFeaturePacked, true},
                                           Mode{"packed", kAll, false}, Mode{"packed_log", kAll, true}),
                         [](const auto& i) { return i.param.name; });

// One block per slot at a time: so each slot's block has one expected content, whatever is resubmitted.
TEST_P(Kill, worker_under_load_no_error_and_nothing_lost) {
  constexpr uint32_t kSlots = 24, kLen = 8192;
  Holder h(2);
  pid_t worker = h.worker(0);
  ASSERT_NE(worker, 0);
  Client c;
  ASSERT_TRUE(c.connect(h.dir + "/s"));
  ASSERT_TRUE(c.start({.features = GetParam().features, .queues = 2, .size = 64, .inflight = GetParam().inflight}));
  struct Slot {
    bool busy = false, write = false;
    uint32_t seed = 0;      // of the block's content, 0 = zeros
    uint64_t sector = 0;
    uint32_t q = 0;
  };
  std::vector<Slot> slots(kSlots);
  std::map<std::pair<uint32_t, uint16_t>, uint32_t> open;  // (queue, id) -> slot
  std::mt19937 g(GetParam().features & 0xff);
  auto content = [](std::byte* p, uint32_t seed) {
    for (uint32_t i = 0; i < kLen; i += 4) {
      const uint32_t v = seed == 0 ? 0 : seed * 2654435761u ^ i;
      std::memcpy(p + i, &v, 4);
    }
  };
  std::vector<std::byte> want(kLen);
  uint32_t next_seed = 1;
  unsigned kills = 0, done = 0;
  constexpr unsigned kKills = 8;
  for (unsigned round = 0; kills < kKills || !open.empty(); ++round) {
    for (uint32_t s = 0; s < kSlots && kills < kKills; ++s) {
      Slot& slot = slots[s];
      if (slot.busy) continue;
      slot.busy = true;
      slot.write = g() % 2;
      slot.sector = uint64_t{s} * 1024;
      slot.q = g() % 2;
      const uint64_t at = c.data(s, kLen);
      if (slot.write) content(c.memory() + at, slot.seed = next_seed++);
      else std::memset(c.memory() + at, 0xa5, kLen);
      open[{slot.q, c.submit(slot.q, s, slot.write ? 1 : 0, slot.sector, at, kLen, g() % 2)}] = s;
    }
    if (round % 40 == 20 && kills < kKills) {
      ASSERT_EQ(::kill(worker, SIGKILL), 0);
      ++kills;
      worker = h.worker(worker);
      ASSERT_NE(worker, 0) << "no successor";
    }
    for (uint32_t q = 0; q < 2; ++q) {
      bool any = false;
      for (auto& [key, s] : open) any |= key.first == q;
      if (!any) continue;
      auto u = c.wait(q);
      ASSERT_TRUE(u) << "a request got lost; kills: " << kills << " done: " << done;
      for (; u; u = c.rings[q].ring.take()) {
        auto it = open.find({q, u->first});
        ASSERT_NE(it, open.end()) << "answered twice";
        Slot& slot = slots[it->second];
        ASSERT_EQ(c.status(it->second), 0);
        if (!slot.write) {
          content(want.data(), slot.seed);
          ASSERT_EQ(std::memcmp(want.data(), c.memory() + c.data(it->second, kLen), kLen), 0);
        }
        slot.busy = false;
        open.erase(it);
        ++done;
      }
    }
  }
  EXPECT_EQ(c.request(0, 4, 0, 0, 0), 0);
  // What the disk holds now is what was last answered.
  std::ifstream disk(h.dir + "/disk", std::ios::binary);
  std::vector<std::byte> got(kLen);
  for (uint32_t s = 0; s < kSlots; ++s) {
    disk.seekg(static_cast<std::streamoff>(slots[s].sector) * 512);
    disk.read(reinterpret_cast<char*>(got.data()), kLen);
    content(want.data(), slots[s].seed);
    ASSERT_EQ(std::memcmp(want.data(), got.data(), kLen), 0) << s;
  }
}

// The worker dies between messages of the handshake, at every point: none is lost, none is answered twice.
TEST(Kill_handshake, every_message_is_answered_once) {
  Holder h(1);
  pid_t worker = h.worker(0);
  ASSERT_NE(worker, 0);
  Client c;
  ASSERT_TRUE(c.connect(h.dir + "/s"));
  auto die = [&] {
    ::kill(worker, SIGKILL);
    worker = h.worker(worker);
  };
  const auto offered = c.get<uint64_t>(Request::kGetFeatures);
  ASSERT_NE(offered, 0u);
  c.features = offered & ~virtio::kFeaturePacked;
  die();
  const auto protocol = c.get<uint64_t>(Request::kGetProtocolFeatures);
  ASSERT_TRUE(c.send(Request::kSetProtocolFeatures, &protocol, 8));
  ASSERT_EQ(c.set(Request::kSetFeatures, c.features), 0);
  die();
  SingleMemRegion region{0, {Client::kGuestBase, Client::kMemory, reinterpret_cast<uint64_t>(c.memory()), 0}};
  ASSERT_EQ(c.set(Request::kAddMemReg, region, {c.memfd_.get()}), 0);
  die();
  c.rings.resize(1);
  ASSERT_TRUE(c.start_ring(0, 16, true));
  die();
  EXPECT_EQ(c.request(0, 1, 0, c.data(0, 512), 512), 0);
  // Sent while nobody is there.
  ::kill(worker, SIGKILL);
  EXPECT_EQ(c.get<uint64_t>(Request::kGetQueueNum), 1u);
  worker = h.worker(worker);
  VringState st{0, 0};
  ASSERT_TRUE(c.send(Request::kGetVringBase, &st, sizeof st));
  auto r = c.reply();
  ASSERT_TRUE(r && r->size() == sizeof st);
  std::memcpy(&st, r->data(), sizeof st);
  EXPECT_EQ(st.num, 1u);
}

}  // namespace
}  // namespace spillway::vhost
