// ReadAhead without a kernel: what it reads, what it answers, and that it never answers bytes that have changed.
#include "src/export/fuse/ahead.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

namespace spillway {
namespace {

constexpr uint64_t kSize = 64 * kMiB, kPart = 128 * kKiB;

// Every byte of a page is the page's tag. A read takes its bytes, then waits for the gate: a slow disk.
class GateVolume final : public Volume {
 public:
  GateVolume() : Volume("gate", kSize, geometry_of()), tags(kSize / kPageSize) {
    for (size_t i = 0; i < tags.size(); ++i) tags[i] = static_cast<char>(i % 251);
    gate.set();
  }
  std::string_view layer() const override { return "test"; }
  void set(uint64_t offset, char tag) {
    std::lock_guard lock(mutex);
    tags[offset / kPageSize] = tag;
  }
  AsyncEvent gate;
  std::atomic<uint64_t> reads{0}, end{0};
  std::atomic<bool> fails{false};
  std::mutex mutex;
  std::vector<char> tags;

 protected:
  static Geometry geometry_of() {
    Geometry g;
    g.block_size = 4096;
    return g;
  }
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    if (fails) co_return fail(ErrorKind::kIo, "fault");
    const uint64_t length = iov_length(iov);
    std::vector<char> bytes(length);
    {
      std::lock_guard lock(mutex);
      for (uint64_t i = 0; i < length; ++i) bytes[i] = tags[(offset + i) / kPageSize];
    }
    ++reads;
    end = std::max<uint64_t>(end, offset + length);
    co_await gate.wait();
    copy_to_iov(iov, 0, bytes.data(), length);
    co_return Status{};
  }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return Task<Status>::ready(); }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
};

class FuseAhead : public ::testing::Test {
 protected:
  void SetUp() override {
    auto r = UringReactor::create(64);
    if (!r) GTEST_SKIP() << "no io_uring";
    reactor = std::move(*r);
    PmemFileOptions o;
    o.name = "f";
    o.volume = volume;
    file = std::make_shared<PmemFile>(std::move(o), 2);
    ASSERT_TRUE(ahead.start());
  }
  void TearDown() override {
    volume->gate.set();
    ahead.stop();
  }
  // The kernel's requests of a scan of [from, to): noted, and answered by whoever has them unless it is only `noted`.
  void scan(uint64_t from, uint64_t to, bool noted = false) {
    for (uint64_t at = from; at < to; at += kPart) {
      ahead.note(file, at, kPart);
      if (!noted) find(at, kPart);
    }
  }
  ReadAhead::Found find(uint64_t at, uint64_t length) { return reactor->block_on(ahead.find(*file, at, length)); }
  bool right(const ReadAhead::Found& f, uint64_t at, uint64_t length) {
    std::string got;
    for (unsigned i = 0; i < f.count; ++i) got.append(static_cast<const char*>(f.iov[i].iov_base), f.iov[i].iov_len);
    if (got.size() != length) return false;
    std::lock_guard lock(volume->mutex);
    for (uint64_t i = 0; i < length; ++i)
      if (got[i] != volume->tags[(at + i) / kPageSize]) return false;
    return true;
  }
  std::shared_ptr<GateVolume> volume = std::make_shared<GateVolume>();
  std::unique_ptr<UringReactor> reactor;
  std::shared_ptr<PmemFile> file;
  ReadAhead ahead;  // after the reactor: it goes first
};

TEST_F(FuseAhead, Stream_is_read_ahead_up_to_a_quarter_of_its_run_and_answered_once) {
  scan(0, 4 * kMiB);
  for (uint64_t at = 4 * kMiB; at < 5 * kMiB; at += kPart) EXPECT_TRUE(right(find(at, kPart), at, kPart)) << at;
  EXPECT_FALSE(find(5 * kMiB, kPart));
  EXPECT_FALSE(find(4 * kMiB, kPart));  // answered in full: gone
  EXPECT_TRUE(ahead.empty());
  EXPECT_EQ(volume->end, 5 * kMiB);
}

TEST_F(FuseAhead, Request_across_two_pieces_is_answered_from_both) {
  scan(0, 4 * kMiB);
  const uint64_t at = 4 * kMiB + ReadAhead::kPiece - kPageSize;
  EXPECT_TRUE(right(find(at, kPart), at, kPart));
  EXPECT_FALSE(find(5 * kMiB - kPageSize, kPart));  // only its beginning is there
}

TEST_F(FuseAhead, Parts_of_a_window_in_any_order_are_one_stream) {
  for (uint64_t window = 0; window < 4 * kMiB; window += 4 * kPart)
    for (const uint64_t part : {2, 0, 3, 1}) ahead.note(file, window + part * kPart, kPart);
  EXPECT_TRUE(right(find(4 * kMiB, kPart), 4 * kMiB, kPart));
}

TEST_F(FuseAhead, Scattered_and_short_requests_read_nothing) {
  for (uint64_t i = 0; i < 200; ++i) {
    ahead.note(file, (i * 37) % 60 * kMiB, kPart);  // never near one of the last eight
    ahead.note(file, i * kPageSize, kPageSize);
  }
  ahead.stop();
  EXPECT_EQ(volume->reads, 0u);
}

TEST_F(FuseAhead, Nothing_beyond_the_end_and_the_last_bytes_are_read) {
  scan(kSize - 8 * kMiB, kSize - kPart);
  EXPECT_TRUE(right(find(kSize - kPart, kPart), kSize - kPart, kPart));
  ahead.stop();
  EXPECT_EQ(volume->end, kSize);
}

TEST_F(FuseAhead, Bytes_that_change_are_never_answered_from_before) {
  scan(0, 4 * kMiB);
  const uint64_t at = 4 * kMiB + ReadAhead::kPiece;
  volume->set(at, 'n');
  ahead.changed(*file, at, kPageSize);
  EXPECT_FALSE(find(at, kPart));
  EXPECT_TRUE(right(find(4 * kMiB, kPart), 4 * kMiB, kPart));  // its neighbour is untouched
}

TEST_F(FuseAhead, Piece_whose_read_began_before_the_change_is_not_answered) {
  volume->gate.reset();
  scan(0, 4 * kMiB, true);
  while (volume->end < 5 * kMiB) std::this_thread::yield();  // they have the old bytes
  ReadAhead::Found early;
  std::thread waiter([&] {
    auto own = UringReactor::create(8);
    early = (*own)->block_on(ahead.find(*file, 4 * kMiB, kPart));
    // `own` may go only when the thread that woke us has left it.
    ahead.stop();
  });
  volume->set(4 * kMiB, 'n');
  ahead.changed(*file, 4 * kMiB, kPageSize);
  volume->gate.set();
  waiter.join();
  EXPECT_FALSE(early);
}

TEST_F(FuseAhead, Failed_piece_is_not_found_and_counts_no_error_of_the_guest) {
  volume->fails = true;
  scan(0, 4 * kMiB);
  EXPECT_FALSE(find(4 * kMiB, kPart));
  EXPECT_EQ(file->counters().errors, 0u);
}

TEST_F(FuseAhead, Memory_is_bounded_however_many_streams_there_are) {
  volume->gate.reset();
  for (uint64_t base = 0; base < kSize; base += 8 * kMiB) scan(base, base + 6 * kMiB, true);
  volume->gate.set();
  ahead.stop();
  EXPECT_EQ(volume->reads, ReadAhead::kPieces);
}

TEST_F(FuseAhead, Abandoned_pieces_make_room) {
  scan(0, 8 * kMiB, true);  // more pieces than there may be, nobody asks for them
  for (uint64_t at = kMiB; at < 10 * kMiB; at += ReadAhead::kPiece) find(at, kPageSize);  // all are ready
  scan(16 * kMiB, 20 * kMiB);
  EXPECT_TRUE(right(find(20 * kMiB, kPart), 20 * kMiB, kPart));
}

TEST_F(FuseAhead, Forget_waits_for_what_is_under_way) {
  volume->gate.reset();
  scan(0, 4 * kMiB, true);
  while (volume->reads < 4) std::this_thread::yield();
  std::atomic<bool> forgotten{false};
  std::thread t([&] {
    ahead.forget(*file);
    forgotten = true;
  });
  EXPECT_FALSE(forgotten);
  volume->gate.set();
  t.join();
  EXPECT_EQ(file.use_count(), 1);
  EXPECT_TRUE(ahead.empty());
}

}  // namespace
}  // namespace spillway
