// The FUSE side of virtio-pmem on the real kernel: needs root and /dev/fuse, skips without (P1, P3, P5, P7, P9).
#include <fcntl.h>
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "src/export/fuse/pmem.h"
#include "src/volume/memory/memory.h"

namespace spillway {
namespace {

constexpr uint64_t kSize = 16 * kMiB;

// A memory volume that fails on demand and counts.
class TestVolume final : public Volume {
 public:
  explicit TestVolume(uint64_t size = kSize, uint32_t block = 4096) : Volume("t", size, geometry_of(block)), bytes(size) {}
  std::vector<char> bytes;  // once the file is served: under mutex
  std::mutex mutex;
  char at(uint64_t offset) {
    std::lock_guard lock(mutex);
    return bytes[offset];
  }
  std::atomic<bool> fail_reads{false}, fail_writes{false}, fail_flush{false};
  std::atomic<uint64_t> reads{0}, writes{0}, written{0}, flushes{0}, zeroed{0};
  std::string_view layer() const override { return "test"; }

 protected:
  static Geometry geometry_of(uint32_t block) {
    Geometry g;
    g.block_size = block;
    g.discard_granularity = 4096;
    return g;
  }
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    if (fail_reads) return Task<Status>::ready(fail(ErrorKind::kIo, "read fault"));
    ++reads;
    std::lock_guard lock(mutex);
    copy_to_iov(iov, 0, bytes.data() + offset, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    if (fail_writes) return Task<Status>::ready(fail(ErrorKind::kIo, "write fault"));
    ++writes;
    written += iov_length(iov);
    std::lock_guard lock(mutex);
    copy_from_iov(bytes.data() + offset, iov, 0, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override {
    if (fail_flush) return Task<Status>::ready(fail(ErrorKind::kIo, "flush fault"));
    ++flushes;
    return Task<Status>::ready();
  }
  Task<Status> do_write_zeroes(IoContext, uint64_t offset, uint64_t length, bool) override {
    zeroed += length;
    std::lock_guard lock(mutex);
    std::memset(bytes.data() + offset, 0, length);
    return Task<Status>::ready();
  }
};

int pin_to(int cpu) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  return ::sched_setaffinity(0, sizeof one, &one);
}

// A process that maps a file of the mount, as a VMM does. Never the test itself: a process that serves a mount must
// not map its files (a fault or an munmap would hold the address space its own workers need).
class Mapper {
 public:
  // Forked while the test is single-threaded, before the mount starts.
  Mapper() {
    int pair[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::close(pair[0]);
      serve(pair[1]);
    }
    ::close(pair[1]);
    socket_ = pair[0];
  }
  ~Mapper() {
    ::close(socket_);
    ::waitpid(pid_, nullptr, 0);
  }
  pid_t pid() const { return pid_; }
  bool open(const std::string& path, bool read_only = false) { return call('o', read_only, 0, 0, 0, path) == 0; }
  char get(uint64_t at) { return static_cast<char>(call('g', at)); }
  void fill(uint64_t from, uint64_t to, char c) { call('f', from, to, 1, c); }
  // Byte i of [from, to), every 4096, becomes tag(i); check says how many differ.
  void stamp(uint64_t from, uint64_t to) { call('s', from, to); }
  int64_t wrong(uint64_t from, uint64_t to) { return call('c', from, to); }
  void touch(uint64_t from, uint64_t to) { call('t', from, to); }
  int64_t sync() { return call('y'); }  // 0 or errno
  void run_on(int cpu) { call('p', static_cast<uint64_t>(cpu)); }
  int64_t pwrite(uint64_t at, const std::string& text) { return call('w', at, 0, 0, 0, text); }

 private:
  struct Order {
    char verb;
    uint64_t a, b, c;
    char ch, text[256];
  };
  int64_t call(char verb, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, char ch = 0, const std::string& text = {}) {
    Order o{verb, a, b, c, ch, {}};
    std::strncpy(o.text, text.c_str(), sizeof o.text - 1);
    int64_t answer = -1;
    EXPECT_EQ(::send(socket_, &o, sizeof o, 0), static_cast<ssize_t>(sizeof o));
    EXPECT_EQ(::recv(socket_, &answer, sizeof answer, 0), static_cast<ssize_t>(sizeof answer));
    return answer;
  }
  static char tag(uint64_t i) { return static_cast<char>((i >> 12) * 7 | 1); }
  [[noreturn]] static void serve(int s) {
    int fd = -1;
    char* p = nullptr;
    Order o{};
    while (::recv(s, &o, sizeof o, 0) == static_cast<ssize_t>(sizeof o)) {
      int64_t answer = 0;
      volatile char sink = 0;
      switch (o.verb) {
        case 'o': {
          if (fd >= 0) ::close(fd);
          fd = ::open(o.text, o.a != 0 ? O_RDONLY : O_RDWR);
          answer = fd < 0 ? errno : 0;
          if (fd < 0) break;
          p = static_cast<char*>(
              ::mmap(nullptr, kSize, o.a != 0 ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
          ::madvise(p, kSize, MADV_RANDOM);
          break;
        }
        case 'g': answer = p[o.a]; break;
        case 'f': std::memset(p + o.a, o.ch, o.b - o.a); break;
        case 's':
          for (uint64_t i = o.a; i < o.b; i += 4096) p[i] = tag(i);
          break;
        case 'c':
          for (uint64_t i = o.a; i < o.b; i += 4096) answer += p[i] != tag(i);
          break;
        case 't':
          for (uint64_t i = o.a; i < o.b; i += 4096) sink = p[i];
          break;
        case 'y': answer = ::fsync(fd) == 0 ? 0 : errno; break;
        case 'p': answer = pin_to(static_cast<int>(o.a)); break;
        case 'w': answer = ::pwrite(fd, o.text, std::strlen(o.text), static_cast<off_t>(o.a)); break;
      }
      (void)sink;
      if (::send(s, &answer, sizeof answer, 0) < 0) break;
    }
    ::_exit(0);
  }
  int socket_ = -1;
  pid_t pid_ = 0;
};

class FusePmem : public ::testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0 || ::access("/dev/fuse", R_OK | W_OK) != 0) GTEST_SKIP() << "needs root and /dev/fuse";
    dir_ = fmt::format("/tmp/spillway-fuse-test-{}-{}", ::getpid(), counter_++);
    watch();
    guest_ = std::make_unique<Mapper>();
    auto m = start();
    if (!m) GTEST_SKIP() << "cannot mount FUSE here: " << m.error().message();
    mount_ = *m;
  }
  void TearDown() override {
    guest_.reset();
    if (mount_) mount_->stop(false);
    ::umount2(dir_.c_str(), MNT_DETACH);
    if (watchdog_ > 0) {
      ::kill(watchdog_, SIGKILL);
      ::waitpid(watchdog_, nullptr, 0);
    }
    std::error_code ec;
    std::filesystem::remove(dir_, ec);
  }
  Result<std::shared_ptr<PmemMount>> start(FdStore* store = nullptr) {
    PmemMountOptions o;
    o.name = "tenant";
    o.directory = dir_;
    o.store = store;
    return PmemMount::start(o);
  }
  std::shared_ptr<PmemFile> add(const std::string& name, VolumePtr v, bool read_only = false) {
    PmemFileOptions o;
    o.name = name;
    o.volume = std::move(v);
    o.read_only = read_only;
    auto f = mount_->add(o);
    EXPECT_TRUE(f) << f.error().message();
    return f ? *f : nullptr;
  }
  static inline int counter_ = 0;
  // A test that hangs on its own mount cannot be killed, nor can whoever maps it: after two minutes this process aborts
  // the connection, so that everybody gets an error instead.
  void watch() {
    watchdog_ = ::fork();
    if (watchdog_ != 0) return;
    for (int s = 0; s < 120; ++s) ::sleep(1);
    ::umount2(dir_.c_str(), MNT_FORCE | MNT_DETACH);
    static constexpr char kText[] = "fuse_test: hung; its mount has been aborted\n";
    (void)!::write(2, kText, sizeof kText - 1);
    ::_exit(0);
  }
  pid_t watchdog_ = 0;
  Mapper& map(const std::string& name, bool read_only = false) {
    EXPECT_TRUE(guest_->open(dir_ + "/" + name, read_only));
    return *guest_;
  }
  std::string dir_;
  MemoryFdStore store_;
  std::unique_ptr<Mapper> guest_;
  std::shared_ptr<PmemMount> mount_;
};

TEST_F(FusePmem, Store_through_mapping_and_sync_reaches_volume_and_flushes_it) {  // P1
  auto v = std::make_shared<TestVolume>();
  v->bytes[5 * 4096] = 'r';
  auto f = add("vm1", v);
  ASSERT_TRUE(f);
  Mapper& m = map("vm1");
  EXPECT_EQ(m.get(5 * 4096), 'r');
  m.fill(7 * 4096 + 3, 7 * 4096 + 4, 'w');
  ASSERT_TRUE(f->sync());
  EXPECT_EQ(v->at(7 * 4096 + 3), 'w');
  EXPECT_EQ(v->written, 4096u);  // the dirty page and nothing else
  EXPECT_GE(v->flushes, 1u);
}

TEST_F(FusePmem, Failed_flush_is_a_failed_sync_and_later_one_succeeds) {
  auto v = std::make_shared<TestVolume>();
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  m.fill(0, 1, 1);
  v->fail_flush = true;
  EXPECT_FALSE(f->sync());
  EXPECT_EQ(m.sync(), EIO);
  v->fail_flush = false;
  EXPECT_TRUE(f->sync());
}

TEST_F(FusePmem, Failing_read_is_held_until_the_backend_answers) {  // no SIGBUS
  auto v = std::make_shared<TestVolume>();
  v->bytes[0] = 'x';
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  v->fail_reads = true;
  std::atomic<char> got{0};
  std::thread t([&] { got = m.get(0); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  EXPECT_GT(f->stalled().count(), 0);
  EXPECT_EQ(got, 0);
  v->fail_reads = false;
  t.join();
  EXPECT_EQ(got, 'x');
  while (f->stalled().count() != 0) std::this_thread::yield();
}

TEST_F(FusePmem, Failing_write_back_is_held_and_loses_nothing) {
  auto v = std::make_shared<TestVolume>();
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  m.fill(0, 64 * 4096, 'd');
  v->fail_writes = true;
  Status s;
  std::thread t([&] { s = f->sync(); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  v->fail_writes = false;
  t.join();
  EXPECT_TRUE(s);
  EXPECT_EQ(v->at(63 * 4096 + 4095), 'd');
}

TEST_F(FusePmem, Evict_takes_mapped_pages_writes_dirty_ones_and_content_returns) {  // P9
  auto v = std::make_shared<TestVolume>();
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  m.stamp(0, kSize);
  auto e = f->evict(0, kSize / 2);
  ASSERT_TRUE(e) << e.error().message();
  EXPECT_EQ(e->before, kSize / 2);
  if (e->remote_refused) GTEST_SKIP() << "process_madvise is not permitted here";
  EXPECT_EQ(e->freed, kSize / 2);
  EXPECT_EQ(f->residency(0, kSize / 2)->cached, 0u);
  EXPECT_EQ(f->residency(kSize / 2, kSize / 2)->cached, kSize / 2);
  EXPECT_EQ(m.wrong(0, kSize), 0);
}

// What one processor faulted in last is on no LRU list yet, so another one's page-out passes it by (mm/swap.c's batches).
TEST_F(FusePmem, Evict_takes_the_pages_that_another_processor_has_just_faulted_in) {
  cpu_set_t all;
  ASSERT_EQ(::sched_getaffinity(0, sizeof all, &all), 0);
  int cpus[2] = {-1, -1}, n = 0;
  for (int c = 0; c < CPU_SETSIZE && n < 2; ++c)
    if (CPU_ISSET(c, &all)) cpus[n++] = c;
  if (n < 2) GTEST_SKIP() << "needs two processors";
  auto f = add("vm1", std::make_shared<TestVolume>());
  Mapper& m = map("vm1");
  m.run_on(cpus[0]);
  ASSERT_EQ(pin_to(cpus[1]), 0);  // the agent process that evicts is forked by this thread
  constexpr uint64_t kFew = 8 * kPageSize;  // fewer than a batch holds; whatever else runs there may drain it now and then
  for (int round = 0; round < 16; ++round) {
    m.touch(0, kFew);
    auto e = f->evict(0, kFew);
    ASSERT_TRUE(e) << e.error().message();
    if (e->remote_refused) GTEST_SKIP() << "process_madvise is not permitted here";
    EXPECT_EQ(e->before, kFew);
    EXPECT_EQ(e->freed, kFew);
  }
  ASSERT_EQ(::sched_setaffinity(0, sizeof all, &all), 0);
}

TEST_F(FusePmem, Cold_half_goes_warm_half_stays) {  // P9: chunks that came back are let go by
  auto v = std::make_shared<TestVolume>();
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  const uint64_t n = kSize / PmemFile::kChunk;
  m.touch(0, kSize);
  const auto first = f->evict_cold(kSize, n, true);
  if (first.refused) GTEST_SKIP() << "process_madvise is not permitted here";
  EXPECT_EQ(first.freed, kSize);
  m.touch(0, kSize / 2);  // the warm half comes back at once
  m.touch(kSize / 2, kSize / 2);
  const auto second = f->evict_cold(kSize, n, false);
  EXPECT_EQ(second.warm, n / 2);
  EXPECT_EQ(f->residency(0, kSize / 2)->cached, kSize / 2);
  for (int turn = 0; turn < 3; ++turn) f->evict_cold(kSize, n, false);  // it cools down when nothing refers to it any more
  EXPECT_EQ(f->residency()->cached, 0u);
}

TEST_F(FusePmem, Read_only_file_is_one_inode_for_two_exports_and_evicts_for_all) {  // P5
  auto v = std::make_shared<TestVolume>();
  auto a = add("a", v, true), b = add("b", v, true);
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a.get(), b.get());
  struct stat sa{}, sb{};
  ASSERT_EQ(::stat((dir_ + "/a").c_str(), &sa), 0);
  ASSERT_EQ(::stat((dir_ + "/b").c_str(), &sb), 0);
  EXPECT_EQ(sa.st_ino, sb.st_ino);
  Mapper& m = map("a", true);
  m.touch(0, kSize);
  EXPECT_EQ(a->residency()->cached, kSize);
  auto e = a->evict(0, kSize);
  ASSERT_TRUE(e) << e.error().message();
  EXPECT_EQ(a->residency()->cached, 0u);
  EXPECT_FALSE(m.open(dir_ + "/a", false));  // EROFS
}

TEST_F(FusePmem, Writable_files_of_one_volume_never_share_an_inode) {  // P3
  auto v = std::make_shared<TestVolume>();
  auto a = add("a", v, true), b = add("b", v, false);
  EXPECT_NE(a.get(), b.get());
}

TEST_F(FusePmem, Zero_pages_are_punched_at_write_back) {  // P7
  auto v = std::make_shared<TestVolume>();
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  m.fill(0, kMiB, 'x');
  ASSERT_TRUE(f->sync());
  m.fill(0, kMiB - 4096, 0);
  ASSERT_TRUE(f->sync());
  EXPECT_EQ(v->zeroed, kMiB - 4096);
  EXPECT_EQ(v->at(0), 0);
  EXPECT_EQ(v->at(kMiB - 1), 'x');
}

TEST_F(FusePmem, Punch_hole_through_the_file_punches_the_volume) {
  auto v = std::make_shared<TestVolume>();
  std::memset(v->bytes.data(), 'x', kMiB);
  auto f = add("vm1", v);
  ASSERT_EQ(::fallocate(f->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 65536), 0);
  EXPECT_EQ(v->zeroed, 65536u);
  EXPECT_NE(::fallocate(f->fd(), 0, kSize, 4096), 0);
}

TEST_F(FusePmem, Unaligned_read_and_write_calls_work) {
  auto v = std::make_shared<TestVolume>();
  std::memset(v->bytes.data(), 'x', kMiB);
  auto f = add("vm1", v);
  ASSERT_EQ(::pwrite(f->fd(), "hello", 5, 4095), 5);
  char back[7] = {};
  ASSERT_EQ(::pread(f->fd(), back, 7, 4094), 7);
  EXPECT_EQ(std::string(back, 7), "xhellox");
  EXPECT_EQ(v->at(4095), 'h');
  EXPECT_EQ(v->at(4100), 'x');
}

TEST_F(FusePmem, Scan_is_answered_ahead_and_a_write_in_front_of_it_is_seen) {
  auto v = std::make_shared<TestVolume>();
  for (uint64_t at = 0; at < kSize; ++at) v->bytes[at] = static_cast<char>('a' + at / kPageSize % 17);
  const std::vector<char> was = v->bytes;
  auto f = add("vm1", v);
  std::vector<char> part(128 * kKiB);
  auto wrong = [&](uint64_t at) {
    EXPECT_EQ(::pread(f->fd(), part.data(), part.size(), static_cast<off_t>(at)), static_cast<ssize_t>(part.size()));
    return !std::equal(part.begin(), part.end(), was.begin() + static_cast<long>(at));
  };
  for (uint64_t at = 0; at < 8 * kMiB; at += part.size()) EXPECT_FALSE(wrong(at)) << at;
  EXPECT_GT(f->counters().ahead_bytes, 4 * kMiB);
  constexpr uint64_t kInFront = 9 * kMiB;  // read ahead, not asked for yet
  ASSERT_EQ(::pwrite(f->fd(), std::string(kPageSize, 'N').data(), kPageSize, kInFront), static_cast<ssize_t>(kPageSize));
  ASSERT_TRUE(f->evict(kInFront, kPageSize));
  EXPECT_TRUE(wrong(kInFront));
  EXPECT_EQ(part[0], 'N');
  for (uint64_t at = 8 * kMiB; at < kSize; at += part.size()) EXPECT_EQ(wrong(at), at == kInFront) << at;
}

TEST_F(FusePmem, Directory_lists_files_and_nothing_can_be_made_or_resized) {
  auto f = add("vm1", std::make_shared<TestVolume>());
  std::vector<std::string> names;
  for (auto& e : std::filesystem::directory_iterator(dir_)) names.push_back(e.path().filename());
  EXPECT_EQ(names, std::vector<std::string>{"vm1"});
  EXPECT_EQ(std::filesystem::file_size(dir_ + "/vm1"), kSize);
  EXPECT_EQ(::open((dir_ + "/new").c_str(), O_CREAT | O_RDWR, 0600), -1);
  EXPECT_EQ(::ftruncate(f->fd(), 4096), -1);
  EXPECT_EQ(::ftruncate(f->fd(), kSize), 0);
}

TEST_F(FusePmem, Bad_sizes_and_names_are_refused) {
  PmemFileOptions o;
  o.name = "odd";
  o.volume = std::make_shared<TestVolume>(3 * kMiB);
  auto r = mount_->add(o);
  ASSERT_FALSE(r);
  EXPECT_NE(r.error().message().find("2 MiB"), std::string::npos);
  o.volume = std::make_shared<TestVolume>();
  for (const char* bad : {"", ".", "a/b", ".hidden"}) {
    o.name = bad;
    EXPECT_FALSE(mount_->add(o)) << bad;
  }
  o.name = "vm1";
  ASSERT_TRUE(mount_->add(o));
  EXPECT_FALSE(mount_->add(o));
}

TEST_F(FusePmem, Successor_adopts_the_mount_and_is_sent_the_unanswered_requests) {  // the holder's promise
  mount_->stop(false);
  auto first = start(&store_);
  ASSERT_TRUE(first) << first.error().message();
  mount_ = *first;
  auto v = std::make_shared<TestVolume>();
  std::memset(v->bytes.data(), 'x', kMiB);
  auto f = add("vm1", v);
  Mapper& m = map("vm1");
  m.fill(kMiB, kMiB + 1, 'd');
  v->fail_writes = v->fail_reads = true;
  std::atomic<int64_t> synced{-1};
  std::thread writer([&] { synced = m.sync(); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  mount_->stop(true);  // what is held stays with the kernel
  auto second = start(&store_);
  ASSERT_TRUE(second) << second.error().message();
  mount_ = *second;
  EXPECT_TRUE(mount_->stats().adopted);
  v->fail_reads = v->fail_writes = false;
  auto again = add("vm1", v);
  ASSERT_TRUE(again);
  EXPECT_EQ(again->node(), f->node());
  writer.join();
  EXPECT_EQ(synced, 0);
  EXPECT_EQ(v->at(kMiB), 'd');
  EXPECT_EQ(m.get(0), 'x');
}

// A worker that was the last idle one asked for another one under the lock that stop() held while it waited for it.
TEST_F(FusePmem, Stop_under_faults_ends_and_the_successor_serves_them) {
  constexpr uint64_t kBusy = 4 * kMiB;
  mount_->stop(false);
  auto v = std::make_shared<TestVolume>();
  Mapper& m = *guest_;
  for (int round = 0; round < 4; ++round) {
    auto mount = start(&store_);
    ASSERT_TRUE(mount) << mount.error().message();
    mount_ = *mount;
    auto f = add("vm1", v);
    ASSERT_TRUE(f);
    if (round == 0) {
      map("vm1");
      m.stamp(0, kBusy);
    }
    auto e = f->evict(0, kBusy);
    ASSERT_TRUE(e);
    if (e->remote_refused) GTEST_SKIP() << "process_madvise is not permitted here";
    std::atomic<int64_t> wrong{-1};
    const uint64_t before = v->reads;
    std::thread faults([&] { wrong = m.wrong(0, kBusy); });
    while (v->reads < before + 64) std::this_thread::yield();
    mount_->stop(true);
    auto next = start(&store_);
    ASSERT_TRUE(next) << next.error().message();
    mount_ = *next;
    ASSERT_TRUE(add("vm1", v));
    faults.join();
    EXPECT_EQ(wrong, 0);
    mount_->stop(true);
  }
  auto last = start(&store_);
  ASSERT_TRUE(last);
  mount_ = *last;
}

TEST_F(FusePmem, Removed_file_is_written_back_first) {
  auto v = std::make_shared<TestVolume>();
  add("vm1", v);
  map("vm1").fill(8192, 8193, 'd');
  mount_->remove("vm1");
  EXPECT_EQ(v->at(8192), 'd');
}

TEST_F(FusePmem, Removing_ends_what_a_failing_backend_holds) {
  auto v = std::make_shared<TestVolume>();
  add("vm1", v);
  Mapper& m = map("vm1");
  m.fill(0, 1, 'd');
  v->fail_writes = true;
  std::atomic<int64_t> synced{-1};
  std::thread t([&] { synced = m.sync(); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  mount_->remove("vm1");
  t.join();
  EXPECT_EQ(synced, EIO);
}

TEST_F(FusePmem, Open_while_the_worker_restarts_waits_for_the_file_or_for_settle) {
  mount_->stop(false);
  auto first = start(&store_);
  ASSERT_TRUE(first);
  mount_ = *first;
  auto v = std::make_shared<TestVolume>();
  add("vm1", v);
  add("gone", std::make_shared<TestVolume>());
  mount_->stop(true);
  auto second = start(&store_);
  ASSERT_TRUE(second);
  mount_ = *second;
  std::atomic<int> opened{-1};
  std::thread t([&] { opened = guest_->open(dir_ + "/vm1"); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  EXPECT_EQ(opened, -1);
  add("vm1", v);
  t.join();
  EXPECT_EQ(opened, 1);
  std::thread u([&] { opened = guest_->open(dir_ + "/gone"); });
  while (mount_->stats().held == 0) std::this_thread::yield();
  mount_->settle();
  u.join();
  EXPECT_EQ(opened, 0);
}

TEST_F(FusePmem, Export_makes_and_removes_its_link) {
  ExportOptions e;
  e.name = "vm1";
  e.volume = std::make_shared<TestVolume>();
  PmemOptions p;
  p.mount = mount_;
  p.link = dir_ + ".link";
  {
    auto x = start_fuse_pmem(e, p);
    ASSERT_TRUE(x) << x.error().message();
    EXPECT_EQ(std::filesystem::file_size(p.link), kSize);
    EXPECT_EQ((*x)->transport(), "fuse-pmem");
  }
  EXPECT_FALSE(std::filesystem::exists(std::filesystem::symlink_status(p.link)));
}

}  // namespace
}  // namespace spillway
