// The process-wide side of the RCU wrapper: retire queue, backlog bound, fork handlers.
//
// Retired objects cross grace periods in batches, on liburcu's call_rcu worker. Its backlog is bounded by pressing on the producer:
// above kBacklogLimit objects a retirer sleeps one worker period at a time (at most kPressTurns
// times), which is the only place where a `free` can be slowed by a grace period, and only when it
// has produced garbage faster than grace periods pass for long.
#include "spillway/reclaim/rcu.h"

#include <linux/membarrier.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>

#include "src/reclaim/atomic.h"

namespace spillway::reclaim {

namespace rcu_detail {
#ifdef SPILLWAY_TSAN
char grace_period_tag;
#endif

namespace {
[[maybe_unused]] constexpr std::uint64_t kBacklogLimit = 200'000;
[[maybe_unused]] constexpr int kPressTurns = 20;
thread_local bool t_in_worker = false;  // the worker must not wait for itself
std::atomic<std::uint64_t> g_retired{0}, g_deleted{0}, g_backlog_bytes{0}, g_backlog_max{0};

void count_retire(Head* h) noexcept {
  g_backlog_bytes.fetch_add(h->bytes, std::memory_order_relaxed);
  const auto retired = g_retired.fetch_add(1, std::memory_order_relaxed) + 1;
  const auto backlog = retired - g_deleted.load(std::memory_order_relaxed);
  auto max = g_backlog_max.load(std::memory_order_relaxed);
  while (backlog > max && backlog < (std::uint64_t{1} << 62) &&
         !g_backlog_max.compare_exchange_weak(max, backlog, std::memory_order_relaxed)) {
  }
}

void run(Head* h) noexcept {
#ifdef SPILLWAY_TSAN
  __tsan_acquire(&grace_period_tag);
#endif
  const auto bytes = h->bytes;
  t_in_worker = true;
  h->run(h);
  t_in_worker = false;
  g_backlog_bytes.fetch_sub(bytes, std::memory_order_relaxed);
  g_deleted.fetch_add(1, std::memory_order_release);
}
}  // namespace

#ifndef SPILLWAY_RECLAIM_INTERLEAVE
namespace {

// Objects wait in a few stacks (one per thread, threads beyond that share) and cross a grace period a
// batch at a time: one call_rcu per batch, not per object. States of a lane: idle (in_flight 0), or one
// batch on its way (1). Lost wakes: the pusher pushes, then looks at in_flight; the runner clears
// in_flight, then looks at the stack; both seq_cst, so one of them starts the next batch.
struct alignas(64) Lane {
  std::atomic<Head*> incoming{nullptr};
  std::atomic<std::uint32_t> in_flight{0};
  std::atomic<Head*> batch{nullptr};  // owned by whoever has in_flight; release to the RCU worker
  rcu_head marker{};
};
constexpr unsigned kLanes = 8;
Lane g_lanes[kLanes];
std::mutex start_mutex;

Head*& next_of(Head* h) noexcept { return reinterpret_cast<Head*&>(h->opaque[0]); }

void batch_done(rcu_head* marker) noexcept;

// With in_flight taken.
void start_batch(Lane& lane) noexcept {
  for (;;) {
    Head* const taken = lane.incoming.exchange(nullptr);
    if (taken != nullptr) {
      lane.batch.store(taken, std::memory_order_release);
      urcu_bp_call_rcu(&lane.marker, batch_done);
      return;
    }
    lane.in_flight.store(0);
    if (lane.incoming.load() == nullptr || lane.in_flight.exchange(1) != 0) return;
  }
}

void batch_done(rcu_head* marker) noexcept {
  auto& lane = *reinterpret_cast<Lane*>(reinterpret_cast<char*>(marker) - offsetof(Lane, marker));
  Head* fifo = nullptr;  // oldest first: a barrier's marker comes after what was retired before it
  for (Head* h = lane.batch.load(std::memory_order_acquire); h != nullptr;) {
    Head* next = next_of(h);
    next_of(h) = fifo;
    fifo = h;
    h = next;
  }
  for (Head* h = fifo; h != nullptr;) {
    Head* next = next_of(h);
    run(h);
    h = next;
  }
  start_batch(lane);
}

void push(Lane& lane, Head* h) noexcept {
  count_retire(h);
  Head* first = lane.incoming.load(std::memory_order_relaxed);
  do {
    next_of(h) = first;
  } while (!lane.incoming.compare_exchange_weak(first, h));
  if (lane.in_flight.load() != 0) return;
  std::lock_guard lock(start_mutex);
  if (lane.in_flight.exchange(1) == 0) start_batch(lane);
}

}  // namespace

void enqueue(Head* h) noexcept {
  push(g_lanes[thread_slot() % kLanes], h);
  for (int i = 0; i < kPressTurns && !t_in_worker; ++i) {
    const auto deleted = g_deleted.load(std::memory_order_relaxed);
    if (g_retired.load(std::memory_order_relaxed) - deleted < kBacklogLimit) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void barrier() noexcept {
  struct Marker : Head {
    std::atomic<std::uint32_t>* left = nullptr;
  } marker[kLanes];
  std::atomic<std::uint32_t> left{kLanes};
  for (unsigned i = 0; i < kLanes; ++i) {
    marker[i].left = &left;
    marker[i].run = [](Head* h) noexcept {
      auto& word = *static_cast<Marker*>(h)->left;
      if (word.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake(word, 1);
    };
    push(g_lanes[i], &marker[i]);
  }
  for (std::uint32_t n; (n = left.load(std::memory_order_acquire)) != 0;) futex_wait(left, n);
}
#else
void run_now(Head* h) noexcept { run(h); }
void count_only(Head* h) noexcept { count_retire(h); }
#endif
}  // namespace rcu_detail

#ifndef SPILLWAY_RECLAIM_INTERLEAVE
void rcu_synchronize() noexcept {
  urcu_bp_synchronize_rcu();
#ifdef SPILLWAY_TSAN
  __tsan_acquire(&rcu_detail::grace_period_tag);
#endif
}

// An own object at the end of each lane. (urcu_bp_barrier would do the same for liburcu's workers, but hands
// memory between threads in ways that TSAN can not follow.)
void rcu_barrier() noexcept { rcu_detail::barrier(); }

void rcu_enable_fork() noexcept {
  static std::once_flag once;
  std::call_once(once, [] {
    urcu_bp_get_default_call_rcu_data();  // made now, so that call_rcu under start_mutex needs no lock of liburcu
    pthread_atfork(
        [] {
          urcu_bp_call_rcu_before_fork();
          rcu_detail::start_mutex.lock();
          urcu_bp_before_fork();
        },
        [] {
          urcu_bp_after_fork_parent();
          rcu_detail::start_mutex.unlock();
          urcu_bp_call_rcu_after_fork_parent();
        },
        [] {
          urcu_bp_after_fork_child();
          rcu_detail::start_mutex.unlock();
          urcu_bp_call_rcu_after_fork_child();
        });
  });
}
#else
void rcu_enable_fork() noexcept {}
#endif

RcuStatus rcu_status() noexcept {
  static const bool membarrier = [] {
    const long q = syscall(__NR_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
    return q > 0 && (q & MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0;
  }();
  using namespace rcu_detail;
  RcuStatus s;
  s.membarrier = membarrier;
  s.deleted = g_deleted.load(std::memory_order_acquire);
  s.retired = g_retired.load(std::memory_order_relaxed);
  s.backlog_objects = s.retired - s.deleted;
  s.backlog_bytes = g_backlog_bytes.load(std::memory_order_relaxed);
  s.backlog_objects_max = g_backlog_max.load(std::memory_order_relaxed);
  return s;
}

std::string to_text(const RcuStatus& s) {
  char buf[256];
  std::snprintf(buf, sizeof buf,
                "rcu: membarrier %s, retired %llu, backlog %llu objects %llu bytes (max %llu objects)\n",
                s.membarrier ? "yes" : "NO (read sections cost a full barrier)",
                static_cast<unsigned long long>(s.retired),
                static_cast<unsigned long long>(s.backlog_objects),
                static_cast<unsigned long long>(s.backlog_bytes),
                static_cast<unsigned long long>(s.backlog_objects_max));
  return buf;
}

}  // namespace spillway::reclaim
