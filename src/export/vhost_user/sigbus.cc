#include "src/export/vhost_user/sigbus.h"

#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace spillway::vhost {

namespace {

struct Slot {
  std::atomic<uintptr_t> base{0};
  std::atomic<size_t> length{0};  // 0: free or being changed
  std::atomic<bool> used{false};
  std::atomic<bool> torn{false};
};
Slot g_slots[1024];
struct sigaction g_previous;

void on_sigbus(int signo, siginfo_t* info, void* context) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Slot& slot : g_slots) {
    const size_t length = slot.length.load(std::memory_order_acquire);  // pairs with guard_range
    if (length == 0) continue;
    const uintptr_t base = slot.base.load(std::memory_order_relaxed);
    if (at - base >= length) continue;
    // The whole range at once: huge pages cannot be replaced one small page at a time.
    if (::mmap(reinterpret_cast<void*>(base), length, PROT_READ | PROT_WRITE,
               MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED)
      break;
    slot.torn.store(true, std::memory_order_relaxed);
    return;
  }
  if ((g_previous.sa_flags & SA_SIGINFO) != 0 && g_previous.sa_sigaction != nullptr) {
    g_previous.sa_sigaction(signo, info, context);
    return;
  }
  ::signal(SIGBUS, SIG_DFL);  // returns into the same instruction, which now ends the process
}

}  // namespace

int guard_range(void* base, size_t length) {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &g_previous);
  });
  for (int i = 0; i < static_cast<int>(std::size(g_slots)); ++i) {
    Slot& slot = g_slots[i];
    if (slot.used.exchange(true, std::memory_order_acquire)) continue;
    slot.torn.store(false, std::memory_order_relaxed);
    slot.base.store(reinterpret_cast<uintptr_t>(base), std::memory_order_relaxed);
    slot.length.store(length, std::memory_order_release);
    return i;
  }
  return -1;
}

void unguard_range(int slot) {
  if (slot < 0) return;
  g_slots[slot].length.store(0, std::memory_order_release);
  g_slots[slot].used.store(false, std::memory_order_release);
}

bool range_torn(int slot) {
  return slot >= 0 && g_slots[slot].torn.load(std::memory_order_relaxed);
}

}  // namespace spillway::vhost
