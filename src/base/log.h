// Log lines on stderr: "level component: text". Rate-limited per call site by LOG_LIMITED.
// An `error` line means the action did not happen; `warn` that it happened in another way than asked.
// Thread-safety: any thread. Never on a path a guest can drive without limit: use the LIMITED form there.
#pragma once

#include <fmt/core.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace spillway {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarn, kError };

void set_log_level(LogLevel level);
bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view component, std::string_view text);

template <class... Args>
void log(LogLevel level, std::string_view component, fmt::format_string<Args...> f, Args&&... args) {
  if (log_enabled(level)) log_line(level, component, fmt::format(f, std::forward<Args>(args)...));
}

// At most `burst` lines per 10 s from one site; says how many it kept back when it speaks again.
class LogLimit {
 public:
  explicit LogLimit(uint32_t burst = 5) : burst_(burst) {}
  // True when the line may be written; `*suppressed` = lines kept back since the last one.
  bool allow(uint64_t* suppressed);

 private:
  const uint32_t burst_;
  std::atomic<uint64_t> window_{0};
  std::atomic<uint32_t> used_{0};
  std::atomic<uint64_t> suppressed_{0};
};

}  // namespace spillway

#define LOG_LIMITED(level, component, ...)                                                    \
  do {                                                                                        \
    static ::spillway::LogLimit log_limit_;                                                   \
    uint64_t log_suppressed_ = 0;                                                             \
    if (::spillway::log_enabled(level) && log_limit_.allow(&log_suppressed_)) {               \
      ::spillway::log(level, component, __VA_ARGS__);                                         \
      if (log_suppressed_ > 0)                                                                \
        ::spillway::log(level, component, "({} similar lines kept back)", log_suppressed_);   \
    }                                                                                         \
  } while (0)
