// ListLru: per group and node LRU lists, so that a cache author writes two callbacks and no
// bookkeeping. Internally synchronised: one small lock per (group, node) list.
//
// The cache embeds an LruItem in its objects, calls add/del, and in its shrinker callbacks
// count(request) and walk(request, isolate). Bits are set and removed groups are re-parented here.
//
// Lock order: the cache's own locks are outside the list lock, except in `isolate`, which runs under
// the list lock (and under RCU) and therefore may only try_lock and must not block; collect the victims
// on a list of your own and free them after walk() has returned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "spillway/reclaim/registry.h"

namespace spillway::reclaim {

struct LruItem {
  LruItem* prev = nullptr;
  LruItem* next = nullptr;
  bool linked() const noexcept { return next != nullptr; }
};

enum class LruVerdict : std::uint8_t {
  kRemoved,  ///< the callback took it off with Walker::isolate
  kRotate,   ///< referenced: to the young end
  kSkip,     ///< busy: leave it where it is
  kStop,     ///< end the walk
};

class ListLru : private GroupObserver {
 public:
  /// `shrinker` may be empty at first (attach later): then no bits are set.
  explicit ListLru(Registry& registry, Shrinker* shrinker = nullptr);
  ~ListLru() override;  ///< all lists must be empty
  ListLru(const ListLru&) = delete;
  ListLru& operator=(const ListLru&) = delete;

  void attach(Shrinker* shrinker) noexcept;

  /// False if it is on a list already. `bytes` is what its removal gives back, summed for count().
  bool add(LruItem& item, MemoryGroup& group, int node = 0, std::uint64_t bytes = 0) noexcept;
  /// False if it is on no list. Group, node and bytes as given to add (the group may be dead).
  bool del(LruItem& item, MemoryGroup& group, int node = 0, std::uint64_t bytes = 0) noexcept;
  /// To the young end. False if it is on no list.
  bool touch(LruItem& item, MemoryGroup& group, int node = 0) noexcept;

  std::uint64_t count(const MemoryGroup& group, int node) const noexcept;
  std::uint64_t bytes(const MemoryGroup& group, int node) const noexcept;
  /// What a count callback returns: `empty()` when the list has nothing.
  CountReport count(const ScanRequest& r) const noexcept;

  /// Handed to `isolate`; the list lock is held.
  class Walker {
   public:
    /// Takes the item off the list. `bytes` as given to add.
    void isolate(LruItem& item, std::uint64_t bytes) noexcept;

   private:
    friend class ListLru;
    void* list_ = nullptr;
    std::uint64_t freed_bytes_ = 0;
  };
  using IsolateFn = std::function<LruVerdict(LruItem&, Walker&)>;
  /// From the old end, at most r.nr_to_scan items, each at most once. Fills scanned, freed_objects,
  /// freed_bytes (items removed), not_freed_busy / not_freed_referenced, and status.
  ScanReport walk(const ScanRequest& r, const IsolateFn& isolate);

 private:
  struct Impl;
  void group_offline(MemoryGroup& child, MemoryGroup& parent) override;
  std::unique_ptr<Impl> impl_;
};

}  // namespace spillway::reclaim
