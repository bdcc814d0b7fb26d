// The structures behind the public handles, and what protects what.
//
//   IdTable       fixed-depth radix tree id -> ShrinkerImpl. Nodes are added and never removed before
//                 the registry goes, so only the leaf slot needs RCU. Slots change under ids_mutex_.
//   ShrinkerImpl  what a lookup finds: reference counts (one word per CPU shard) and completion on the first
//                 line; callbacks, statistics, name for whoever holds a reference. Type-stable: free hands
//                 it to the next alloc at once (warm memory in a storm of register and free), and to the
//                 allocator only after a grace period. So a lookup looks again after its try_get (shrinker.cc).
//   GroupTable    id -> group, slots change under groups_mutex_, read under RCU + try_get.
//   Info/Block/Unit  per (group, node): a fixed-depth radix tree of bits and deferred work. Nodes are
//                 installed by compare-exchange and live exactly as long as the group, so a walker
//                 that holds a group reference needs no RCU for them, and nothing is ever copied.
//   active_       per node: which groups have any bit, two levels, fixed size.
//
// Lock order: groups_mutex_ and ids_mutex_ are leaves, never nested, never held over a callback, an
// allocation failure path or a reference drop. There are no other locks on the paths of S1-S7.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <functional>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "spillway/reclaim/rcu.h"
#include "spillway/reclaim/registry.h"
#include "src/reclaim/atomic.h"
#include "src/reclaim/shrink_math.h"

namespace spillway::reclaim {

inline constexpr std::uint32_t kFan = 64;
inline constexpr std::uint32_t kMaxShrinkers = kFan * kFan * kFan;
inline constexpr int kMaxNodes = 64;
inline constexpr int kMaxGroupDepth = 32;
inline constexpr unsigned kMaxRecords = 128;

template <class T>
struct Destroy {
  void operator()(T* p) const noexcept { destroy(p); }
};

// ---------------------------------------------------------------- shrinkers

/// One share of the references, so that walkers on different cores write different lines (S7). Each shard
/// is a complete reference count of its own: 0 -> not there.
struct alignas(64) RefShard {
  Atomic<std::uint64_t> refs{0};
};

/// One share of the statistics.
struct alignas(64) Shard {
  std::atomic<std::uint64_t> scan_calls{0}, scanned{0}, freed_objects{0}, freed_bytes{0}, time_ns{0};
  std::array<std::atomic<std::uint32_t>, 24> latency{};
};

/// Rare events; one line for all threads.
struct alignas(64) RareStats {
  std::atomic<std::uint64_t> busy{0}, stops{0}, empties{0}, throws{0}, misreports{0}, overruns{0};
  std::atomic<std::uint64_t> skipped{0}, time_max_ns{0};
  std::atomic<std::uint8_t> last_status{0};
  std::array<std::atomic<std::uint64_t>, kNotFreedReasons> not_freed{};
};

struct NameText : RcuObject<NameText, Destroy<NameText>> {
  char text[128];
};

struct ShrinkerImpl;
struct ReleaseShrinker {
  void operator()(ShrinkerImpl* s) const noexcept;
};

/// One block of memory: this, then rare statistics, statistics and references by shard. The block is made
/// once and serves many shrinkers, one after the other. The atomics are valid as long as the block is;
/// everything else belongs to the owner until register_ and to holders of a reference afterwards.
/// Statistics are cleaned at free, and only if a walk ever came by.
struct alignas(64) ShrinkerImpl : RcuObject<ShrinkerImpl, ReleaseShrinker> {
  ShrinkerImpl(Registry::Impl* registry, unsigned shards_wanted) noexcept;
  ~ShrinkerImpl();

  Registry::Impl* const reg;
  const unsigned nshards;
  Atomic<std::uint16_t> flags_seen{0};  // = flags; read by id, without a reference

  // Completion: shards whose initial reference is not yet gone; the last put of the last one sets
  // `done` and wakes whoever is kWaiting. kOrphan instead of a waiter: the last put finishes the free.
  static constexpr std::uint32_t kOpen = 0, kDone = 1, kOrphan = 2, kWaiting = 3;
  Atomic<std::uint32_t> live_shards{0};
  Atomic<std::uint32_t> done{kOpen};

  // Written between alloc and register_ by the owner, read-only afterwards; published by the
  // release store of the reference counts.
  std::uint32_t id = 0;
  std::uint32_t generation = 0;
  ShrinkerFlags flags = ShrinkerFlags::kNone;
  unsigned seeks = kSeeksDefault, batch = kBatchDefault;
  std::int64_t budget_ns = 0;
  CountFn count;
  ScanFn scan;
  void* private_data = nullptr;
  bool registered = false;  // owner only: what free has to undo (S1)
  ShrinkerImpl* next_free = nullptr;  // in the pool, guarded by blocks_mutex

  // Health.
  std::atomic<bool> visited{false};
  std::atomic<std::uint32_t> strikes{0}, quarantines{0};
  std::atomic<std::int64_t> quarantined_until_ns{0};

  RcuPtr<NameText> name;
  NameText first_name;

  RareStats& rare() const noexcept { return *reinterpret_cast<RareStats*>(after(sizeof(ShrinkerImpl))); }
  Shard& stats(unsigned i) const noexcept { return reinterpret_cast<Shard*>(&rare() + 1)[i]; }
  Atomic<std::uint64_t>& refs(unsigned i) const noexcept {
    return reinterpret_cast<RefShard*>(&stats(nshards))[i].refs;
  }
  static constexpr std::size_t block_size(unsigned nshards) noexcept {
    return sizeof(ShrinkerImpl) + sizeof(RareStats) + nshards * (sizeof(Shard) + sizeof(RefShard));
  }

  bool try_get(unsigned shard) noexcept;
  void put(unsigned shard) noexcept;
  void drop_initial() noexcept;
  void wait_done() noexcept;
  void reset_stats() noexcept;
  std::string label() const;

 private:
  char* after(std::size_t n) const noexcept {
    return const_cast<char*>(reinterpret_cast<const char*>(this)) + n;
  }
};

/// RAII reference; never put by hand (weakness 4).
class ShrinkerRef {
 public:
  ShrinkerRef() noexcept = default;
  ShrinkerRef(ShrinkerImpl* s, unsigned shard) noexcept : s_(s), shard_(shard) {}
  ShrinkerRef(ShrinkerRef&& o) noexcept : s_(std::exchange(o.s_, nullptr)), shard_(o.shard_) {}
  ShrinkerRef& operator=(ShrinkerRef&& o) noexcept {
    if (this != &o) {
      reset();
      s_ = std::exchange(o.s_, nullptr);
      shard_ = o.shard_;
    }
    return *this;
  }
  ~ShrinkerRef() { reset(); }
  void reset() noexcept {
    if (s_ != nullptr) std::exchange(s_, nullptr)->put(shard_);
  }
  explicit operator bool() const noexcept { return s_ != nullptr; }
  ShrinkerImpl* operator->() const noexcept { return s_; }
  ShrinkerImpl& operator*() const noexcept { return *s_; }
  unsigned shard() const noexcept { return shard_; }

 private:
  ShrinkerImpl* s_ = nullptr;
  unsigned shard_ = 0;
};

class IdTable {
 public:
  IdTable() = default;
  ~IdTable();
  /// Under RCU. Null: no shrinker has this id. What is found may be gone, or be somebody else by now.
  ShrinkerImpl* lookup(std::uint32_t id) const noexcept;
  /// Takes the lowest free id, sets s.id and s.generation, publishes the pointer.
  Errc insert(ShrinkerImpl& s) noexcept;
  void erase(ShrinkerImpl& s) noexcept;
  std::uint32_t limit() const noexcept { return limit_.load(std::memory_order_acquire); }
  std::uint32_t size() const noexcept { return size_.load(std::memory_order_relaxed); }

 private:
  struct Leaf {
    RcuPtr<ShrinkerImpl> slot[kFan];
    std::uint32_t generation[kFan] = {};  // guarded by mutex_
  };
  struct Mid {
    RcuPtr<Leaf> leaf[kFan];
  };
  RcuPtr<Mid> top_[kFan];
  Mutex mutex_;
  // Free ids: bit set = full. Guarded by mutex_.
  std::uint64_t used_[kFan * kFan] = {};
  std::uint64_t full_[kFan] = {};
  std::uint64_t full_top_ = 0;
  Atomic<std::uint32_t> limit_{0};  // ids below it have been used
  Atomic<std::uint32_t> size_{0};
};

// ---------------------------------------------------------------- bits and deferred work

struct Unit {
  Atomic<std::uint64_t> map{0};
  Atomic<std::uint64_t> claim{0};  // parallel passes: last pass that took this unit
  Atomic<std::uint64_t> deferred[kFan] = {};
};
struct Block {
  Atomic<std::uint64_t> summary{0};
  RcuPtr<Unit> units[kFan];
  ~Block();
};
struct Info {
  Atomic<std::uint64_t> summary{0};
  RcuPtr<Block> blocks[kFan];
  ~Info();
};

inline std::uint32_t block_of(std::uint32_t id) { return id / (kFan * kFan); }
inline std::uint32_t unit_of(std::uint32_t id) { return id / kFan % kFan; }
inline std::uint32_t bit_of(std::uint32_t id) { return id % kFan; }
inline std::uint64_t mask(std::uint32_t bit) { return std::uint64_t{1} << bit; }

// Deferred cell: generation of the shrinker (20 bits) | work in 1/4096 objects (44 bits). A cell of
// another generation reads as 0, so the next owner of an id inherits nothing (weakness 7). The value
// kDeadWork says that the group's work moved to its parent.
inline constexpr int kWorkBits = 44;
inline constexpr std::uint64_t kWorkMask = (std::uint64_t{1} << kWorkBits) - 1;
inline constexpr std::uint64_t kDeadWork = kWorkMask;
inline constexpr std::uint64_t kWorkMax = kWorkMask - 1;
inline constexpr std::uint32_t kGenerationMask = (1u << (64 - kWorkBits)) - 1;

// ---------------------------------------------------------------- groups

struct alignas(64) Stock {
  Atomic<std::uint64_t> bytes{0};
};

struct MemoryGroup::State : RcuObject<MemoryGroup::State, Destroy<MemoryGroup::State>> {
  Atomic<std::uint64_t> refs{1};
  Atomic<std::uint32_t> dead{0};
  Atomic<std::uint64_t> min{0}, low{0}, high{kUnlimited}, max{kUnlimited};
  Atomic<std::uint32_t> weight{100};
  alignas(64) Atomic<std::uint64_t> usage{0};
  Atomic<std::uint64_t> min_usage{0}, low_usage{0};                    // own min(usage, x)
  Atomic<std::uint64_t> children_min_usage{0}, children_low_usage{0};  // sums of the children's
  std::atomic<std::uint64_t> charge_failures{0}, direct_reclaims{0}, high_events{0}, low_events{0},
      reclaimed_bytes{0};
  Stock* stocks = nullptr;      // [slots]
  unsigned slots = 0;
  RcuPtr<Info>* info = nullptr;           // [nodes]
  Atomic<std::uint32_t>* overflow = nullptr;  // [nodes]: a unit could not be made, visit everybody
  int nodes = 0;
  int depth = 0;
  Atomic<std::uint32_t> children{0};  // changed under groups_mutex
  Atomic<int> high_fd{-1};      // eventfd of open_group_limit
  bool listed = false;          // guarded by groups_mutex_
  MemoryGroup* owner = nullptr;
  ~State();
};

struct GroupAccess {
  static MemoryGroup::State& state(const MemoryGroup& g) noexcept { return *g.state_; }
  static bool try_get(MemoryGroup& g) noexcept;
  static void put(MemoryGroup* g) noexcept;
  static GroupRef adopt(MemoryGroup* g) noexcept { return GroupRef(g); }
  static MemoryGroup* make(Registry& r, MemoryGroup* parent, std::string_view name) noexcept;
  static void free_unpublished(MemoryGroup* g) noexcept;
  static void set_id(MemoryGroup& g, std::uint32_t id, std::uint64_t serial) noexcept {
    g.id_ = id;
    g.serial_ = serial;
  }
};

// ---------------------------------------------------------------- passes

/// One per thread that is inside a pass: what it runs and since when, so that others can tell a slow
/// callback from a fast one without touching the shrinker, and a ring of its trace.
struct alignas(64) WalkRecord {
  Atomic<std::uint32_t> owned{0};
  Atomic<std::uint64_t> call{0};          // odd while inside a callback
  Atomic<std::uint64_t> key{0};           // call_key() of that callback
  Atomic<std::int64_t> start_ns{0}, budget_ns{0};
  Atomic<std::uint64_t> stuck{0};         // the `call` that a watcher found over its budget
  Atomic<std::uint64_t> waiting_for{0};   // shrinker id + 1 that this callback is freeing

  struct Slot {
    std::atomic<std::uint64_t> seq{0};
    std::array<std::atomic<std::uint64_t>, 7> words{};
  };
  RcuPtr<Slot> ring;
  std::uint32_t ring_size = 0;
  std::atomic<std::uint64_t> ring_next{0};
};
inline std::uint64_t call_key(std::uint32_t shrinker, std::uint32_t group, int node) {
  return (std::uint64_t{shrinker} + 1) << 32 | std::uint64_t{group} << 8 | static_cast<unsigned>(node);
}

/// What this thread is inside of: a shrinker's callback, or (null) a diagnostics callback. Frames of
/// shrinkers do not nest: reclaim, scan and counts are refused inside.
struct CallFrame {
  Registry::Impl* reg;
  ShrinkerImpl* shrinker;
  WalkRecord* record;
};
extern thread_local CallFrame* t_frame;

struct Pass;

struct alignas(64) NodeState {
  Atomic<std::uint64_t> capacity{kUnlimited}, low{0}, high{0};
  Atomic<std::uint64_t> wanted{0};
  Atomic<std::uint32_t> wake{0};
  Atomic<std::uint32_t> reason{static_cast<std::uint32_t>(Reason::kBackground)};
  std::atomic<std::int64_t> rest_until_ns{0};
  std::atomic<std::uint64_t> wakeups{0}, runs{0}, freed{0}, gave_up{0};
  Atomic<std::uint64_t>* active = nullptr;   // [max_groups / 64]
  Atomic<std::uint64_t> active_summary[16] = {};
  Atomic<std::uint32_t> cursor{0};           // group id where the next pass starts
  std::thread thread;
};

struct WorkerPool;

struct Registry::Impl {
  ~Impl();
  Registry* self = nullptr;
  RegistryOptions opt;
  Clock* clock = nullptr;
  IdTable ids;
  std::unique_ptr<NodeState[]> nodes;

  // Groups. Table slots are written under groups_mutex, read under RCU + try_get.
  Mutex groups_mutex;
  RcuPtr<MemoryGroup>* group_table = nullptr;  // [max_groups]
  std::vector<std::uint64_t> group_ids;        // bit set = in use; guarded by groups_mutex
  std::uint64_t next_serial = 0;
  /// Names in use among siblings, by the parent's serial; guarded by groups_mutex.
  struct Names {
    bool try_emplace_name(std::uint64_t parent, std::string_view name) noexcept;
    void erase_name(std::uint64_t parent, std::string_view name) noexcept;
    std::unordered_set<std::string> set;
  } group_names;
  MemoryGroup* root = nullptr;
  Atomic<std::uint32_t> group_count{0};
  Atomic<std::uint32_t> group_limit{0};

  // Observers: guarded by observers_mutex; `busy` counts running calls.
  Mutex observers_mutex;
  struct ObserverSlot {
    GroupObserver* o = nullptr;
    std::uint32_t busy = 0;
  };
  std::vector<ObserverSlot> observers;
  Atomic<std::uint32_t> observers_changed{0};

  // Charged bytes by slot and node: usage_slots[slot * nodes + node], unbatched, summed on read.
  struct alignas(64) UsageCell {
    std::atomic<std::int64_t> bytes{0};
  };
  UsageCell* node_usage = nullptr;
  unsigned usage_slots = 1;

  WalkRecord* records = nullptr;  // [kMaxRecords]
  Atomic<std::uint32_t> stuck_count{0};
  std::atomic<std::int64_t> next_watch_ns{0};
  std::atomic<std::uint64_t> next_pass{1};
  std::atomic<bool> stopping{false};
  std::atomic<bool> background_on{false};
  Atomic<std::uint32_t> background_stop{0};
  WorkerPool* workers = nullptr;
  Mutex workers_mutex;

  // Totals of all passes.
  struct alignas(64) Totals {
    std::atomic<std::uint64_t> freed_bytes{0}, freed_objects{0}, scanned{0}, calls{0}, shrinkers{0},
        groups{0}, passes{0};
    std::array<std::atomic<std::uint64_t>, kNotFreedReasons> not_freed{};
  } totals;

  std::int64_t now_ns() const noexcept { return clock->now().time_since_epoch().count(); }
  void diag(Severity sev, std::string_view what, const ShrinkerImpl* s, std::string_view text) noexcept;

  // bits.cc
  Unit* find_unit(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  Unit* make_unit(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  void set_bit(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  void propagate(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  void propagate_block(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  void mark_active(MemoryGroup& g, int node) noexcept;
  void settle_up(MemoryGroup& g, int node, std::uint32_t id) noexcept;
  void clear_active(std::uint32_t group_id) noexcept;
  std::uint64_t claim_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s) noexcept;
  void add_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s, std::uint64_t work,
                    std::uint64_t cap) noexcept;
  std::uint64_t read_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s) noexcept;
  void move_up(MemoryGroup& child, MemoryGroup& parent) noexcept;
  void move_deferred_cell(MemoryGroup& child, int node, std::uint32_t id, Unit& u) noexcept;

  // shrinker.cc
  /// Blocks of freed shrinkers for the next alloc; what is more goes back to the allocator by RCU.
  static constexpr std::uint32_t kPoolMax = 1024;
#ifdef SPILLWAY_RECLAIM_POISON
  std::uint32_t pool_max = 0;  // the tests want to see a use after free; one sets it
#else
  std::uint32_t pool_max = kPoolMax;
#endif
  Mutex blocks_mutex;
  ShrinkerImpl* pool = nullptr;     // guarded by blocks_mutex
  std::uint32_t pool_size = 0;      // guarded by blocks_mutex
  ShrinkerImpl* make_shrinker() noexcept;
  void recycle(ShrinkerImpl& s) noexcept;  // no references, no slot
  void free_blocks() noexcept;
  /// The reference of step 3 in walk.cc. `there` tells an empty slot from one without a reference.
  ShrinkerRef get(std::uint32_t id, bool* there = nullptr) noexcept;
  Errc free_shrinker(ShrinkerImpl& s, bool orphan_on_error) noexcept;
  void finish_free(ShrinkerImpl& s) noexcept;

  // group.cc
  GroupRef get_group(std::uint32_t id) noexcept;
  void account_node(int node, std::int64_t delta) noexcept;
  std::uint64_t node_usage_sum(int node) const noexcept;
  void check_watermark(int node) noexcept;
  void update_protected(MemoryGroup& g) noexcept;

  // walk.cc
  WalkRecord* take_record() noexcept;
  void give_record(WalkRecord* r) noexcept;
  void watch(std::int64_t now) noexcept;
  bool is_stuck(std::uint64_t key, bool any_inside, const WalkRecord* self_rec) const noexcept;
  ReclaimResult reclaim(const ReclaimRequest& r);
  /// One scan call of `nr`, or one count call when `nr` is 0.
  std::pair<CountReport, ScanReport> by_hand(ShrinkerImpl& s, unsigned shard, MemoryGroup& g, int node,
                                             std::uint64_t nr) noexcept;
  void trace_event(WalkRecord* r, const TraceEvent& e) noexcept;

  // background.cc
  void background_main(int node);
  void stop_threads();
};

struct RegistryAccess {
  static Registry::Impl& impl(Registry& r) noexcept { return *r.impl_; }
  static ShrinkerImpl* impl(const Shrinker& s) noexcept { return s.impl_; }
};

}  // namespace spillway::reclaim
