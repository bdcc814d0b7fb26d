#include "src/export/vhost_user/vhost_user.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <random>
#include <thread>

#include "src/export/vhost_user/testing.h"
#include "src/volume/memory/memory.h"

namespace spillway::vhost {
namespace {

using testing::Client;
using testing::Piece;

constexpr uint64_t kSize = 16 * kMiB;
constexpr uint64_t kAll = ~uint64_t{0};

std::string temp_dir() {
  char name[] = "/tmp/spillway-vhost-XXXXXX";
  SPILLWAY_ASSERT(::mkdtemp(name) != nullptr);
  return name;
}

// A served memory volume.
struct Server {
  explicit Server(uint32_t queues = 2, FdStore* store = nullptr, VolumePtr v = nullptr, size_t reactors = 2,
                  std::string reuse_dir = {})
      : dir(reuse_dir.empty() ? temp_dir() : reuse_dir), own_dir(reuse_dir.empty()) {
    pool = std::move(*ReactorPool::start(std::vector<int>(reactors, -1)));
    main = std::move(*UringReactor::create(64));
    volume = v != nullptr ? v : *make_memory("m", kSize);
    o.name = "t";
    o.volume = volume;
    o.socket = dir + "/s";
    o.queues = queues;
    o.store = store;
    o.reactors = pool.get();
    o.blocking = &blocking;
  }
  bool start() {
    auto r = start_vhost_user(o);
    if (!r) ADD_FAILURE() << r.error().message();
    else e = std::move(*r);
    return e != nullptr;
  }
  void stop(bool keep = false) {
    if (e) main->block_on(e->stop(keep));
    e.reset();
  }
  ~Server() {
    stop();
    if (own_dir) std::filesystem::remove_all(dir);
  }
  std::string dir;
  bool own_dir;
  std::unique_ptr<UringReactor> main;  // outlives the pool, which posts to it
  std::unique_ptr<ReactorPool> pool;
  BlockingPool blocking{1};             // ends before the reactors that it posts to
  VolumePtr volume;
  ExportOptions o;
  std::unique_ptr<Export> e;
};

void fill(std::byte* p, size_t n, uint32_t seed) {
  std::mt19937 g(seed);
  for (size_t i = 0; i < n; ++i) p[i] = static_cast<std::byte>(g());
}

struct Ring {
  const char* name;
  uint64_t features;
};
const Ring kRings[] = {
    {"split", kAll & ~virtio::kFeaturePacked & ~virtio::kFeatureEventIdx},
    {"split_event_idx", kAll & ~virtio::kFeaturePacked},
    {"packed", kAll & ~virtio::kFeatureEventIdx},
    {"packed_event_idx", kAll},
};

class VhostUser_ring : public ::testing::TestWithParam<Ring> {};
INSTANTIATE_TEST_SUITE_P(all, VhostUser_ring, ::testing::ValuesIn(kRings),
                         [](const auto& i) { return i.param.name; });

TEST_P(VhostUser_ring, reads_back_what_was_written_many_laps) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({.features = GetParam().features, .queues = 2, .size = 16}));
  std::vector<std::byte> model(kSize);
  std::mt19937 g(1);
  for (int i = 0; i < 500; ++i) {
    const uint32_t q = g() % 2, len = 512 * (1 + g() % 64);
    const uint64_t sector = g() % ((kSize - len) / 512);
    const uint64_t at = c.data(0, len);
    const bool indirect = g() % 2;
    if (g() % 2) {
      fill(c.memory() + at, len, g());
      std::memcpy(model.data() + sector * 512, c.memory() + at, len);
      ASSERT_EQ(c.request(q, 1, sector, at, len, indirect), 0);
    } else {
      ASSERT_EQ(c.request(q, 0, sector, at, len, indirect), 0);
      ASSERT_EQ(std::memcmp(model.data() + sector * 512, c.memory() + at, len), 0) << i;
    }
  }
  EXPECT_EQ(c.request(0, 4, 0, 0, 0), 0);
  EXPECT_EQ(s.e->stats().errors, 0u);
  EXPECT_EQ(s.e->stats().flushes, 1u);
}

TEST_P(VhostUser_ring, full_queue_completes_every_request_once) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({.features = GetParam().features, .size = 64}));
  std::mt19937 g(2);
  int submitted = 0, done = 0;
  std::vector<int> open(64, -1);
  while (done < 3000) {
    for (uint32_t slot = 0; slot < 20 && submitted < 3000; ++slot) {
      if (std::count_if(open.begin(), open.end(), [&](int o) { return o == static_cast<int>(slot); })) continue;
      const uint16_t id = c.submit(0, slot, g() % 2, g() % 1024, c.data(slot, 4096), 4096);
      ASSERT_EQ(open[id], -1);
      open[id] = static_cast<int>(slot);
      ++submitted;
    }
    auto u = c.wait(0);
    ASSERT_TRUE(u);
    ASSERT_GE(open[u->first], 0);
    EXPECT_EQ(c.status(static_cast<uint32_t>(open[u->first])), 0);
    open[u->first] = -1;
    ++done;
  }
  EXPECT_EQ(s.e->stats().reads + s.e->stats().writes, 3000u);
}

TEST(VhostUser_requests, bad_ones_fail_alone) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  EXPECT_EQ(c.request(0, 0, kSize / 512, c.data(0, 512), 512), 1);          // beyond the end
  EXPECT_EQ(c.request(0, 0, kSize / 512 - 1, c.data(0, 1024), 1024), 1);    // across the end
  EXPECT_EQ(c.request(0, 0, UINT64_MAX, c.data(0, 512), 512), 1);
  EXPECT_EQ(c.request(0, 1, 0, c.data(0, 512), 100), 1);                    // not whole sectors
  EXPECT_EQ(c.request(0, 77, 0, c.data(0, 512), 512), 2);                   // unknown type
  EXPECT_EQ(c.request(0, 0, 0, Client::kMemory + 4096, 512), 1);            // outside of guest memory
  EXPECT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);                    // the ring goes on
  EXPECT_EQ(c.request(0, 8, 0, c.data(0, 512), 20), 0);
  EXPECT_STREQ(reinterpret_cast<char*>(c.memory() + c.data(0, 512)), "t");
  EXPECT_EQ(s.e->stats().errors, 6u);
}

TEST(VhostUser_requests, write_zeroes_and_discard) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  const uint64_t at = c.data(0, 4096);
  std::memset(c.memory() + at, 7, 4096);
  ASSERT_EQ(c.request(0, 1, 8, at, 4096), 0);
  struct { uint64_t sector; uint32_t n, flags; } range[2] = {{8, 4, 0}, {14, 1, 1}};
  const uint64_t seg = c.data(5, 4096);
  std::memcpy(c.memory() + seg, range, 32);
  EXPECT_EQ(c.request(0, 13, 0, seg, 32), 0);
  ASSERT_EQ(c.request(0, 0, 8, at, 4096), 0);
  for (int i = 0; i < 4096; ++i) {
    const int sector = 8 + i / 512;
    ASSERT_EQ(static_cast<int>(c.memory()[at + i]), sector < 12 || sector == 14 ? 0 : 7) << i;
  }
  range[0].flags = 2;
  std::memcpy(c.memory() + seg, range, 32);
  EXPECT_EQ(c.request(0, 13, 0, seg, 16), 2);  // unknown flag
  range[0] = {kSize / 512 - 1, 2, 0};
  std::memcpy(c.memory() + seg, range, 32);
  EXPECT_EQ(c.request(0, 13, 0, seg, 16), 1);  // across the end
  EXPECT_EQ(c.request(0, 13, 0, seg, 15), 1);  // no whole segment
}

TEST(VhostUser_config, any_size_zero_padded_and_wce_live) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  for (uint32_t size : {0u, 8u, 60u, 256u, 4000u}) {
    std::string payload(sizeof(ConfigHead) + size, '\xff');
    ConfigHead h{0, size, 0};
    std::memcpy(payload.data(), &h, sizeof h);
    ASSERT_TRUE(c.send(Request::kGetConfig, payload.data(), static_cast<uint32_t>(payload.size())));
    auto r = c.reply();
    ASSERT_TRUE(r && r->size() == payload.size());
    if (size >= 8) {
      uint64_t capacity;
      std::memcpy(&capacity, r->data() + sizeof h, 8);
      EXPECT_EQ(capacity, kSize / 512);
    }
    if (size > 60) {
      EXPECT_EQ(r->find_first_not_of('\0', sizeof h + 60), std::string::npos);
    }
  }
  struct __attribute__((packed)) { ConfigHead h; uint8_t wce; } off{{32, 1, 0}, 0}, bad{{0, 1, 0}, 0};
  EXPECT_EQ(c.set(Request::kSetConfig, off), 0);
  EXPECT_EQ(c.set(Request::kSetConfig, bad), 1);  // refused, and the connection goes on
  EXPECT_EQ(c.request(0, 1, 0, c.data(0, 512), 512), 0);
}

uint8_t write_cache_field(Client& c) {
  ConfigHead h[8] = {{virtio::kBlkConfigWceOffset, 1, 0}};
  if (!c.send(Request::kGetConfig, h, sizeof h[0] + 1)) return 0xff;
  auto r = c.reply();
  return r && r->size() == sizeof h[0] + 1 ? static_cast<uint8_t>(r->back()) : uint8_t{0xff};
}

// QEMU resets the device for `stop` and connects anew after a loss, and does not set the field again; the guest still believes
// in what it set and would never flush.
TEST(VhostUser_config, write_through_outlives_resets_and_a_reconnection_with_the_log) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  EXPECT_EQ(write_cache_field(c), 1);
  struct __attribute__((packed)) { ConfigHead h; uint8_t wce; } off{{32, 1, 0}, 0}, on{{32, 1, 0}, 1};
  ASSERT_EQ(c.set(Request::kSetConfig, off), 0);
  ASSERT_EQ(c.set(Request::kSetStatus, uint64_t{0}), 0);
  EXPECT_EQ(write_cache_field(c), 0);
  ASSERT_EQ(c.set(Request::kResetDevice, uint64_t{0}), 0);
  EXPECT_EQ(write_cache_field(c), 0);
  c.disconnect();
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));  // brings its log back
  EXPECT_EQ(write_cache_field(c), 0);
  ASSERT_EQ(c.set(Request::kSetConfig, on), 0);
  c.disconnect();
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  EXPECT_EQ(write_cache_field(c), 1);
  ASSERT_EQ(c.set(Request::kSetConfig, off), 0);
  Client other;  // another machine's: a new log
  c.disconnect();
  ASSERT_TRUE(other.connect(s.o.socket));
  ASSERT_TRUE(other.start({}));
  EXPECT_EQ(write_cache_field(other), 1);
}

TEST(VhostUser_requests, large_ones_are_served_in_pieces) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  constexpr uint32_t kLen = 10 * 1024 * 1024 + 512;
  const uint64_t at = c.data(0, 4096);
  fill(c.memory() + at, kLen, 5);
  ASSERT_EQ(c.request(0, 1, 3, at, kLen), 0);
  std::memset(c.memory() + at, 0, kLen);
  ASSERT_EQ(c.request(0, 0, 3, at, kLen), 0);
  std::vector<std::byte> want(kLen);
  fill(want.data(), kLen, 5);
  EXPECT_EQ(std::memcmp(want.data(), c.memory() + at, kLen), 0);
}

TEST(VhostUser_refusals, logging_and_postcopy_are_refused_cleanly) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  EXPECT_EQ(c.set(Request::kSetLogBase, uint64_t{0}), 1);
  EXPECT_EQ(c.set(Request::kPostcopyAdvise, uint64_t{0}), 1);
  EXPECT_EQ(c.set(static_cast<Request>(99), uint64_t{0}), 1);
  EXPECT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
}

TEST(VhostUser_ring_base, goes_on_where_it_stopped) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  for (uint64_t features : {kAll & ~virtio::kFeaturePacked, kAll}) {
    SCOPED_TRACE(features);
    ASSERT_TRUE(c.connect(s.o.socket));
    c.inflight_fd.reset();
    ASSERT_TRUE(c.start({.features = features, .size = 16}));
    for (int i = 0; i < 21; ++i) ASSERT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
    VringState st{0, 0};
    ASSERT_TRUE(c.send(Request::kGetVringBase, &st, sizeof st));
    auto r = c.reply();
    ASSERT_TRUE(r && r->size() == sizeof st);
    std::memcpy(&st, r->data(), sizeof st);
    if (features != kAll) {
      EXPECT_EQ(st.num, 21u);
    }
    ASSERT_TRUE(c.start_ring(0, 16, false, st.num));
    for (int i = 0; i < 21; ++i) ASSERT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
    c.disconnect();
  }
}

// B1: the set of reactors changes under load; queues are handed over, no request is lost, answered twice or with an error.
TEST_P(VhostUser_ring, queues_change_their_reactors_under_load) {
  auto reactor = std::move(*UringReactor::create(64));  // outlives the pool, which posts to it
  Server s(2, nullptr, nullptr, 3);
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({.features = GetParam().features, .queues = 2, .size = 64}));
  std::atomic<bool> stop{false};
  std::thread changes([&] {
    for (uint32_t n = 0; !stop.load(); ++n) ASSERT_TRUE(reactor->block_on(s.e->spread(1 + n % 3)));
    ASSERT_FALSE(reactor->block_on(s.e->spread(4)));
  });
  std::mt19937 g(3);
  std::vector<std::byte> want(4096);
  for (int i = 0; i < 600; ++i) {
    for (uint32_t q = 0; q < 2; ++q) {
      fill(c.memory() + c.data(q, 4096), 4096, static_cast<uint32_t>(i) * 2 + q);
      c.submit(q, q, 1, q * 8, c.data(q, 4096), 4096);
    }
    for (uint32_t q = 0; q < 2; ++q) {
      auto u = c.wait(q);
      ASSERT_TRUE(u) << i;
      ASSERT_EQ(c.status(q), 0);
      ASSERT_FALSE(c.rings[q].ring.take()) << "answered twice";
    }
    for (uint32_t q = 0; q < 2; ++q) {
      fill(want.data(), 4096, static_cast<uint32_t>(i) * 2 + q);
      ASSERT_EQ(c.request(q, 0, q * 8, c.data(q, 4096), 4096), 0);
      ASSERT_EQ(std::memcmp(want.data(), c.memory() + c.data(q, 4096), 4096), 0) << i;
    }
  }
  stop = true;
  changes.join();
  EXPECT_EQ(s.e->stats().errors, 0u);
}

// QEMU's `stop` and `cont`: both rings are stopped, then everything is said again.
TEST_P(VhostUser_ring, stop_and_start_of_the_machine) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  const Client::Setup setup{.features = GetParam().features, .queues = 2, .size = 16};
  ASSERT_TRUE(c.start(setup));
  for (int round = 0; round < 4; ++round) {
    SCOPED_TRACE(round);
    for (int i = 0; i < 21; ++i) ASSERT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
    for (int i = 0; i < 3 * round; ++i) ASSERT_EQ(c.request(1, 0, 0, c.data(0, 512), 512), 0);
    VringState base[2];
    if (round % 2 == 1) {
      ASSERT_EQ(c.set(Request::kSetStatus, uint64_t{0}), 0);  // as QEMU 7.2 does it; later ones after this
    }
    for (uint32_t q = 0; q < 2; ++q) {
      base[q] = {q, 0};
      ASSERT_TRUE(c.send(Request::kGetVringBase, &base[q], sizeof base[q]));
      auto r = c.reply();
      ASSERT_TRUE(r && r->size() == sizeof base[q]);
      std::memcpy(&base[q], r->data(), sizeof base[q]);
    }
    ASSERT_EQ(c.set(Request::kSetFeatures, c.features), 0);
    ASSERT_TRUE(c.share_inflight(setup));
    struct { uint32_t count, padding; MemRegion r; } table{
        1, 0, {Client::kGuestBase, Client::kMemory, reinterpret_cast<uint64_t>(c.memory()), 0}};
    ASSERT_EQ(c.set(Request::kSetMemTable, table, {c.memfd_.get()}), 0);
    for (uint32_t q = 0; q < 2; ++q) ASSERT_TRUE(c.start_ring(q, 16, false, base[q].num));
    for (uint32_t q = 0; q < 2; ++q) EXPECT_FALSE(c.rings[q].ring.take()) << "an answer to nothing";
  }
}

// As QEMU does when the back-end was lost: a split ring's base is its used index, a packed ring's what it was in the beginning.
TEST_P(VhostUser_ring, new_connection_with_the_log_goes_on_whatever_base_it_says) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  const Client::Setup setup{.features = GetParam().features, .size = 16};
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start(setup));
  for (int round = 0; round < 5; ++round) {
    for (int i = 0; i < 11; ++i) ASSERT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0) << round;
    c.disconnect();
    // Made while nobody serves.
    c.submit(0, 5, 0, 0, c.data(5, 512), 512);
    ASSERT_TRUE(c.connect(s.o.socket));
    ASSERT_TRUE(c.shake_hands(setup));
    const bool packed = (c.features & virtio::kFeaturePacked) != 0;
    const uint32_t base = packed ? 0x80008000u : c.rings[0].ring.load16(c.rings[0].ring.device_at + 2);
    ASSERT_TRUE(c.start_ring(0, 16, false, base));
    ASSERT_TRUE(c.wait(0)) << round;
    EXPECT_EQ(c.status(5), 0);
  }
}

TEST(VhostUser_socket, stale_is_replaced_live_is_an_error_and_other_files_stay) {
  Server s;
  {
    Fd stale(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    std::strcpy(a.sun_path, s.o.socket.c_str());
    ASSERT_EQ(::bind(stale.get(), reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
  }
  ASSERT_TRUE(s.start());
  auto second = start_vhost_user(s.o);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().kind(), ErrorKind::kBusy);
  s.stop();
  EXPECT_FALSE(std::filesystem::exists(s.o.socket));
  ::close(::creat(s.o.socket.c_str(), 0600));
  auto third = start_vhost_user(s.o);
  ASSERT_FALSE(third);
  EXPECT_EQ(third.error().kind(), ErrorKind::kExists);
  EXPECT_TRUE(std::filesystem::exists(s.o.socket));
}

TEST(VhostUser_reconnect, next_front_end_is_served) {
  Server s;
  ASSERT_TRUE(s.start());
  for (int i = 0; i < 5; ++i) {
    Client c;
    ASSERT_TRUE(c.connect(s.o.socket));
    ASSERT_TRUE(c.start({.queues = 2}));
    ASSERT_EQ(c.request(1, 1, 0, c.data(0, 512), 512), 0);
  }
  EXPECT_EQ(s.e->stats().protocol_errors, 0u);
}

TEST(VhostUser_resize, reaches_the_front_end_by_the_backend_channel) {
  Server s;
  ASSERT_TRUE(s.start());
  Client c;
  ASSERT_TRUE(c.connect(s.o.socket));
  ASSERT_TRUE(c.start({}));
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  Fd mine(pair[0]), theirs(pair[1]);
  ASSERT_TRUE(c.send(Request::kSetBackendReqFd, nullptr, 0, {theirs.get()}, kVersion | kFlagNeedReply));
  ASSERT_TRUE(c.reply());
  ASSERT_TRUE(s.main->block_on(s.volume->resize(2 * kSize)));
  pollfd p{mine.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&p, 1, 20'000), 1);
  Header h;
  ASSERT_EQ(::read(mine.get(), &h, sizeof h), static_cast<ssize_t>(sizeof h));
  EXPECT_EQ(h.request, kBackendConfigChange);
  EXPECT_EQ(c.request(0, 0, kSize / 512 + 8, c.data(0, 512), 512), 0);
}

// ---- survival ------------------------------------------------------------------------------------------------------

TEST_P(VhostUser_ring, hand_over_keeps_the_connection) {
  MemoryFdStore store;
  auto volume = *make_memory("m", kSize);
  const std::string dir = temp_dir();
  Client c;
  for (int round = 0; round < 8; ++round) {
    // Made while nobody serves.
    if (round > 0) c.submit(0, 3, 0, 0, c.data(3, 4096), 4096);
    Server s(2, &store, volume, 1 + round % 3, dir);
    ASSERT_TRUE(s.start());
    if (round == 0) {
      ASSERT_TRUE(c.connect(s.o.socket));
      ASSERT_TRUE(c.start({.features = GetParam().features, .queues = 2, .size = 16, .inflight = false}));
    } else {
      ASSERT_TRUE(c.wait(0));
      EXPECT_EQ(c.status(3), 0);
    }
    for (int i = 0; i < 37; ++i) {
      const uint64_t at = c.data(0, 4096);
      fill(c.memory() + at, 4096, static_cast<uint32_t>(i));
      ASSERT_EQ(c.request(i % 2, 1, static_cast<uint64_t>(i) * 8, at, 4096), 0);
      fill(c.memory() + at, 4096, 999);
      ASSERT_EQ(c.request(1 - i % 2, 0, static_cast<uint64_t>(i) * 8, at, 4096), 0);
    }
    s.stop(true);
  }
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace spillway::vhost
