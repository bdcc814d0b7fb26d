#include "src/base/log.h"

#include <time.h>
#include <unistd.h>

namespace spillway {

static std::atomic<LogLevel> g_level{LogLevel::kInfo};

void set_log_level(LogLevel level) { g_level.store(level, std::memory_order_relaxed); }
bool log_enabled(LogLevel level) { return level >= g_level.load(std::memory_order_relaxed); }

void log_line(LogLevel level, std::string_view component, std::string_view text) {
  static constexpr const char* kNames[] = {"debug", "info", "warn", "error"};
  timespec ts{};
  clock_gettime(CLOCK_REALTIME, &ts);
  tm t{};
  gmtime_r(&ts.tv_sec, &t);
  auto line = fmt::format("{:02}:{:02}:{:02}.{:03} {} {}: {}\n", t.tm_hour, t.tm_min, t.tm_sec,
                          ts.tv_nsec / 1000000, kNames[static_cast<int>(level)], component, text);
  // One write per line: lines of several threads and processes do not mix. A closed stderr is no reason to stop.
  [[maybe_unused]] ssize_t n = ::write(STDERR_FILENO, line.data(), line.size());
}

bool LogLimit::allow(uint64_t* suppressed) {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
  const uint64_t window = static_cast<uint64_t>(ts.tv_sec) / 10 + 1;
  uint64_t seen = window_.load(std::memory_order_relaxed);
  if (seen != window && window_.compare_exchange_strong(seen, window, std::memory_order_relaxed))
    used_.store(0, std::memory_order_relaxed);
  if (used_.fetch_add(1, std::memory_order_relaxed) >= burst_) {
    suppressed_.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  *suppressed = suppressed_.exchange(0, std::memory_order_relaxed);
  return true;
}

}  // namespace spillway
