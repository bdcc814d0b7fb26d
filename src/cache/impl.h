// The inside of a Cache: nodes, tenants, dirty sets, entitlements. See cache.h for what it does, index.h for the lock
// order. Above those locks: Impl::mutex_ (tables of nodes and tenants), never held while anything blocks or charges.
#pragma once

#include <algorithm>
#include <atomic>
#include <compare>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/cache/cache.h"
#include "src/cache/frames.h"
#include "src/cache/index.h"
#include "src/cache/view.h"
#include "src/io/sync.h"
#include "spillway/reclaim/registry.h"

namespace spillway::cache {

struct Node;

// A trust domain: a top-level memory group. Lives as long as the cache; one whose group went is `dead` and is taken up
// again when a group of that name comes back.
struct Tenant {
  struct alignas(64) Counters {
    std::atomic<uint64_t> hits{0}, misses{0}, joined{0}, read_ahead{0};
  };
  static constexpr unsigned kShards = 16;  // reactors that have one to themselves; the last is everybody else's

  uint32_t index = 0;
  uint32_t bit = FrameStore::kNoTenant;  // in the tenant directory of the frame table
  std::string name;                      // the group's path
  reclaim::GroupRef group;
  uint64_t serial = 0;
  std::atomic<bool> dead{false};
  bool direct = false;                   // some export is in the group itself and not in a sub-group (Impl::mutex_)
  std::unique_ptr<ViewList[]> lists;     // by NUMA node
  std::atomic<uint64_t> entitlement{0};  // pages, without pressure
  std::atomic<uint32_t> scale{kScaleOne};
  std::atomic<uint64_t> scale_time_ns{0};
  std::atomic<uint64_t> dirty{0}, dirty_max{0};  // pages
  std::atomic<uint64_t> in_flight{0}, in_flight_max{kLeafPages};  // pages: frames of reads under way
  std::atomic<uint64_t> evicted{0}, reclaimed{0};
  Counters counters[kShards + 1];

  static constexpr uint32_t kScaleOne = 1u << 20;
  Counters& mine() {
    Reactor* r = Reactor::current_or_null();
    return counters[r != nullptr && r->index() < kShards ? r->index() : kShards];
  }
  // On the reactor of that index: without a locked instruction where the shard is that reactor's own.
  void count_hits(uint64_t n, uint32_t reactor) {
    std::atomic<uint64_t>& h = counters[std::min<uint32_t>(reactor, kShards)].hits;
    if (reactor < kShards) [[likely]] h.store(h.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
    else h.fetch_add(n, std::memory_order_relaxed);
  }
  uint64_t pages(int numa_nodes) const {
    uint64_t n = 0;
    for (int i = 0; i < numa_nodes; ++i) n += lists[static_cast<size_t>(i)].pages();
    return n;
  }
};

// What one tenant has written to one node and what is not yet below. tenant null: adopted from a predecessor.
struct DirtySet {
  struct Page {
    uint64_t page;
    FrameId frame;
    auto operator<=>(const Page&) const = default;
  };
  Node* node = nullptr;
  Tenant* tenant = nullptr;
  AsyncMutex round;            // one writeback round at a time
  SpinLock lock;               // below a leaf's lock
  std::vector<Page> pages;     // may name frames that are clean again, or twice; a round checks
  uint64_t next_ticket = 0;    // of flushes (lock)
  uint64_t done_ticket = 0;    // flushes below it are answered by `last` (round)
  Status last;                 // (round)
  std::atomic<bool> running{false};  // a background round is under way or asked for
  std::atomic<uint64_t> errors{0};

  void push(uint64_t page, FrameId f) {
    std::lock_guard guard(lock);
    pages.push_back({page, f});
  }
  bool any() {
    std::lock_guard guard(lock);
    return !pages.empty();
  }
};

// A data node. Lives as long as the cache, or until forget().
struct Node {
  Node(uint32_t s, std::string k, uint64_t pages) : slot(s), key(std::move(k)), index(this, pages) {}
  const uint32_t slot;
  const std::string key;
  Index index;
  std::mutex mutex;                      // the three below; leaf of the lock order, never with a spin lock held
  std::weak_ptr<Volume> lower;
  std::vector<Tenant*> views;            // by view slot; null = free
  std::vector<std::unique_ptr<DirtySet>> sets;  // by view slot
  DirtySet recovered;
  std::atomic<uint64_t> resident{0}, dirty{0};  // pages

  std::shared_ptr<Volume> volume() {
    std::lock_guard guard(mutex);
    return lower.lock();
  }
};

}  // namespace spillway::cache

namespace spillway {

struct Cache::Impl final : reclaim::GroupObserver {
  using FrameId = cache::FrameId;
  using Leaf = cache::Leaf;
  using Node = cache::Node;
  using Tenant = cache::Tenant;
  using DirtySet = cache::DirtySet;
  using PendingRead = cache::PendingRead;
  using ViewChunk = cache::ViewChunk;
  using ViewList = cache::ViewList;

  explicit Impl(CacheOptions o) : options(std::move(o)) {}
  ~Impl() override;

  // Test hooks: each breaks one rule that non-interference rests on (tests/sim must catch it).
  enum class Mutant : uint8_t {
    kNone, kUseResidentAtOnce, kEvictFewestViews, kShrinkByUsage, kDiscardDropsOthers, kAheadOnLoading,
    kRoomBeforeUse, kUseAfterWait
  };
  Mutant mutant = Mutant::kNone;

  CacheOptions options;
  std::unique_ptr<cache::FrameStore> store;
  reclaim::Registry* registry = nullptr;
  reclaim::Shrinker shrinker;
  int numa = 1;

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::map<std::string, Node*> by_key_;
  std::vector<std::unique_ptr<Tenant>> tenants_;
  std::vector<std::weak_ptr<Volume>> volumes_;
  std::atomic<uint64_t> capacity_bytes{0};
  std::atomic<uint64_t> unclaimed{0};
  std::atomic<uint64_t> peak{0}, reclaimed{0}, merged{0}, bypassed{0}, shortage{0};
  std::atomic<uint64_t> adopted{0}, adopted_dirty{0}, dirty_total{0};
  std::atomic<uint64_t> wb_bytes{0}, wb_requests{0}, wb_errors{0};
  std::atomic<uint64_t> retired_hits{0}, retired_misses{0};

  // ---- cache.cc
  Result<void> start();
  uint64_t in_flight_pages() const;
  Node& node_of(const std::string& key, uint32_t slot, uint64_t pages);  // mutex_ held
  // asks: for a request of that very group (Tenant::direct).
  Tenant* tenant_of(GroupId group, bool asks = true);
  Tenant& make_tenant(const reclaim::GroupRef& top, bool* fresh);
  uint32_t view_slot(Node& n, Tenant& t, DirtySet** set);
  void recompute();                       // entitlements of all tenants
  void apply_capacity(Tenant& t);         // list capacities from entitlement and scale
  void grow_back(Tenant& t);
  uint64_t now_ns() const;
  uint64_t trim(Tenant& t, bool by_host); // evicts down to the capacity; pages
  uint64_t pressure(Tenant& t, double fraction);
  void claim(Tenant& t);                  // adopted frames that were in the tenant's view
  void claim_all();
  void drop_unclaimed();
  void group_offline(reclaim::MemoryGroup& child, reclaim::MemoryGroup& parent) override;
  reclaim::CountReport count(const reclaim::ScanRequest& r);
  reclaim::ScanReport scan(const reclaim::ScanRequest& r);

  // ---- frames in views (cache.cc). `list` = the list lock is held, `leaf` = the leaf's lock is held.
  int numa_of(uint64_t leaf_number) const { return static_cast<int>(leaf_number % static_cast<uint64_t>(numa)); }
  uint64_t evict(Tenant& t, ViewList& list, uint64_t n);                    // list; pages let go
  void drop_view(Leaf& leaf, unsigned i, FrameId f, Tenant& t);             // leaf
  void settle(Leaf& leaf, unsigned i, FrameId f);                           // leaf; after dirty/writeback/writers fell
  void forget_view(Tenant& t);            // all of it, order and ghosts too
  std::pair<ViewChunk*, unsigned> victim_of(ViewList& list);                // list; the policy, or a mutant of it
  void release_dead_chunks(ViewList& list);                                 // list
  ViewChunk* chunk_of(Leaf& leaf, uint32_t slot, ViewList& list);           // list, leaf
  void install(Leaf& leaf, unsigned i, FrameId f);                          // leaf; frame private until then
  // leaf; `fresh` (private, the same data) takes the place of `old` (clean) in the index and in all views. Who is copying
  // from the old one has a reference and goes on.
  void replace(Leaf& leaf, unsigned i, FrameId old, FrameId fresh);
  void join_view(Leaf& leaf, unsigned i, FrameId f, Tenant& t);             // leaf
  // A frame for a read of the tenant, kNoFrame when it has too many under way already (so that it never is short of
  // frames because of others). Where there is none the view changes all the same and the data goes around the cache.
  FrameId frame_for_read(Tenant& t, int numa_node);
  void put(FrameId f) {
    // acq_rel: the last user's accesses happen before the frame's next life.
    if (store->frame(f).refs.fetch_sub(1, std::memory_order_acq_rel) == 1) store->free(f);
  }
  // Room for n more pages in the tenant's view on `numa_node`: evicts what is over its capacity, charges the rest.
  void make_room(Tenant& t, int numa_node, uint64_t n);
  void uncharge(Tenant& t, int numa_node, uint64_t pages) {
    if (pages != 0) t.group->uncharge(pages * kPageSize, numa_node);
  }
  void note_peak();
  void punch_if_many();
  void refill_if_few();

  // ---- writing into frames (writeback.cc)
  void begin_write(Leaf& leaf, unsigned i, FrameId f);                      // leaf
  void end_write(Leaf& leaf, unsigned i, FrameId f, DirtySet& set);         // leaf; marks dirty
  Task<Status> write_round(DirtySet& set, uint64_t first_page = 0, uint64_t end_page = UINT64_MAX);  // set.round held
  Task<Status> write_batch(DirtySet& set, const DirtySet::Page* pages, size_t n, Volume& lower);
  Task<Status> flush_set(DirtySet& set, Volume& lower, bool flush_lower);
  Task<Status> flush_node(Node& n, DirtySet* own);  // own, or every set when null; then the volume below
  Task<Status> flush_everything();
  void kick(DirtySet& set);
  void start_ticker();
  Task<void> tick();
  Task<void> run_set(DirtySet* set);
  Task<void> stop_background();

  AsyncCounter background_tasks;
  std::atomic<bool> closing{false};
  std::atomic<bool> ticking{false};
  std::atomic<bool> punching{false}, refilling{false};
  std::atomic<bool> claimed_all{false};
  IoAwait* tick_sleep = nullptr;  // background reactor only
  std::minstd_rand refill_random{std::random_device{}()};  // background reactor only
};

}  // namespace spillway
