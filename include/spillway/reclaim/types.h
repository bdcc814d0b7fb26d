// Spillway::reclaim, plain types: what a shrinker is asked and what it answers. C++20, no state.
//
// All sizes are bytes, all times are steady-clock nanoseconds unless the name says otherwise.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>

namespace spillway::reclaim {

using Nanoseconds = std::chrono::nanoseconds;
/// A point on the clock of the registry (steady clock unless a test gave another one).
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Nanoseconds>;
inline constexpr TimePoint kNoDeadline = TimePoint::max();

inline constexpr int kPriorityDefault = 12;  ///< gentlest: scan about 1/4096 of a cache
inline constexpr int kPriorityMax = 0;       ///< everything may go
inline constexpr int kAnyNode = -1;
inline constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

/// Source: Linux's DEFAULT_SEEKS and SHRINK_BATCH.
inline constexpr unsigned kSeeksDefault = 2;
inline constexpr unsigned kBatchDefault = 128;

/// What every verb of the library answers when it may fail. `kOk` is zero.
enum class Errc : std::uint8_t {
  kOk = 0,
  kNoMemory,         ///< an allocation failed; nothing changed
  kLimit,            ///< no id left (shrinkers or groups)
  kInvalid,          ///< null callback, empty handle, bad argument
  kState,            ///< already registered, already removed
  kBusy,             ///< a group that still has children
  kSelfFree,         ///< a callback tried to free the shrinker it runs for: the caller's error
  kDeadlock,         ///< callbacks on two threads tried to free each other's shrinker
  kUnsupported,      ///< this kernel has no such facility
  kIo,               ///< a system call failed; the text says which
};
std::string_view to_string(Errc e) noexcept;

/// Why memory is wanted.
enum class Reason : std::uint8_t {
  kDirect,      ///< a charge failed; a thread waits for the answer
  kBackground,  ///< below the low watermark, or over `high`
  kPressure,    ///< the host or the cgroup said so
  kManual,      ///< an operator's scan
  kOffline,     ///< the group is being removed
  kProactive,   ///< trimming without pressure
};
inline constexpr int kReasons = 6;
std::string_view to_string(Reason r) noexcept;

/// Flags of `Registry::alloc` (S10).
enum class ShrinkerFlags : unsigned {
  kNone = 0,
  kNumaAware = 1u << 0,   ///< is asked once for each node; otherwise node 0 stands for all
  kGroupAware = 1u << 1,  ///< is asked once for each group; otherwise only for the root group
  kNoBlock = 1u << 2,     ///< never blocks, so it is also asked when `may_block` is false
};
constexpr ShrinkerFlags operator|(ShrinkerFlags a, ShrinkerFlags b) noexcept {
  return static_cast<ShrinkerFlags>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}
constexpr bool has(ShrinkerFlags set, ShrinkerFlags bit) noexcept {
  return (static_cast<unsigned>(set) & static_cast<unsigned>(bit)) != 0;
}

/// Answer of `count`. `objects` that could go, the `bytes` they would give back, and bytes that are
/// held but can not go now (`pinned_bytes`, not contained in `bytes`).
///
/// `empty()` is stronger than zero objects: it says that there is *nothing at all* here, so the
/// walk may clear this shrinker's bit; the next object must then be announced with
/// `Shrinker::set_bit`. `{0, 0, pinned}` keeps the bit.
struct CountReport {
  std::uint64_t objects = 0;
  std::uint64_t bytes = 0;
  std::uint64_t pinned_bytes = 0;
  bool is_empty = false;

  static constexpr CountReport empty() noexcept { return {0, 0, 0, true}; }
};

class MemoryGroup;

/// The question. `count` gets the same structure with `nr_to_scan` 0.
struct ScanRequest {
  Reason reason = Reason::kManual;
  int node = 0;
  MemoryGroup* group = nullptr;  ///< never null in a callback; lives at least as long as the call
  int priority = kPriorityDefault;
  std::uint64_t target_bytes = 0;  ///< still wanted by this pass; a hint, 0 = no target
  std::uint64_t nr_to_scan = 0;    ///< look at most at this many objects
  TimePoint deadline = kNoDeadline;
  bool may_block = true;  ///< false: no locks that are held over I/O, no I/O
  void* private_data = nullptr;
};

/// `busy` and `stop` tell "can not" from "freed nothing": after `busy` the walk leaves the shrinker
/// for this pass and defers the work; after `stop` too, but the work counts as refused.
enum class ScanStatus : std::uint8_t { kProgress, kEmpty, kBusy, kStop };
std::string_view to_string(ScanStatus s) noexcept;

/// Answer of `scan`. `scanned` objects were looked at (0 is taken as busy), `freed_objects` of them
/// went and gave `freed_bytes` back.
struct ScanReport {
  std::uint64_t scanned = 0;
  std::uint64_t freed_objects = 0;
  std::uint64_t freed_bytes = 0;
  ScanStatus status = ScanStatus::kProgress;
  // Why the rest of `scanned` stayed; optional, feeds `not_freed` (objects).
  std::uint64_t not_freed_busy = 0;
  std::uint64_t not_freed_pinned = 0;
  std::uint64_t not_freed_dirty = 0;
  std::uint64_t not_freed_referenced = 0;
};

/// Callbacks of one shrinker may run concurrently on many threads, also for the same group and node.
/// They run without any lock of the library and outside of RCU: they may block, register and free
/// *other* shrinkers, create and remove groups. A reclaim started inside a callback does nothing.
using CountFn = std::function<CountReport(const ScanRequest&)>;
using ScanFn = std::function<ScanReport(const ScanRequest&)>;

/// Why memory did not come back; indexes `PassStats::not_freed`, counted in the unit named.
enum class NotFreed : std::uint8_t {
  kBusy,         ///< objects: locked or in use for a moment
  kPinned,       ///< bytes: held by references
  kDirty,        ///< objects: must be written first
  kReferenced,   ///< objects: used recently, got another round
  kProtected,    ///< bytes: below the group's min or low
  kStopped,      ///< calls: scan said stop (or threw)
  kSkipped,      ///< calls: another thread is stuck in it, or it is in quarantine
  kDeferred,     ///< objects: less than a batch, or refused; remembered for the next pass
  kNoBlock,      ///< calls: may block, but the caller may not
};
inline constexpr int kNotFreedReasons = 9;
std::string_view to_string(NotFreed r) noexcept;

/// Diagnostics: the library never prints. Called from any thread, without locks held, but the walk that
/// reports may hold the shrinker it names: inside, free answers kState and reclaim kRecursion.
enum class Severity : std::uint8_t { kInfo, kWarning, kError };
struct Diagnostic {
  Severity severity = Severity::kInfo;
  std::string_view what;      ///< short stable word: "self-free", "overrun", "quarantine", ...
  std::string_view shrinker;  ///< "name-id", empty where none is meant
  std::string_view text;      ///< a sentence
};
using DiagnosticFn = std::function<void(const Diagnostic&)>;

/// The clock, so that tests own time. Implementations are internally synchronised.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint now() noexcept = 0;
  static Clock& steady() noexcept;
};

}  // namespace spillway::reclaim
