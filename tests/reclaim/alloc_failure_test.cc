// Every allocation of the library fails once: first the 1st, then the 2nd, ... until a run has no more. After
// each the library is as it was or does without; nothing is lost, nothing leaks (ASAN), nothing hangs.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "spillway/reclaim/reclaim.h"
#include "src/reclaim/atomic.h"

namespace {
thread_local long t_countdown = -1;  // < 0: never
thread_local bool t_failed = false;

bool due() {
  if (t_countdown < 0 || t_countdown-- != 0) return false;
  t_failed = true;
  return true;
}
}  // namespace

// The library's own allocations and the C++ library's (strings, vectors, functions) alike.
void* operator new(std::size_t n) {
  if (due()) throw std::bad_alloc();
  void* p = std::malloc(n != 0 ? n : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace spillway::reclaim {
namespace {

struct Obj : LruItem {};

// What a cache does in its life; returns false when it was told "no memory" in a way that ends the try.
void life() {
  Registry reg({.nodes = 2, .ref_shards = 2, .charge_slots = 2, .trace_events = 16});
  ListLru lru(reg);
  Errc why = Errc::kOk;
  Shrinker s = reg.alloc(ShrinkerFlags::kGroupAware | ShrinkerFlags::kNumaAware, "oom", &why);
  if (!s) {
    EXPECT_EQ(why, Errc::kNoMemory);
    return;
  }
  lru.attach(&s);
  s.set_count([&](const ScanRequest& q) { return lru.count(q); });
  s.set_scan([&](const ScanRequest& q) {
    return lru.walk(q, [](LruItem& i, ListLru::Walker& w) {
      w.isolate(i, 1);
      return LruVerdict::kRemoved;
    });
  });
  ASSERT_EQ(s.register_(), Errc::kOk);
  GroupRef g = reg.create_group("a-group-with-a-name-that-is-longer-than-any-small-buffer", nullptr, &why);
  if (!g) g = reg.root();
  Obj objs[200];
  for (auto& o : objs) ASSERT_TRUE(lru.add(o, *g, 1, 1));
  s.rename("another-name");  // may fail; the old name stays then
  if (!g->is_root()) {
    const Errc e = reg.remove_group(*g);
    ASSERT_EQ(e, Errc::kOk);
  }
  const ReclaimResult r = reg.reclaim({});
  // Every object is found again, wherever the lists and bits had to go.
  EXPECT_EQ(r.freed_objects, 200u) << to_text(r);
  EXPECT_EQ(s.free(), Errc::kOk);
}

TEST(AllocationFailure, each_one_in_turn) {
  set_allocation_fault([](std::size_t) { return due(); });
  long n = 0;
  for (;; ++n) {
    ASSERT_LT(n, 2000);
    t_failed = false;
    t_countdown = n;
    try {
      life();
    } catch (const std::bad_alloc&) {
      // Only constructors and the introspection throw; they have undone themselves.
    }
    t_countdown = -1;
    if (HasFailure()) FAIL() << "at allocation " << n;
    if (!t_failed) break;
  }
  set_allocation_fault(nullptr);
  EXPECT_GT(n, 20) << "the sweep must really meet allocations";
}

}  // namespace
}  // namespace spillway::reclaim
