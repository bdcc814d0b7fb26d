#include "tests/reclaim/interleave/scheduler.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>

#include "spillway/reclaim/rcu.h"
#include "src/reclaim/atomic.h"

namespace {

struct Thread {
  std::condition_variable wake;
  bool done = false, waiting = false;
  int rcu_depth = 0;
  std::uint64_t rcu_entered = 0;
};

// Guarded by m: only the running thread changes anything, and it holds the turn.
struct World {
  std::mutex m;
  std::condition_variable finished;
  std::vector<Thread*> threads;
  std::mt19937_64 rng;
  std::size_t turn = 0, live = 0;
  std::uint64_t steps = 0, hash = 1469598103934665603ull;
  bool stuck = false, active = false;
};
World* g_world = nullptr;
thread_local Thread* t_self = nullptr;
thread_local std::size_t t_index = 0;
thread_local bool t_inside = false;  // the scheduler's own work is not scheduled

struct Retired {
  spillway::reclaim::rcu_detail::Head* head;
  std::uint64_t when;
};
std::vector<Retired> g_retired;
std::uint64_t g_clock = 0;

void collect() {
  if (t_inside) return;
  t_inside = true;
  for (std::size_t i = 0; i < g_retired.size();) {
    bool held = false;
    if (g_world != nullptr) {
      for (Thread* t : g_world->threads) {
        held |= !t->done && t->rcu_depth > 0 && t->rcu_entered <= g_retired[i].when;
      }
    }
    if (held) {
      ++i;
      continue;
    }
    auto* head = g_retired[i].head;
    g_retired.erase(g_retired.begin() + static_cast<std::ptrdiff_t>(i));
    head->run(head);
  }
  t_inside = false;
}

void hand_over(World& w, std::unique_lock<std::mutex>& lock, std::size_t to) {
  w.hash = (w.hash ^ to) * 1099511628211ull;
  if (to == t_index) return;
  w.turn = to;
  w.threads[to]->wake.notify_one();
  t_self->wake.wait(lock, [&] { return w.turn == t_index; });
}

void switch_point(bool must) {
  World* w = g_world;
  if (w == nullptr || t_self == nullptr || t_inside) return;
  collect();
  std::unique_lock lock(w->m);
  ++w->steps;
  // A waiting thread looks again when somebody else has moved: so it stays in the draw, but if all are waiting
  // round after round, the run is stuck.
  t_self->waiting = must;
  if (must) {
    bool all = true;
    for (Thread* t : w->threads) all &= t->done || t->waiting;
    if (all && w->live == 1) {
      w->stuck = true;
      std::fprintf(stderr, "interleave: stuck after %llu steps\n", static_cast<unsigned long long>(w->steps));
      std::abort();
    }
  }
  if (w->steps > 5'000'000) {
    std::fprintf(stderr, "interleave: no end after %llu steps\n", static_cast<unsigned long long>(w->steps));
    std::abort();
  }
  // Mostly stay, sometimes switch: long runs of one thread with few switches find most bugs.
  if (!must && w->rng() % 4 != 0) return;
  std::vector<std::size_t> others;
  for (std::size_t i = 0; i < w->threads.size(); ++i) {
    if (!w->threads[i]->done && i != t_index) others.push_back(i);
  }
  if (others.empty()) return;
  hand_over(*w, lock, others[w->rng() % others.size()]);
}

}  // namespace

namespace spillway::reclaim {

void interleave_point() noexcept { switch_point(false); }
void interleave_wait() noexcept { switch_point(true); }

namespace rcu_detail {
void interleave_access() noexcept { switch_point(false); }
void interleave_read_lock() noexcept {
  if (t_self == nullptr) return;
  if (t_self->rcu_depth++ == 0) t_self->rcu_entered = ++g_clock;
}
void interleave_read_unlock() noexcept {
  if (t_self == nullptr) return;
  switch_point(false);
  --t_self->rcu_depth;
}
void enqueue(Head* h) noexcept { g_retired.push_back({h, ++g_clock}); }
}  // namespace rcu_detail

void rcu_synchronize() noexcept {
  const std::uint64_t now = ++g_clock;
  for (;;) {
    bool held = false;
    for (Thread* t : g_world != nullptr ? g_world->threads : std::vector<Thread*>()) {
      held |= t != t_self && !t->done && t->rcu_depth > 0 && t->rcu_entered <= now;
    }
    if (!held) return;
    interleave_wait();
  }
}
void rcu_barrier() noexcept {
  while (g_world != nullptr && t_self != nullptr && !g_retired.empty()) switch_point(true);
  if (t_self == nullptr) collect();
}

}  // namespace spillway::reclaim

namespace interleave {

void drain_rcu() { collect(); }

Outcome run(std::uint64_t seed, const std::vector<std::function<void()>>& bodies) {
  World w;
  w.rng.seed(seed);
  std::vector<Thread> threads(bodies.size());
  for (auto& t : threads) w.threads.push_back(&t);
  w.live = bodies.size();
  w.turn = w.rng() % bodies.size();
  g_world = &w;
  std::vector<std::thread> pool;
  for (std::size_t i = 0; i < bodies.size(); ++i) {
    pool.emplace_back([&, i] {
      t_self = &threads[i];
      t_index = i;
      {
        std::unique_lock lock(w.m);
        t_self->wake.wait(lock, [&] { return w.turn == i; });
      }
      bodies[i]();
      std::unique_lock lock(w.m);
      t_self->done = true;
      --w.live;
      std::vector<std::size_t> others;
      for (std::size_t k = 0; k < threads.size(); ++k) {
        if (!threads[k].done) others.push_back(k);
      }
      if (!others.empty()) {
        w.turn = others[w.rng() % others.size()];
        w.threads[w.turn]->wake.notify_one();
      }
      t_self = nullptr;
    });
  }
  for (auto& t : pool) t.join();
  Outcome o{w.stuck, w.steps, w.hash};
  g_world = nullptr;
  drain_rcu();
  return o;
}

}  // namespace interleave
