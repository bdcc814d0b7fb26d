#include "src/virtio/virtqueue.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "src/virtio/blk.h"
#include "src/virtio/pmem.h"

namespace spillway::virtio {
namespace {

// 64 KiB of guest memory at guest address 0x1000; a ring of 8 at its start.
struct Guest {
  static constexpr uint64_t kBase = 0x1000, kSize = 64 * 1024;
  alignas(64) std::byte bytes[kSize] = {};
  GuestMemory memory;
  Virtqueue queue;
  Chain chain;
  uint16_t avail = 0;

  explicit Guest(bool packed = false, uint16_t at = 0, bool event_idx = true) {
    memory = *GuestMemory::create({{kBase, kSize / 2, 0, bytes, false}, {kBase + kSize / 2, kSize / 2, 0, bytes + kSize / 2, false}});
    RingConfig c;
    c.size = 8;
    c.packed = packed;
    c.event_idx = event_idx;
    c.indirect = true;
    c.desc = bytes, c.driver = bytes + 1024, c.device = bytes + 2048;
    c.next_avail = c.next_used = packed ? 0x8000 : at;
    avail = at;
    put16(1024 + 2, at);
    EXPECT_TRUE(queue.start(c, &memory));
  }
  void put16(uint64_t at, uint16_t v) { std::memcpy(bytes + at, &v, 2); }
  uint16_t get16(uint64_t at) const {
    uint16_t v;
    std::memcpy(&v, bytes + at, 2);
    return v;
  }
  void desc(unsigned i, uint64_t offset, uint32_t len, uint16_t flags, uint16_t next) {
    const SplitDesc d{kBase + offset, len, flags, next};
    std::memcpy(bytes + 16 * i, &d, 16);
  }
  void offer(uint16_t head) {
    put16(1024 + 4 + 2 * (avail % 8), head);
    put16(1024 + 2, ++avail);
  }
};

TEST(Virtqueue_split, index_wraps_at_16_bits) {
  Guest g(false, 65533);
  for (uint16_t i = 0; i < 9; ++i) {
    g.desc(0, 4096, 1, kDescWrite, 0);
    g.offer(0);
    ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
    g.queue.push(0, 1, 1);
    g.queue.publish();
    EXPECT_EQ(g.get16(2048 + 2), static_cast<uint16_t>(65534 + i));
    EXPECT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kEmpty);
  }
}

TEST(Virtqueue_split, call_only_when_the_event_index_is_passed) {
  Guest g;
  g.desc(0, 4096, 1, kDescWrite, 0);
  const uint64_t used_event = 1024 + 4 + 2 * 8;
  std::vector<bool> calls;
  for (uint16_t event : {0, 0, 5, 3, 3}) {
    g.put16(used_event, event);
    g.offer(0);
    ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
    g.queue.push(0, 1, 1);
    calls.push_back(g.queue.publish());
  }
  EXPECT_EQ(calls, (std::vector<bool>{true, false, false, true, false}));
}

TEST(Virtqueue_split, arm_sees_what_arrived_before) {
  Guest g;
  EXPECT_FALSE(g.queue.arm());
  g.desc(0, 4096, 1, kDescWrite, 0);
  g.offer(0);
  EXPECT_TRUE(g.queue.arm());
  EXPECT_EQ(g.get16(2048 + 4 + 8 * 8), 0);  // avail_event: the entry that was waited for
}

TEST(Virtqueue_split, buffer_across_two_regions_is_two_pieces) {
  Guest g;
  g.desc(0, Guest::kSize / 2 - 100, 300, kDescWrite, 0);
  g.offer(0);
  ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
  ASSERT_EQ(g.chain.count, 2);
  EXPECT_EQ(g.chain.iov[0].iov_len, 100u);
  EXPECT_EQ(g.chain.iov[1].iov_len, 200u);
  EXPECT_EQ(g.chain.writable_bytes, 300u);
}

TEST(Virtqueue_split, buffer_beyond_memory_is_marked_not_followed) {
  Guest g;
  g.desc(0, Guest::kSize - 8, 16, kDescWrite, 0);
  g.offer(0);
  ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
  EXPECT_TRUE(g.chain.outside);
  EXPECT_EQ(g.chain.iov[0].iov_len, 8u);
}

// A chain that uses a whole ring, again and again, through the wrap counter.
TEST(Virtqueue_packed, positions_and_flags_through_many_laps) {
  Guest g(true);
  unsigned slot = 0;
  bool wrap = true;
  for (int i = 0; i < 40; ++i) {
    const unsigned n = 1 + static_cast<unsigned>(i) % 5, first = slot;
    const bool first_wrap = wrap;
    for (unsigned k = 0; k < n; ++k) {
      const auto flags = static_cast<uint16_t>((wrap ? kDescAvail : kDescUsed) | (k + 1 < n ? kDescNext : 0) | kDescWrite);
      const PackedDesc d{Guest::kBase + 4096, 4, static_cast<uint16_t>(i), flags};
      std::memcpy(g.bytes + 16 * slot, &d, 16);
      if (++slot == 8) slot = 0, wrap = !wrap;
    }
    ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain) << i;
    ASSERT_EQ(g.chain.slots, n);
    ASSERT_EQ(g.chain.id, i);
    EXPECT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kEmpty);
    g.queue.push(static_cast<uint16_t>(i), static_cast<uint16_t>(n), 4);
    g.queue.publish();
    const uint16_t flags = g.get16(16 * first + 14);
    EXPECT_EQ((flags & kDescUsed) != 0, first_wrap);
    EXPECT_EQ((flags & kDescAvail) != 0, first_wrap);
    EXPECT_EQ(g.get16(16 * first + 12), i);
    EXPECT_EQ(g.queue.next_avail(), slot | (wrap ? 0x8000 : 0));
    EXPECT_EQ(g.queue.next_used(), g.queue.next_avail());
  }
}

TEST(Blk_parse, any_layout_of_head_data_and_status) {
  // Head in two pieces, data joined to head and status: VIRTIO 1.3, 2.7.4 (no assumption about framing).
  Guest g;
  const uint32_t type = 0;
  const uint64_t sector = 7;
  std::memcpy(g.bytes + 8192, &type, 4);
  std::memcpy(g.bytes + 8200, &sector, 8);
  g.desc(0, 8192, 5, kDescNext, 1);
  g.desc(1, 8197, 11, kDescNext, 2);
  g.desc(2, 12288, 513, kDescWrite, 0);
  g.offer(0);
  ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
  BlkRequest r;
  parse_blk(g.chain, r);
  EXPECT_EQ(r.op, BlkOp::kRead);
  EXPECT_EQ(r.offset, 7u * 512);
  EXPECT_EQ(r.length, 512u);
  EXPECT_EQ(r.status, g.bytes + 12288 + 512);
  ASSERT_EQ(r.data_count, 1u);
  EXPECT_EQ(r.data[0].iov_len, 512u);
}

TEST(Pmem_parse, flush_and_short_answers) {
  Guest g;
  g.desc(0, 8192, 4, kDescNext, 1);
  g.desc(1, 8200, 4, kDescWrite, 0);
  g.offer(0);
  ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
  PmemRequest r = parse_pmem(g.chain);
  EXPECT_TRUE(r.flush);
  EXPECT_EQ(answer_pmem(r, true), 4u);
  g.desc(1, 8200, 3, kDescWrite, 0);
  g.offer(0);
  ASSERT_EQ(g.queue.pop(g.chain), Virtqueue::Pop::kChain);
  r = parse_pmem(g.chain);
  EXPECT_EQ(answer_pmem(r, true), 0u);
}

}  // namespace
}  // namespace spillway::virtio
