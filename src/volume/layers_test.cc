// Leaves file and memory; layers linear, stripe, slice (V1, V3, V5).
#include <fcntl.h>
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <thread>

#include "src/io/sim_reactor.h"
#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/file/file.h"
#include "src/volume/linear/linear.h"
#include "src/volume/memory/memory.h"
#include "src/volume/slice/slice.h"
#include "src/volume/stripe/stripe.h"
#include "src/volume/testing.h"

namespace spillway {
namespace {

using testing_support::random_bytes;
using testing_support::read_bytes;
using testing_support::write_bytes;

std::unique_ptr<UringReactor> ring() {
  auto r = UringReactor::create(64);
  SPILLWAY_ASSERT(r.has_value());
  return std::move(*r);
}

struct TempDir {
  TempDir() {
    std::string t = (std::filesystem::temp_directory_path() / "spillway-volume-XXXXXX").string();
    SPILLWAY_ASSERT(::mkdtemp(t.data()) != nullptr);
    path = t;
  }
  ~TempDir() { std::filesystem::remove_all(path); }
  std::string operator/(const char* name) const { return path + "/" + name; }
  std::string path;
};

VolumePtr memory(const std::string& name, uint64_t size) { return make_memory(name, size).value(); }

VolumePtr file(const std::string& path, uint64_t size, bool direct = true) {
  FileOptions o;
  o.path = path;
  o.create_size = size;
  o.direct = direct;
  auto r = open_file("f", std::move(o));
  if (!r) ADD_FAILURE() << r.error().message();
  return r.value();
}

// Random requests against an array of bytes.
void model_test(Reactor& reactor, Volume& v, uint64_t seed, int steps, uint64_t longest) {
  std::vector<std::byte> model(v.size());
  const uint32_t block = v.geometry().block_size;
  std::mt19937_64 rnd(seed);
  IoContext ctx;
  for (int i = 0; i < steps; ++i) {
    const uint64_t offset = rnd() % (v.size() / block) * block;
    const uint64_t length = std::min(v.size() - offset, (1 + rnd() % (longest / block)) * block);
    switch (rnd() % 8) {
      case 0:
        ASSERT_TRUE(reactor.block_on(v.write_zeroes(ctx, offset, length, rnd() % 2 == 0)));
        std::fill_n(model.begin() + static_cast<ptrdiff_t>(offset), length, std::byte{0});
        break;
      case 1: case 2: case 3: {
        auto data = random_bytes(rnd(), length);
        // Three pieces, so that scattered memory is exercised; none aligned.
        std::vector<iovec> iov{{data.data(), length / 3}, {data.data() + length / 3, length / 4}};
        iov.push_back({data.data() + length / 3 + length / 4, length - length / 3 - length / 4});
        ASSERT_TRUE(reactor.block_on(v.write(ctx, offset, iov)));
        std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(offset));
        break;
      }
      case 4: ASSERT_TRUE(reactor.block_on(v.flush(ctx))); break;
      default: {
        auto r = reactor.block_on(read_bytes(v, offset, length));
        ASSERT_TRUE(r) << r.error().message();
        ASSERT_TRUE(std::equal(r->begin(), r->end(), model.begin() + static_cast<ptrdiff_t>(offset)))
            << "offset " << offset << " length " << length << " step " << i;
      }
    }
  }
  uint64_t at = 0;
  auto status = reactor.block_on(v.block_status(0, v.size()));
  ASSERT_TRUE(status);
  for (const Extent& e : *status) {
    ASSERT_EQ(e.offset, at);
    ASSERT_GT(e.length, 0u);
    at += e.length;
    if (e.kind == Extent::Kind::kData) continue;
    for (uint64_t o = e.offset; o < e.offset + e.length; ++o) {
      ASSERT_EQ(model[o], std::byte{0}) << o;
    }
  }
  EXPECT_EQ(at, v.size());
}

TEST(File_direct, behaves_as_bytes) {
  TempDir dir;
  auto r = ring();
  auto v = file(dir / "a", 3 * kMiB);
  model_test(*r, *v, 1, 300, 300 * kKiB);
}

TEST(File_buffered, behaves_as_bytes) {
  TempDir dir;
  auto r = ring();
  auto v = file(dir / "a", kMiB, false);
  model_test(*r, *v, 2, 200, 100 * kKiB);
}

TEST(File_with_partial_last_block, reads_zeros_and_takes_writes_there) {
  TempDir dir;
  const std::string path = dir / "a";
  {
    Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    std::string data(5000, 'x');
    ASSERT_EQ(::write(fd.get(), data.data(), data.size()), 5000);
  }
  auto r = ring();
  auto v = file(path, 0);
  const uint64_t size = v->size();
  ASSERT_GE(size, 5000u);
  auto all = r->block_on(read_bytes(*v, 0, size));
  ASSERT_TRUE(all) << all.error().message();
  EXPECT_EQ((*all)[4999], std::byte{'x'});
  for (uint64_t i = 5000; i < size; ++i) EXPECT_EQ((*all)[i], std::byte{0});
  auto data = random_bytes(3, size);
  ASSERT_TRUE(r->block_on(write_bytes(*v, 0, data)));
  EXPECT_EQ(*r->block_on(read_bytes(*v, 0, size)), data);
}

TEST(File_truncated_below_its_size, is_an_error_of_that_read_only) {
  TempDir dir;
  const std::string path = dir / "a";
  auto r = ring();
  auto v = file(path, kMiB);
  ASSERT_EQ(::truncate(path.c_str(), 512 * kKiB), 0);
  auto bad = r->block_on(read_bytes(*v, 768 * kKiB, 4096));
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().kind(), ErrorKind::kIo);
  EXPECT_TRUE(r->block_on(read_bytes(*v, 0, 4096)));
}

TEST(File_lock, refuses_second_writer_and_shares_readers) {
  TempDir dir;
  const std::string path = dir / "a";
  auto writer = file(path, kMiB);
  FileOptions o;
  o.path = path;
  EXPECT_EQ(open_file("b", std::move(o)).error().kind(), ErrorKind::kBusy);
  FileOptions ro;
  ro.path = path;
  ro.read_only = true;
  EXPECT_EQ(open_file("b", std::move(ro)).error().kind(), ErrorKind::kBusy);
  writer.reset();
  FileOptions ro1, ro2, rw;
  ro1.path = ro2.path = rw.path = path;
  ro1.read_only = ro2.read_only = true;
  auto a = open_file("a", std::move(ro1)), b = open_file("b", std::move(ro2));
  ASSERT_TRUE(a) << a.error().message();
  ASSERT_TRUE(b) << b.error().message();
  EXPECT_EQ(open_file("c", std::move(rw)).error().kind(), ErrorKind::kBusy);
}

// A worker that was killed under load left its disks locked for as long as its requests were in flight: its successor
// gave up ("in use by another program").
TEST(File_lock, of_a_dying_predecessor_is_waited_for) {
  TempDir dir;
  const std::string path = dir / "a";
  auto writer = file(path, kMiB);
  std::thread dying([&] { writer.reset(); });
  FileOptions o;
  o.path = path;
  o.lock_wait_ms = 60'000;
  EXPECT_TRUE(open_file("b", std::move(o)));
  dying.join();
}

TEST(File_missing, names_the_disk_and_the_path) {
  FileOptions o;
  o.path = "/nonexistent/x";
  EXPECT_NE(open_file("d7", std::move(o)).error().message().find("disk d7: /nonexistent/x"), std::string::npos);
}

TEST(File_resize, grows_file_and_tells_listeners) {
  TempDir dir;
  auto r = ring();
  auto v = file(dir / "a", kMiB);
  uint64_t told = 0;
  v->add_resize_listener([&](uint64_t n) { told = n; });
  ASSERT_TRUE(r->block_on(v->resize(2 * kMiB)));
  EXPECT_EQ(told, 2 * kMiB);
  EXPECT_TRUE(r->block_on(read_bytes(*v, kMiB, kMiB)));
  EXPECT_FALSE(r->block_on(v->resize(kMiB)));
}

TEST(File_discard, gives_the_blocks_back) {
  TempDir dir;
  auto r = ring();
  const std::string path = dir / "a";
  auto v = file(path, kMiB);
  ASSERT_TRUE(r->block_on(write_bytes(*v, 0, random_bytes(1, kMiB))));
  ASSERT_TRUE(r->block_on(v->flush({})));
  struct stat before{}, after{};
  ASSERT_EQ(::stat(path.c_str(), &before), 0);
  ASSERT_TRUE(r->block_on(v->discard({}, 0, kMiB)));
  ASSERT_EQ(::stat(path.c_str(), &after), 0);
  EXPECT_LT(after.st_blocks, before.st_blocks);
  EXPECT_EQ(*r->block_on(read_bytes(*v, 0, 4096)), std::vector<std::byte>(4096));
}

TEST(Memory_random_requests, behave_as_bytes) {
  SimReactor sim;
  auto v = memory("m", kMiB);
  model_test(sim, *v, 4, 500, 100 * kKiB);
}

TEST(Layers_nested, linear_over_stripes_over_slices_behave_as_bytes) {  // V1
  SimReactor sim;
  std::vector<VolumePtr> stripes;
  for (int i = 0; i < 2; ++i) {
    std::vector<VolumePtr> legs;
    for (int k = 0; k < 3; ++k)
      legs.push_back(make_slice("s", memory(fmt::format("m{}{}", i, k), 640 * kKiB), 64 * kKiB, 512 * kKiB).value());
    stripes.push_back(make_stripe("st", legs, 32 * kKiB).value());
  }
  auto v = make_linear("l", stripes).value();
  EXPECT_EQ(v->size(), 3 * kMiB);
  EXPECT_EQ(v->geometry().independent_region, 3 * 512 * kKiB);  // V3
  EXPECT_EQ(v->geometry().min_io, 32 * kKiB);
  EXPECT_EQ(v->geometry().opt_io, 96 * kKiB);
  model_test(sim, *v, 5, 800, 700 * kKiB);
}

TEST(Stripe_chunks_not_a_power_of_two, behave_as_bytes) {
  SimReactor sim;
  auto v = make_stripe("s", {memory("a", 480 * kKiB), memory("b", 480 * kKiB)}, 48 * kKiB).value();
  model_test(sim, *v, 6, 400, 300 * kKiB);
}

TEST(Stripe_places, chunks_round_robin) {
  SimReactor sim;
  auto a = memory("a", 256 * kKiB), b = memory("b", 256 * kKiB);
  auto v = make_stripe("s", {a, b}, 64 * kKiB).value();
  auto data = random_bytes(1, 64 * kKiB);
  ASSERT_TRUE(sim.block_on(write_bytes(*v, 192 * kKiB, data)));  // chunk 3: member b, row 1
  EXPECT_EQ(*sim.block_on(read_bytes(*b, 64 * kKiB, 64 * kKiB)), data);
}

TEST(Stripe_member_no_multiple_of_chunk, is_named) {
  auto r = make_stripe("fast", {memory("d0", 65536), memory("d1", 99840)}, 65536);
  ASSERT_FALSE(r);
  EXPECT_NE(r.error().message().find("volume fast: member d1: size 99840 is no multiple of chunk 65536"),
            std::string::npos)
      << r.error().message();
}

TEST(Request_inside_one_member, makes_no_coroutine) {
  auto v = make_linear("l", {make_stripe("s", {memory("a", kMiB), memory("b", kMiB)}, 65536).value()}).value();
  std::vector<std::byte> buf(4096);
  iovec iov{buf.data(), buf.size()};
  EXPECT_TRUE(v->read({}, 65536, Iov(&iov, 1)).is_ready());
  EXPECT_TRUE(v->write({}, 65536, Iov(&iov, 1)).is_ready());
}

Task<Status> hammer(Volume* v, bool* stop, uint64_t* done) {
  std::vector<std::byte> buf(8192);
  iovec iov{buf.data(), buf.size()};
  while (!*stop) {
    const uint64_t offset = *done * 4096 % (v->size() - 8192);
    Status s = co_await v->write({}, align_down(offset, 512), Iov(&iov, 1));
    if (!s) co_return s;
    ++*done;
    co_await Reactor::current().sleep_for(1000);
  }
  co_return Status{};
}
Task<Status> append_later(LinearVolume* v, VolumePtr m, bool* stop) {
  co_await Reactor::current().sleep_for(1'000'000);
  Status s = co_await v->append(m);
  co_await Reactor::current().sleep_for(1'000'000);
  *stop = true;
  co_return s;
}

TEST(Linear_grows_under_load, listeners_see_the_size_and_the_new_region_works) {  // V5
  SimReactor sim(7);
  auto v = make_linear("l", {memory("a", kMiB)}).value();
  uint64_t told = 0, done = 0;
  bool stop = false;
  v->add_resize_listener([&](uint64_t n) { told = n; });
  std::vector<Task<Status>> both;
  auto* linear = dynamic_cast<LinearVolume*>(v.get());
  both.push_back(hammer(v.get(), &stop, &done));
  both.push_back(append_later(linear, memory("b", 2 * kMiB), &stop));
  ASSERT_TRUE(sim.block_on(all_of(std::move(both))));
  EXPECT_EQ(told, 3 * kMiB);
  EXPECT_GT(done, 100u);
  auto data = random_bytes(1, kMiB);
  ASSERT_TRUE(sim.block_on(write_bytes(*v, kMiB - 512, data)));
  EXPECT_EQ(*sim.block_on(read_bytes(*v, kMiB - 512, kMiB)), data);
  EXPECT_FALSE(sim.block_on(linear->append(v->members()[0])));
}

TEST(Slice_beyond_the_end, is_refused_by_name) {
  EXPECT_NE(make_slice("root", memory("m", kMiB), 512 * kKiB, kMiB).error().message().find("volume root"),
            std::string::npos);
}

TEST(Assemble_plain, linear_and_stripe_and_slice) {
  SimReactor sim;
  LayerSpec s;
  s.name = "fast";
  s.layer = "stripe";
  s.members = {memory("a", kMiB), memory("b", kMiB)};
  auto v = sim.block_on(assemble(s));
  ASSERT_TRUE(v) << v.error().message();
  EXPECT_EQ((*v)->geometry().min_io, 64 * kKiB);
  s.members[1] = nullptr;
  s.member_names = {"a", "b"};
  EXPECT_NE(sim.block_on(assemble(s)).error().message().find("member b is missing"), std::string::npos);
}

}  // namespace
}  // namespace spillway
