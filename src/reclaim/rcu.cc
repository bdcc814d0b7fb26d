// The process-wide side of the RCU wrapper: retire queue, backlog bound, fork handlers.
//
// The retire queue is liburcu's call_rcu worker. Its backlog is bounded by pressing on the producer:
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
constexpr std::uint64_t kBacklogLimit = 200'000;
constexpr int kPressTurns = 20;
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
static_assert(sizeof(rcu_head) <= sizeof(Head::opaque));

void enqueue(Head* h) noexcept {
  count_retire(h);
#ifdef SPILLWAY_TSAN
  __tsan_release(h);
#endif
  urcu_bp_call_rcu(reinterpret_cast<rcu_head*>(h->opaque), [](rcu_head* raw) {
    static_assert(offsetof(Head, opaque) == 0);
    auto* head = reinterpret_cast<Head*>(raw);
#ifdef SPILLWAY_TSAN
    __tsan_acquire(head);
#endif
    run(head);
  });
  for (int i = 0; i < kPressTurns && !t_in_worker; ++i) {
    const auto deleted = g_deleted.load(std::memory_order_relaxed);
    if (g_retired.load(std::memory_order_relaxed) - deleted < kBacklogLimit) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
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

// An own object at the end of the queue: liburcu's default worker runs it in order. (urcu_bp_barrier does
// the same for all workers, but hands memory between threads in ways that TSAN can not follow.)
void rcu_barrier() noexcept {
  struct Marker : rcu_detail::Head {
    std::atomic<std::uint32_t> reached{0};
  } marker;
  marker.run = [](rcu_detail::Head* h) noexcept {
    auto& reached = static_cast<Marker*>(h)->reached;
    reached.store(1, std::memory_order_release);
    futex_wake(reached, 1);
  };
  rcu_detail::enqueue(&marker);
  while (marker.reached.load(std::memory_order_acquire) == 0) futex_wait(marker.reached, 0);
}

void rcu_enable_fork() noexcept {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(
        [] {
          urcu_bp_call_rcu_before_fork();
          urcu_bp_before_fork();
        },
        [] {
          urcu_bp_after_fork_parent();
          urcu_bp_call_rcu_after_fork_parent();
        },
        [] {
          urcu_bp_after_fork_child();
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
