// Registry: shrinkers, groups and the walk that joins them. Instantiable; internally synchronised.
//
// Shrinkers and group references must be gone before the registry; if not, its destructor aborts.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "spillway/reclaim/group.h"
#include "spillway/reclaim/shrinker.h"
#include "spillway/reclaim/types.h"

namespace spillway::reclaim {

struct RegistryOptions {
  int nodes = 1;                        ///< NUMA nodes, 1..64
  std::uint32_t max_groups = 65536;     ///< 2..65536; ids are below it
  unsigned ref_shards = 0;              ///< reference counts per shrinker; 0 = one per core, up to 8
  unsigned charge_slots = 0;            ///< stocks per group; 0 = one per core, up to 16
  std::uint64_t charge_batch_bytes = 64 * 4096;
  Nanoseconds time_budget = std::chrono::milliseconds(50);  ///< per callback
  unsigned quarantine_after = 3;        ///< consecutive overruns (or throws) that lead to quarantine
  Nanoseconds quarantine_time = std::chrono::seconds(1);    ///< doubles each time, up to 64 x
  unsigned workers = 0;                 ///< threads of a parallel reclaim; 0 = cores, up to 4
  std::uint32_t trace_events = 1024;    ///< ring of the pass trace
  DiagnosticFn diagnostics;
  Clock* clock = nullptr;               ///< null = Clock::steady()
  /// Tests: called by every try_charge; true = reclaim first, as if memory were short (openzfs's habit).
  std::function<bool()> fake_low_memory;
};

struct ReclaimRequest {
  MemoryGroup* group = nullptr;          ///< subtree to take from; null = root
  int node = kAnyNode;
  Reason reason = Reason::kProactive;
  std::uint64_t target_bytes = kUnlimited;
  /// Passes go from here to `priority_end`, until the target is met.
  int priority = kPriorityDefault;
  int priority_end = kPriorityMax;
  TimePoint deadline = kNoDeadline;
  bool may_block = true;
  bool ignore_low = false;               ///< also take what `low` protects (min always holds)
  bool parallel = false;                 ///< let the registry's workers help
};

enum class ReclaimStatus : std::uint8_t {
  kReached,    ///< target met
  kExhausted,  ///< all priorities done, less than the target
  kDeadline,
  kRecursion,  ///< called inside a shrinker callback: nothing done
};
std::string_view to_string(ReclaimStatus s) noexcept;

struct ReclaimResult {
  ReclaimStatus status = ReclaimStatus::kExhausted;
  std::uint64_t freed_bytes = 0;
  std::uint64_t freed_objects = 0;
  std::uint64_t scanned = 0;
  std::uint64_t calls = 0;            ///< scan callbacks
  std::uint64_t shrinkers = 0;        ///< (shrinker, group, node) visits
  std::uint64_t groups = 0;           ///< group visits
  int priority = kPriorityDefault;    ///< of the last pass
  std::array<std::uint64_t, kNotFreedReasons> not_freed{};
  Nanoseconds elapsed{0};
};

struct ShrinkerStats {
  std::uint32_t id = 0;
  std::string name;                  ///< "name-id"
  bool registered = false;
  bool quarantined = false;
  ShrinkerFlags flags = ShrinkerFlags::kNone;
  unsigned seeks = 0, batch = 0;
  std::uint64_t count_calls = 0, scan_calls = 0, scanned = 0, freed_objects = 0, freed_bytes = 0;
  std::uint64_t busy = 0, stops = 0, empties = 0, throws = 0, misreports = 0, overruns = 0;
  std::uint64_t skipped = 0;
  Nanoseconds time_total{0}, time_max{0};
  /// [i] = callbacks that took [2^i, 2^(i+1)) * 64 ns; the last one is open-ended.
  std::array<std::uint32_t, 24> latency{};
  ScanStatus last_status = ScanStatus::kProgress;
  std::array<std::uint64_t, kNotFreedReasons> not_freed{};
};

struct CountRow {
  std::uint32_t group_id = 0;
  std::string group_path;
  std::vector<CountReport> nodes;
  std::vector<std::uint64_t> deferred;  ///< objects, per node
};

struct TraceEvent {
  TimePoint when{};
  std::uint64_t pass = 0;
  enum class Kind : std::uint8_t { kBegin, kShrink, kSkip, kEnd } kind = Kind::kBegin;
  Reason reason = Reason::kManual;
  ScanStatus status = ScanStatus::kProgress;
  std::uint32_t shrinker_id = 0, group_id = 0;
  int node = 0, priority = 0;
  std::uint64_t freeable = 0, scanned = 0, freed_bytes = 0;
  Nanoseconds elapsed{0};
};

/// Told when a group goes, so that a cache can move its objects to the parent. Called by
/// remove_group after the group was marked dead (adders that look at `dead()` under the cache's own
/// list lock go to the parent from then on) and before its id leaves the table. No lock is held.
class GroupObserver {
 public:
  virtual ~GroupObserver() = default;
  virtual void group_offline(MemoryGroup& child, MemoryGroup& parent) = 0;
};

/// Watermarks of the background thread, per node, in bytes of `capacity - usage`.
struct Watermarks {
  std::uint64_t low = 0;   ///< below it the thread starts
  std::uint64_t high = 0;  ///< above it the thread rests
};

struct BackgroundStats {
  std::uint64_t wakeups = 0, runs = 0, freed_bytes = 0, gave_up = 0;
};

class Registry {
 public:
  struct Impl;  ///< opaque

  explicit Registry(RegistryOptions o = {});
  ~Registry();
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;

  const RegistryOptions& options() const noexcept;
  Clock& clock() const noexcept;

  // ---- shrinkers: alloc, then Shrinker::register_ and Shrinker::free ----
  /// A complete, inactive shrinker; empty when memory or ids ran out (`why` tells which).
  Shrinker alloc(ShrinkerFlags flags, std::string_view name, Errc* why = nullptr);

  /// Shrinker::set_bit by id, for callers that have no handle. An id nobody has is ignored.
  void set_bit(std::uint32_t shrinker_id, MemoryGroup& group, int node = 0) noexcept;

  // ---- groups ----
  GroupRef root() noexcept;
  /// Name: 1..127 bytes without '/', unique among siblings. Empty on failure.
  GroupRef create_group(std::string_view name, MemoryGroup* parent = nullptr, Errc* why = nullptr);
  /// By path ("/a/b", or "a" for a top-level group), or by id. Empty when there is none.
  GroupRef find_group(std::string_view path) noexcept;
  GroupRef find_group(std::uint32_t id) noexcept;
  /// Re-parents objects (through the observers), deferred work and charges, exactly once each, under
  /// concurrent adds; then takes the name out of the tree. kBusy while it has children.
  Errc remove_group(MemoryGroup& group);
  std::vector<GroupRef> groups();
  /// Observers live until remove_observer returned; that waits for running calls.
  void add_observer(GroupObserver& o);
  void remove_observer(GroupObserver& o);

  // ---- reclaim ----
  ReclaimResult reclaim(const ReclaimRequest& r);
  /// True while this thread runs inside a callback (shrinker's or diagnostics) of any registry.
  static bool in_reclaim() noexcept;

  /// Physical bytes a node may hold and where its background thread starts and rests. Usage of a node
  /// is what was charged with that node.
  void set_capacity(int node, std::uint64_t bytes, Watermarks w);
  std::uint64_t node_usage(int node) const noexcept;
  /// One thread a node; idle threads sleep without a timer. Stopped by the destructor too.
  Errc start_background();
  void stop_background();
  /// Asks node's thread (kAnyNode: all) for `bytes` more, from any thread, never blocks.
  void request_background(int node, std::uint64_t bytes, Reason reason = Reason::kPressure) noexcept;
  BackgroundStats background_stats(int node) const;

  // ---- introspection (S9) ----
  std::vector<ShrinkerStats> list();
  ShrinkerStats stats(std::uint32_t shrinker_id);  ///< name empty when there is none
  /// Asks it now, group by group and node by node. Empty inside a callback, or when there is none.
  std::vector<CountRow> counts(std::uint32_t shrinker_id);
  /// One scan call by hand, as debugfs `scan`. kState inside a callback; kInvalid: no such shrinker, or one
  /// that does not know this group or node.
  Errc scan(std::uint32_t shrinker_id, MemoryGroup& group, int node, std::uint64_t nr,
            ScanReport* out = nullptr);
  std::vector<TraceEvent> trace() const;
  /// Totals of all passes since the start.
  ReclaimResult totals() const;
  std::string to_text();                                  ///< everything, for people
  std::string counts_text(std::uint32_t shrinker_id);     ///< lines `path n0 n1 ...`
  std::string trace_text() const;

 private:
  friend class Shrinker;
  friend class MemoryGroup;
  friend struct RegistryAccess;
  friend struct GroupAccess;
  std::unique_ptr<Impl> impl_;
};

/// Explains a result in words: how much, how far, and why the rest stayed.
std::string to_text(const ReclaimResult& r);

}  // namespace spillway::reclaim
