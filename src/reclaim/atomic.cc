#include "src/reclaim/atomic.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace spillway::reclaim {

static_assert(sizeof(Atomic<std::uint32_t>) == sizeof(std::uint32_t));

#ifdef SPILLWAY_RECLAIM_INTERLEAVE
void futex_wait(Atomic<std::uint32_t>& word, std::uint32_t value, std::int64_t) noexcept {
  if (word.load() == value) interleave_wait();
}
void futex_wake(Atomic<std::uint32_t>&, int) noexcept { interleave_point(); }
#else
void futex_wait(Atomic<std::uint32_t>& word, std::uint32_t value, std::int64_t timeout_ns) noexcept {
  timespec ts{};
  if (timeout_ns >= 0) {
    ts.tv_sec = timeout_ns / 1'000'000'000;
    ts.tv_nsec = timeout_ns % 1'000'000'000;
  }
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value,
          timeout_ns >= 0 ? &ts : nullptr, nullptr, 0);
}
void futex_wake(Atomic<std::uint32_t>& word, int count) noexcept {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr,
          nullptr, 0);
}
#endif

namespace {
std::atomic<bool (*)(std::size_t)> g_fault{nullptr};
constexpr std::size_t kAlign = 64;
std::size_t rounded(std::size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
}  // namespace

void set_allocation_fault(bool (*fault)(std::size_t)) noexcept {
  g_fault.store(fault, std::memory_order_release);
}

void* allocate(std::size_t size) noexcept {
  auto fault = g_fault.load(std::memory_order_acquire);
  if (fault != nullptr && fault(size)) return nullptr;
  void* p = std::aligned_alloc(kAlign, rounded(size));
  if (p != nullptr) std::memset(p, 0, size);
  return p;
}

void release(void* p, [[maybe_unused]] std::size_t size) noexcept {
#ifdef SPILLWAY_RECLAIM_POISON
  std::memset(p, 0xdb, size);
#endif
  std::free(p);
}

unsigned thread_slot() noexcept {
  static std::atomic<unsigned> next{0};
  thread_local const unsigned slot = next.fetch_add(1, std::memory_order_relaxed);
  return slot;
}

unsigned cpu_slot() noexcept {
#ifndef SPILLWAY_RECLAIM_INTERLEAVE
  if (const int cpu = sched_getcpu(); cpu >= 0) return static_cast<unsigned>(cpu);
#endif
  return thread_slot();
}

unsigned cores() noexcept {
  static const unsigned n = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    const int c = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return c > 0 ? static_cast<unsigned>(c) : 1u;
  }();
  return n;
}

}  // namespace spillway::reclaim
