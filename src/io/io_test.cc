#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <cstring>

#include "src/base/fd.h"
#include "src/io/blocking_pool.h"
#include "src/io/buffers.h"
#include "src/io/reactor_pool.h"
#include "src/io/sim_reactor.h"
#include "src/io/sync.h"

namespace spillway {
namespace {

Task<int> add(int a, int b) { co_return a + b; }
Task<int> sum_to(int n) {
  int total = 0;
  for (int i = 0; i < n; ++i) total += co_await add(i, co_await Task<int>::ready(1)) - 1;
  co_return total;
}

std::unique_ptr<UringReactor> ring() {
  auto r = UringReactor::create(64);
  SPILLWAY_ASSERT(r.has_value());
  return std::move(*r);
}

Forecast after(std::initializer_list<uint64_t> gaps_us) {
  Forecast f;
  for (uint64_t us : gaps_us) f.add(us * 1000);
  return f;
}

TEST(Forecast, is_a_window_that_one_late_and_two_later_gaps_do_not_move) {
  EXPECT_FALSE(after({1200, 1200, 1200, 1200, 1200, 1200, 1200}).next(50'000)) << "seven of eight";
  const auto w = after({1200, 1100, 1150, 1300, 4000, 1180, 1250, 900}).next(50'000);
  ASSERT_TRUE(w);
  EXPECT_EQ(w->from_ns, 1'100'000u - 57'500);  // slack: a quarter of 1100..1250, and 20 us
  EXPECT_EQ(w->to_ns, 1'250'000u + 57'500);
  // The oldest are forgotten: a new rhythm is told after eight of it, also much later.
  Forecast f = after({1200, 1200, 1200, 1200, 1200, 1200, 1200, 1200});
  for (int i = 0; i < 100; ++i) f.add(3'000'000);
  ASSERT_TRUE(f.next(50'000));
  EXPECT_EQ(f.next(50'000)->from_ns, 2'980'000u);
}

TEST(Forecast, tells_nothing_when_it_would_keep_the_reactor_awake_for_half_of_the_time_or_work_stays_away) {
  EXPECT_FALSE(after({1000, 1000, 1000, 1500, 1500, 1500, 1500, 1500}).next(0)) << "wide";
  EXPECT_TRUE(after({1000, 1000, 1000, 1200, 1200, 1200, 1200, 1200}).next(0));
  EXPECT_FALSE(after({1000, 1000, 1000, 1200, 1200, 1200, 1200, 1200}).next(300'000)) << "a slow wake-up";
  EXPECT_FALSE(after({200, 200, 200, 200, 200, 200, 200, 200}).next(100'000)) << "shorter than two wake-ups";
  EXPECT_FALSE(after({1000, 1000, 1000, 1000, 1000, 60'000, 60'000, 60'000}).next(0)) << "three did not come";
  EXPECT_FALSE(after({6000, 6000, 6000, 6000, 6000, 6000, 6000, 6000}).next(0)) << "too rare";
}

TEST(Task_nested, gives_value) {
  SimReactor sim;
  EXPECT_EQ(sim.block_on(sum_to(100)), 4950);
}

Task<void> write_read(int fd) {
  Reactor& r = Reactor::current();
  char out[] = "spillway", in[8] = {};
  iovec w{out, 8}, v{in, 8};
  EXPECT_EQ(co_await r.writev(fd, {&w, 1}, 4096), 8);
  EXPECT_EQ(co_await r.fsync(fd, true), 0);
  EXPECT_EQ(co_await r.readv(fd, {&v, 1}, 4096), 8);
  EXPECT_EQ(std::memcmp(in, out, 8), 0);
  EXPECT_EQ(co_await r.fallocate(fd, 3, 0, 8192), 0);
  EXPECT_EQ(co_await r.readv(fd, {&v, 1}, 4096), 8);
  EXPECT_EQ(in[0], 0);
}

TEST(UringReactor_file_ops, read_back_what_was_written) {
  Fd fd(::memfd_create("t", MFD_CLOEXEC));
  ring()->block_on(write_read(fd.get()));
}

TEST(SimReactor_file_ops, read_back_what_was_written) {
  Fd fd(::memfd_create("t", MFD_CLOEXEC));
  SimReactor sim;
  sim.block_on(write_read(fd.get()));
}

TEST(Reactor_destroyed_before_it_ran_a_message, frees_what_was_posted_and_runs_nothing) {
  auto held = std::make_shared<int>(0);
  auto r = ring();
  r->post([held] { ++*held; });
  EXPECT_EQ(held.use_count(), 2);
  r.reset();
  EXPECT_EQ(held.use_count(), 1);
  EXPECT_EQ(*held, 0);
}

TEST(UringReactor_more_ops_than_queue_entries, all_complete) {
  auto r = ring();
  Fd fd(::memfd_create("t", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(fd.get(), 1 << 20), 0);
  int done = 0;
  auto one = [](int f, int* n) -> Task<Status> {
    char buf[512];
    iovec v{buf, sizeof buf};
    EXPECT_EQ(co_await Reactor::current().readv(f, {&v, 1}, 0), 512);
    ++*n;
    co_return Status{};
  };
  std::vector<Task<Status>> parts;
  for (int i = 0; i < 1000; ++i) parts.push_back(one(fd.get(), &done));
  EXPECT_TRUE(r->block_on(all_of(std::move(parts))));
  EXPECT_EQ(done, 1000);
}

TEST(SimReactor_sleep, jumps_the_clock_and_keeps_order) {
  SimReactor sim;
  std::vector<int> order;
  auto sleeper = [](std::vector<int>* o, int id, uint64_t ns) -> Task<void> {
    co_await Reactor::current().sleep_for(ns);
    o->push_back(id);
  };
  sim.spawn(sleeper(&order, 1, 3'000'000'000));
  sim.spawn(sleeper(&order, 2, 1'000'000'000));
  EXPECT_EQ(sim.run_until_idle(), 3'000'000'000u);
  EXPECT_EQ(order, (std::vector<int>{2, 1}));
}

TEST(Reactor_cancel, ends_poll_and_timer) {
  auto r = ring();
  Fd efd(::eventfd(0, EFD_CLOEXEC));
  auto canceler = [](Reactor* re, IoAwait* a, IoAwait* b) -> Task<void> {
    re->cancel(*a);
    re->cancel(*b);
    co_return;
  };
  auto main = [&](Reactor* re) -> Task<void> {
    IoAwait p = re->poll(efd.get(), POLLIN);
    IoAwait t = re->sleep_for(1'000'000'000'000);
    int timer_result = 0;
    AsyncCounter left;
    auto wait_timer = [](IoAwait* op, int* res, AsyncCounter* c) -> Task<void> {
      *res = co_await *op;
      c->done();
    };
    left.add();
    re->spawn(wait_timer(&t, &timer_result, &left));
    re->spawn(canceler(re, &p, &t));
    EXPECT_EQ(co_await p, -ECANCELED);
    co_await left.wait_idle();
    EXPECT_EQ(timer_result, -ECANCELED);
  };
  r->block_on(main(r.get()));
}

TEST(AsyncMutex_two_reactors, excludes_and_loses_no_wakeup) {
  auto r = ring();  // before the pool, whose threads post to it
  auto pool = ReactorPool::start({-1, -1});
  ASSERT_TRUE(pool);
  AsyncMutex mutex;
  int64_t value = 0;  // guarded by mutex
  std::atomic<int> left{8};
  AsyncEvent finished;
  auto worker = [](AsyncMutex* m, int64_t* v, std::atomic<int>* l, AsyncEvent* f) -> Task<void> {
    for (int i = 0; i < 5000; ++i) {
      auto guard = co_await m->guard();
      ++*v;
    }
    if (l->fetch_sub(1) == 1) f->set();
  };
  for (int i = 0; i < 8; ++i)
    (*pool)->at(i % 2).post([&, i] {
      (void)i;
      Reactor::current().spawn(worker(&mutex, &value, &left, &finished));
    });
  auto wait = [](AsyncEvent* f) -> Task<void> { co_await f->wait(); };
  r->block_on(wait(&finished));
  EXPECT_EQ(value, 40000);
}

TEST(BlockingPool_job, returns_on_the_reactor) {
  auto r = ring();
  BlockingPool pool(2);
  auto main = [&](Reactor* re) -> Task<int> {
    auto self = std::this_thread::get_id();
    std::thread::id other;
    int v = co_await pool.run([&] {
      other = std::this_thread::get_id();
      return 42;
    });
    EXPECT_EQ(std::this_thread::get_id(), self);
    EXPECT_NE(other, self);
    EXPECT_EQ(&Reactor::current(), re);
    co_return v;
  };
  EXPECT_EQ(r->block_on(main(r.get())), 42);
}

TEST(IovSlice_cut, covers_the_bytes_asked_for) {
  char a[100];
  for (int i = 0; i < 100; ++i) a[i] = static_cast<char>(i);
  std::vector<iovec> v;
  for (int i = 0; i < 10; ++i) v.push_back({a + i * 10, 10});
  for (size_t skip = 0; skip < 100; skip += 7)
    for (size_t len = 1; skip + len <= 100; len += 13) {
      IovSlice s(v, skip, len);
      std::vector<char> out(len);
      EXPECT_EQ(copy_from_iov(out.data(), s, 0, len), len);
      for (size_t i = 0; i < len; ++i) EXPECT_EQ(out[i], static_cast<char>(skip + i));
    }
}

}  // namespace
}  // namespace spillway
