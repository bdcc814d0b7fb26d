// A client that breaks rules ends its own connection with one reason; the export and its neighbours go on (issues 2, 4).
#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <thread>

#include "src/export/vhost_user/testing.h"
#include "src/export/vhost_user/vhost_user.h"
#include "src/volume/memory/memory.h"

namespace spillway::vhost {
namespace {

using testing::Client;
constexpr uint64_t kAll = ~uint64_t{0};
constexpr uint64_t kSplit = kAll & ~virtio::kFeaturePacked;

// Two exports on the same reactors: the victim's neighbour must never notice.
struct Hostile : ::testing::Test {
  void SetUp() override {
    char name[] = "/tmp/spillway-hostile-XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir = name;
    pool = std::move(*ReactorPool::start({-1, -1}));
    main = std::move(*UringReactor::create(64));
    for (int i = 0; i < 2; ++i) {
      ExportOptions o;
      o.name = i == 0 ? "bad" : "good";
      o.volume = *make_memory("m", 16 << 20);
      o.socket = dir + "/" + o.name;
      o.queues = 2;
      o.reactors = pool.get();
      o.blocking = blocking.get();
      exports.push_back(std::move(*start_vhost_user(o)));
    }
    ASSERT_TRUE(good.connect(dir + "/good"));
    ASSERT_TRUE(good.start({.queues = 2}));
  }
  void TearDown() override {
    EXPECT_EQ(good.request(0, 1, 0, good.data(0, 4096), 4096), 0);
    EXPECT_EQ(good.request(1, 0, 0, good.data(0, 4096), 4096), 0);
    EXPECT_EQ(exports[1]->stats().protocol_errors, 0u);
    // The export listens again.
    Client c;
    EXPECT_TRUE(c.connect(dir + "/bad"));
    EXPECT_TRUE(c.start({}));
    EXPECT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
    c.disconnect();
    for (auto& e : exports) main->block_on(e->stop(false));
    exports.clear();
    blocking.reset();
    pool.reset();
    std::filesystem::remove_all(dir);
  }
  std::string dir;
  std::unique_ptr<UringReactor> main;  // outlives the pool, which posts to it
  std::unique_ptr<ReactorPool> pool;
  std::unique_ptr<BlockingPool> blocking = std::make_unique<BlockingPool>(1);
  std::vector<std::unique_ptr<Export>> exports;
  Client good;
};

TEST_F(Hostile, nonsense_messages_end_the_connection) {
  std::mt19937 g(7);
  uint64_t ended = 0;
  for (int i = 0; i < 60; ++i) {
    Client c;
    ASSERT_TRUE(c.connect(dir + "/bad"));
    if (i % 3 == 0) {
      std::string junk(1 + g() % 200, '\0');
      for (auto& ch : junk) ch = static_cast<char>(g());
      c.send_raw(junk.data(), junk.size());
      ::shutdown(c.socket_.get(), SHUT_WR);
    } else {
      // A well-formed header and a payload of noise, for every request in turn, with and without descriptors.
      std::string payload(g() % 64, '\0');
      for (auto& ch : payload) ch = static_cast<char>(g() % 4);
      std::vector<int> fds;
      if (g() % 2) fds.push_back(c.memfd_.get());
      c.send(static_cast<Request>(1 + i % 45), payload.data(), static_cast<uint32_t>(payload.size()), fds,
             kVersion | (g() % 2 ? kFlagNeedReply : 0));
      ::shutdown(c.socket_.get(), SHUT_WR);
    }
    EXPECT_TRUE(c.closed()) << i;
    ++ended;
  }
  EXPECT_EQ(ended, 60u);
}

TEST_F(Hostile, message_in_single_bytes_is_understood) {
  Client c;
  ASSERT_TRUE(c.connect(dir + "/bad"));
  Header h{static_cast<uint32_t>(Request::kGetFeatures), kVersion, 0};
  for (size_t i = 0; i < sizeof h; ++i)
    ASSERT_TRUE(c.send_raw(reinterpret_cast<char*>(&h) + i, 1));
  auto r = c.reply();
  ASSERT_TRUE(r && r->size() == 8);
  ASSERT_TRUE(c.start({}));
}

struct Corrupt {
  const char* name;
  std::function<void(Client&)> make;
};

TEST_F(Hostile, broken_rings_end_the_connection) {
  const uint64_t head = Client::kBuffers;
  auto d = [](Client& c, uint16_t i) { return c.rings[0].ring.desc_at + 16u * i; };
  const uint64_t gpa = Client::kGuestBase;
  const std::vector<Corrupt> cases = {
      {"head out of range", [](Client& c) { c.rings[0].ring.offer(64); }},
      {"head far out of range", [](Client& c) { c.rings[0].ring.offer(0xffff); }},
      {"next out of range", [&](Client& c) {
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescNext, 64);
         c.rings[0].ring.offer(0);
       }},
      {"loop", [&](Client& c) {
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescNext, 1);
         c.rings[0].ring.put_desc(d(c, 1), gpa + head, 16, virtio::kDescNext, 0);
         c.rings[0].ring.offer(0);
       }},
      {"loop of one", [&](Client& c) {
         c.rings[0].ring.put_desc(d(c, 3), gpa + head, 16, virtio::kDescNext | virtio::kDescWrite, 3);
         c.rings[0].ring.offer(3);
       }},
      {"readable after writable", [&](Client& c) {
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescNext | virtio::kDescWrite, 1);
         c.rings[0].ring.put_desc(d(c, 1), gpa + head, 16, 0, 0);
         c.rings[0].ring.offer(0);
       }},
      {"indirect of odd length", [&](Client& c) {
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 17, virtio::kDescIndirect, 0);
         c.rings[0].ring.offer(0);
       }},
      {"indirect in indirect", [&](Client& c) {
         c.rings[0].ring.put_desc(head, gpa + head, 16, virtio::kDescIndirect, 0);
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescIndirect, 0);
         c.rings[0].ring.offer(0);
       }},
      {"indirect loop", [&](Client& c) {
         c.rings[0].ring.put_desc(head, gpa + head, 16, virtio::kDescNext, 0);
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescIndirect, 0);
         c.rings[0].ring.offer(0);
       }},
      {"avail index jumps", [](Client& c) { c.rings[0].ring.store16(c.rings[0].ring.driver_at + 2, 1000); }},
      {"one head twice", [&](Client& c) {
         // A chain of its own length zero data: both offered before the device looks.
         c.rings[0].ring.put_desc(d(c, 0), gpa + head, 16, virtio::kDescNext, 200);
         c.rings[0].ring.offer(0);
         c.rings[0].ring.offer(0);
       }},
  };
  uint64_t errors = exports[0]->stats().protocol_errors;
  for (const auto& k : cases) {
    SCOPED_TRACE(k.name);
    Client c;
    ASSERT_TRUE(c.connect(dir + "/bad"));
    ASSERT_TRUE(c.start({.features = kSplit}));
    ASSERT_EQ(c.request(0, 0, 0, c.data(0, 512), 512), 0);
    k.make(c);
    c.kick(0);
    EXPECT_TRUE(c.closed());
    // Counted after the connection is closed on this side as well.
    Client next;
    ASSERT_TRUE(next.connect(dir + "/bad"));
    ASSERT_NE(next.get<uint64_t>(Request::kGetFeatures), 0u);
    EXPECT_EQ(exports[0]->stats().protocol_errors, ++errors);
  }
}

TEST_F(Hostile, broken_packed_rings_end_the_connection) {
  const uint64_t gpa = Client::kGuestBase + Client::kBuffers;
  for (int k = 0; k < 3; ++k) {
    SCOPED_TRACE(k);
    Client c;
    ASSERT_TRUE(c.connect(dir + "/bad"));
    ASSERT_TRUE(c.start({.features = kAll, .size = 16}));
    auto& r = c.rings[0].ring;
    for (uint16_t i = 0; i < 16; ++i) {
      const uint16_t flags = k == 0 ? virtio::kDescNext : k == 1 ? virtio::kDescIndirect : virtio::kDescWrite | virtio::kDescNext;
      r.put_desc(r.desc_at + 16u * i, gpa, k == 1 ? 7 : 16, i, 0);
      r.store16(r.desc_at + 16u * i + 14,
                static_cast<uint16_t>(virtio::kDescAvail | (k == 2 && i == 1 ? virtio::kDescNext : flags)));
    }
    c.kick(0);
    EXPECT_TRUE(c.closed());
  }
}

// Descriptors, heads and data change all the time while requests are made: anything may be answered, nothing may break but
// this connection.
TEST_F(Hostile, memory_rewritten_while_it_is_processed) {
  for (uint64_t features : {kSplit, kAll}) {
    for (int round = 0; round < 6; ++round) {
      Client c;
      ASSERT_TRUE(c.connect(dir + "/bad"));
      ASSERT_TRUE(c.start({.features = features, .size = 32}));
      std::atomic<bool> stop{false};
      // A mapping of its own, as another process would have.
      auto* memory = static_cast<volatile uint8_t*>(::mmap(nullptr, Client::kMemory, PROT_READ | PROT_WRITE, MAP_SHARED,
                                                           c.memfd_.get(), 0));
      ASSERT_NE(memory, MAP_FAILED);
      std::thread scribbler([&] {
        std::mt19937 g(static_cast<unsigned>(round));
        auto& r = c.rings[0].ring;
        while (!stop.load()) {
          const uint64_t at = g() % 4 == 0 ? r.desc_at + g() % (16 * 32) : Client::kBuffers + g() % 8192;
          memory[at] = static_cast<uint8_t>(g());
        }
      });
      std::mt19937 g(static_cast<unsigned>(round) + 100);
      for (int i = 0; i < 400 && c.rings[0].ring.free_slots() > 8; ++i) {
        c.submit(0, static_cast<uint32_t>(i % 20), g() % 2, g() % 64, c.data(0, 4096), 4096, g() % 2);
        c.kick(0);
        if (i % 4 == 3) {
          // The ids in used elements may be anything by now: only drain through a fresh look at the index.
          pollfd p{c.rings[0].call.get(), POLLIN, 0};
          ::poll(&p, 1, 1);
        }
      }
      stop = true;
      scribbler.join();
      ::munmap(const_cast<uint8_t*>(memory), Client::kMemory);
      c.disconnect();
    }
  }
}

TEST_F(Hostile, memory_cut_short_ends_the_connection_only) {
  Client c;
  ASSERT_TRUE(c.connect(dir + "/bad"));
  ASSERT_TRUE(c.start({.features = kSplit}));
  c.submit(0, 0, 0, 0, c.data(0, 4096), 4096);
  ASSERT_TRUE(c.wait(0));
  c.submit(0, 0, 0, 0, Client::kMemory - 4096, 4096);  // lies in what will be cut off
  ASSERT_TRUE(c.wait(0));
  ASSERT_EQ(::ftruncate(c.memfd_.get(), 4 << 20), 0);
  // The ring itself is still there, the buffer is not.
  c.submit(0, 0, 0, 0, Client::kMemory - 4096, 4096);
  c.kick(0);
  c.send(Request::kGetFeatures, nullptr, 0);  // or refused: the connection may be gone by now
  EXPECT_TRUE(c.closed());
}

TEST_F(Hostile, fewer_bytes_than_the_region_says_is_refused) {
  Client c;
  ASSERT_TRUE(c.connect(dir + "/bad"));
  SingleMemRegion region{0, {0, Client::kMemory * 2, 0x1000, 0}};
  ASSERT_TRUE(c.send(Request::kAddMemReg, &region, sizeof region, {c.memfd_.get()}));
  EXPECT_TRUE(c.closed());
}

TEST_F(Hostile, close_with_requests_in_flight) {
  for (int i = 0; i < 20; ++i) {
    Client c;
    ASSERT_TRUE(c.connect(dir + "/bad"));
    ASSERT_TRUE(c.start({.features = i % 2 ? kAll : kSplit, .queues = 2}));
    for (uint32_t s = 0; s < 16; ++s) c.submit(s % 2, s, s % 2, s * 8, c.data(s, 4096), 4096);
    c.disconnect();
  }
}

}  // namespace
}  // namespace spillway::vhost
