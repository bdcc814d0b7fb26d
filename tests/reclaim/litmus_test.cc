// Litmus tests of the barrier pairs, on the real machine: two threads, many rounds, started by a spinning
// barrier. The mutants without the barrier are run too, and their weak outcome counted: where the machine
// shows it (store buffering on x86 does), the test proves that it would have seen a missing barrier.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

namespace {

struct alignas(64) Line {
  std::atomic<unsigned> v{0};
};

// As many rounds as fit into this time: the outcome that must never be seen is as forbidden in few as in many.
std::chrono::milliseconds duration() {
  const char* ms = std::getenv("SPILLWAY_LITMUS_MS");
  return std::chrono::milliseconds(ms != nullptr ? std::atoi(ms) : 1000);
}

// Runs a and b once per round, together; `forbidden` looks at the results after each.
template <class A, class B, class Check>
int rounds(A a, B b, Check forbidden) {
  constexpr unsigned kEnd = ~0u;
  std::atomic<unsigned> start{0}, done{0};
  int seen = 0;
  const auto await = [](const std::atomic<unsigned>& word, unsigned value) {
    unsigned now = word.load();
    for (int spin = 0; now != value && now != kEnd; now = word.load()) {
      if (++spin > 100) std::this_thread::yield();
    }
    return now;
  };
  std::thread t([&] {
    for (unsigned i = 1; await(start, i) != kEnd; ++i) {
      b();
      done.store(i);
    }
  });
  const auto end = std::chrono::steady_clock::now() + duration();
  for (unsigned i = 1; std::chrono::steady_clock::now() < end; ++i) {
    start.store(i);
    a();
    await(done, i);
    seen += forbidden();
  }
  start.store(kEnd);
  t.join();
  return seen;
}

// set_bit against clear_and_recheck (bits.cc, walk.cc): object, fence, look at the bit | clear, fence, count.
// Forbidden: the adder saw the bit still set and the walker saw no object.
template <bool fences>
int empty_bit() {
  Line objects, bit;
  unsigned saw_bit = 0, saw_objects = 0;
  bit.v = 1;
  return rounds(
      [&] {
        objects.v.store(1, std::memory_order_relaxed);
        if (fences) std::atomic_thread_fence(std::memory_order_seq_cst);
        saw_bit = bit.v.load(std::memory_order_relaxed);
      },
      [&] {
        if (fences) bit.v.fetch_and(0, std::memory_order_seq_cst);
        else bit.v.store(0, std::memory_order_relaxed);
        if (fences) std::atomic_thread_fence(std::memory_order_seq_cst);
        saw_objects = objects.v.load(std::memory_order_relaxed);
      },
      [&] {
        const bool bad = saw_bit == 1 && saw_objects == 0;
        objects.v = 0;
        bit.v = 1;
        return bad;
      });
}

TEST(Litmus, empty_bit_pair_forbids_the_lost_object) {
  EXPECT_EQ(empty_bit<true>(), 0);
  RecordProperty("weak outcomes without the fences", empty_bit<false>());
}

// propagate against settle_up: set lower (RMW), look at upper | clear upper (RMW), look at lower; all seq_cst.
TEST(Litmus, summary_pair_forbids_the_hidden_bit) {
  Line lower, upper;
  unsigned saw_upper = 0, saw_lower = 0;
  upper.v = 1;
  EXPECT_EQ(rounds([&] {
    lower.v.fetch_or(1);
    saw_upper = upper.v.load();
  }, [&] {
    upper.v.fetch_and(0);
    saw_lower = lower.v.load();
  }, [&] {
    const bool bad = saw_upper == 1 && saw_lower == 0;
    lower.v = 0;
    upper.v = 1;
    return bad;
  }), 0);
}

// register_ against try_get: fields, release store of the count | acquire increment, fields.
TEST(Litmus, publish_pair_forbids_the_half_built_shrinker) {
  Line fields, refs;
  unsigned got = 0, saw = 0;
  EXPECT_EQ(rounds([&] {
    fields.v.store(7, std::memory_order_relaxed);
    refs.v.store(1, std::memory_order_release);
  }, [&] {
    unsigned v = refs.v.load(std::memory_order_relaxed);
    got = v != 0 && refs.v.compare_exchange_strong(v, v + 1, std::memory_order_acquire);
    saw = fields.v.load(std::memory_order_relaxed);
  }, [&] {
    const bool bad = got != 0 && saw != 7;
    fields.v = 0;
    refs.v = 0;
    return bad;
  }), 0);
}

}  // namespace
