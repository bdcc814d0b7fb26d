// Pressure sources behind one fd-and-clock interface, and a monitor that feeds a Registry.
//
// Two ways to run it: give Monitor::fd() to any event loop and call on_ready() when it is readable
// (and at next_timer()), or start_thread(). Nothing polls unless a source says that it must
// (MemAvailable has no notification; its interval is an option).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "spillway/reclaim/registry.h"

namespace spillway::reclaim {

enum class PressureLevel : std::uint8_t { kNone, kLow, kMedium, kCritical };
std::string_view to_string(PressureLevel l) noexcept;

struct PressureEvent {
  PressureLevel level = PressureLevel::kNone;
  std::uint64_t target_bytes = 0;  ///< 0: the source knows no amount, the monitor's step is used
  int node = kAnyNode;
  MemoryGroup* group = nullptr;    ///< null = root
  std::string text;
};

/// One source. Thread-confined to whoever runs the monitor.
class PressureSource {
 public:
  virtual ~PressureSource() = default;
  virtual std::string_view kind() const noexcept = 0;  ///< "psi", "cgroup-v1", ...
  virtual std::string describe() const = 0;            ///< with path and threshold
  virtual int fd() const noexcept { return -1; }       ///< -1: timer only
  virtual std::uint32_t poll_events() const noexcept = 0;  ///< POLLPRI, POLLIN, 0
  /// Ready, or the timer came: consume it; nothing when it was not about pressure.
  virtual std::optional<PressureEvent> on_ready(TimePoint now, std::uint32_t revents) = 0;
  virtual TimePoint next_timer() const noexcept { return kNoDeadline; }
  virtual bool failed() const noexcept { return false; }  ///< gone: closed peer, removed cgroup
};
using SourcePtr = std::unique_ptr<PressureSource>;

/// A maker that could not: `why` says it in one sentence.
struct SourceResult {
  SourcePtr source;
  Errc error = Errc::kOk;
  std::string why;
  explicit operator bool() const noexcept { return source != nullptr; }
};

/// PSI trigger on `path` (/proc/pressure/memory or a cgroup's memory.pressure). Source:
/// Documentation/accounting/psi.rst. `full` pressure is reported as critical.
SourceResult open_psi(const std::string& path = "/proc/pressure/memory",
                      std::string_view trigger = "some 200000 2000000");
/// cgroup v1: memory.pressure_level through cgroup.event_control ("low", "medium", "critical").
SourceResult open_cgroup_v1_pressure(const std::string& cgroup_dir, std::string_view level);
/// cgroup v1: usage threshold through cgroup.event_control; the event's target is the excess over
/// `threshold - headroom`, page cache (inactive_file) not counted.
SourceResult open_cgroup_v1_threshold(const std::string& cgroup_dir, std::uint64_t threshold_bytes,
                                      std::uint64_t headroom_bytes);
/// cgroup v2: changes of memory.events (low, high, max, oom) and the distance of memory.current
/// (less inactive_file) to memory.high / memory.max.
SourceResult open_cgroup_v2_events(const std::string& cgroup_dir, std::uint64_t headroom_bytes = 0);
/// MemAvailable below `low_bytes`: asks for what is missing to `high_bytes`. Timer only.
SourceResult open_mem_available(Clock& clock, std::uint64_t low_bytes, std::uint64_t high_bytes,
                                Nanoseconds interval = std::chrono::seconds(1),
                                const std::string& meminfo = "/proc/meminfo");
/// MemFree + file cache of a NUMA node (/sys/devices/system/node/nodeN/meminfo).
SourceResult open_node_available(Clock& clock, int node, std::uint64_t low_bytes,
                                 std::uint64_t high_bytes,
                                 Nanoseconds interval = std::chrono::seconds(1),
                                 const std::string& meminfo = {});
/// systemd's memory-pressure protocol: $MEMORY_PRESSURE_WATCH (PSI file, FIFO or AF_UNIX stream
/// socket; "/dev/null" = off: kUnsupported) and $MEMORY_PRESSURE_WRITE (base64, written after open).
SourceResult open_memory_pressure_env();
SourceResult open_memory_pressure(const std::string& watch, const std::string& write_base64);
/// Our own limit: an event whenever the group's usage passes its `high`. Lives no longer than group.
SourceResult open_group_limit(GroupRef group);

struct MonitorOptions {
  std::uint64_t step_bytes = 16u << 20;        ///< for sources without an amount, kLow; x4, x16 above
  Nanoseconds min_interval = std::chrono::milliseconds(100);  ///< between two reactions to a source
  /// Called for each event before the registry is asked; return false to keep it from reclaiming.
  std::function<bool(const PressureEvent&)> on_event;
  bool synchronous = false;  ///< reclaim in on_ready() instead of asking the background threads
};

/// What open_best tried, in order, and what came of it.
struct SourceStatus {
  std::string kind, text;
  bool active = false;
  std::uint64_t events = 0;
};

class PressureMonitor {
 public:
  explicit PressureMonitor(Registry& registry, MonitorOptions o = {});
  ~PressureMonitor();
  PressureMonitor(const PressureMonitor&) = delete;
  PressureMonitor& operator=(const PressureMonitor&) = delete;

  Errc add(SourceResult r);
  /// $MEMORY_PRESSURE_WATCH, else own cgroup (v2 PSI and events, or v1), else system PSI, else
  /// MemAvailable. The first class that works is used; status() says what was tried and why not.
  Errc open_best();

  int fd() const noexcept;  ///< readable (POLLIN) when on_ready() has something to do; an epoll fd
  TimePoint next_timer() const noexcept;
  /// Handles everything that is ready; returns the number of events. One thread at a time.
  int on_ready();
  /// Like on_ready, waiting at most `timeout` first.
  int wait(Nanoseconds timeout);

  Errc start_thread();
  void stop_thread();
  std::vector<SourceStatus> status() const;
  std::string to_text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Rate-limited grow-back with hysteresis: the size a cache may have after pressure. Pure
/// arithmetic on times it is given; thread-confined.
///
/// Pressure cuts the limit at once. Then it stays for `hold`, then grows by `rate` per second up to
/// `ceiling`. Pressure that comes back soon after growing doubles `hold` (up to `hold_max`), so that
/// a square wave of demand meets a quiet cache; a long calm halves it again.
class GrowthGovernor {
 public:
  struct Options {
    std::uint64_t floor_bytes = 0, ceiling_bytes = kUnlimited;
    std::uint64_t rate_bytes_per_s = 64u << 20;
    Nanoseconds hold = std::chrono::seconds(1), hold_max = std::chrono::seconds(60);
  };
  explicit GrowthGovernor(const Options& o, TimePoint now) noexcept;
  void on_pressure(TimePoint now, std::uint64_t usage_bytes, std::uint64_t give_back_bytes) noexcept;
  std::uint64_t limit(TimePoint now) noexcept;
  Nanoseconds hold() const noexcept { return hold_; }

 private:
  Options o_;
  std::uint64_t limit_;
  Nanoseconds hold_;
  TimePoint last_pressure_, last_growth_;
  bool grew_ = false;
};

}  // namespace spillway::reclaim
