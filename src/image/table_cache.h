// TableCache: pieces ("slices", at most 4 KiB) of L2 or refcount tables in memory, found without a lock.
//
// A slice is absent -> loading -> clean -> dirty -> clean ... -> evicted. One loader a slice: whoever else wants it
// waits, so what is loaded can not be older than what was changed. Only clean, unpinned slices are evicted; dirty ones
// become clean by the flush cycle of the image (qcow2_flush.cc).
//
// Thread-safety: `find` under an RcuGuard, any thread. Everything else is internally synchronised by a spin lock that
// is never held over I/O; it may be called from any reactor, `count` and `scan` from any thread. What a slice contains
// is changed by the image's owner only (Qcow2Image::owner_); words are atomic because readers do not lock.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <new>
#include <unordered_map>

#include <spillway/reclaim/rcu.h>
#include <spillway/reclaim/registry.h>

#include "src/io/sync.h"
#include "src/volume/volume.h"

namespace spillway::qcow2 {

class TableCache;

struct Slice;
struct SliceDelete {
  void operator()(Slice* s) const noexcept;
};

struct Slice : reclaim::RcuObject<Slice, SliceDelete> {
  static Slice* make(uint64_t index, uint32_t bytes);
  std::atomic<uint64_t>* words() { return reinterpret_cast<std::atomic<uint64_t>*>(this + 1); }
  std::byte* bytes() { return reinterpret_cast<std::byte*>(this + 1); }
  // Word i, host order. acquire / release: the reader of a mapping sees what was written before it was published.
  uint64_t load(uint32_t i) { return __builtin_bswap64(words()[i].load(std::memory_order_acquire)); }
  void store(uint32_t i, uint64_t v) { words()[i].store(__builtin_bswap64(v), std::memory_order_release); }

  uint64_t index = 0;
  std::atomic<uint32_t> sequence{0};     // odd while an entry of two words is changed (subclusters)
  std::atomic<bool> referenced{true};    // clock bit
  // Below: under TableCache::spin_.
  uint32_t pins = 0;
  bool dirty = false;
  Slice* prev = nullptr;
  Slice* next = nullptr;
};

// Keeps a slice in the cache. Movable; give it up before the cache goes.
class SlicePin {
 public:
  SlicePin() = default;
  SlicePin(TableCache* c, Slice* s) : cache_(c), slice_(s) {}
  SlicePin(SlicePin&& o) noexcept : cache_(o.cache_), slice_(std::exchange(o.slice_, nullptr)) {}
  SlicePin& operator=(SlicePin&& o) noexcept {
    if (this != &o) {
      reset();
      cache_ = o.cache_;
      slice_ = std::exchange(o.slice_, nullptr);
    }
    return *this;
  }
  ~SlicePin() { reset(); }
  void reset();
  Slice* operator->() const { return slice_; }
  Slice* get() const { return slice_; }
  explicit operator bool() const { return slice_ != nullptr; }

 private:
  TableCache* cache_ = nullptr;
  Slice* slice_ = nullptr;
};

class TableCache {
 public:
  // Fills `to` (slice_bytes) with slice `index` from disk, checked.
  using Loader = std::function<Task<Status>(IoContext, uint64_t index, std::byte* to)>;

  TableCache(uint32_t slice_bytes, uint64_t slices, uint64_t limit_bytes, Loader loader);
  ~TableCache();
  TableCache(const TableCache&) = delete;

  // Becomes a shrinker of `registry`; `name` as it is listed.
  Status enrol(reclaim::Registry& registry, std::string_view name);

  uint32_t slice_bytes() const { return slice_bytes_; }
  // Null when it is not here. Under an RcuGuard.
  Slice* find(uint64_t index) const {
    const Top* top = top_.load();
    const uint64_t t = index / kLeafSlices;
    Leaf* leaf = t < top->size ? top->leaves[t].load() : nullptr;
    return leaf == nullptr ? nullptr : leaf->slices[index % kLeafSlices].load();
  }
  Task<Result<SlicePin>> get(IoContext ctx, uint64_t index);
  // Puts a slice of zeros there (its table has just been made). Pinned.
  Result<SlicePin> put_new(uint64_t index);
  void grow(uint64_t slices);

  void mark_dirty(const SlicePin& pin);
  // All dirty slices, pinned and clean from now on. Put them back with mark_dirty when writing failed.
  std::vector<SlicePin> take_dirty();
  uint64_t dirty() const { return dirty_count_.load(std::memory_order_relaxed); }
  uint64_t bytes() const { return count_.load(std::memory_order_relaxed) * slice_bytes_; }
  uint64_t limit() const { return limit_; }

  struct Stats {
    std::atomic<uint64_t> loads{0}, evictions{0};
  };
  const Stats& stats() const { return stats_; }

 private:
  friend class SlicePin;
  static constexpr uint64_t kLeafSlices = 512;
  struct Leaf {
    reclaim::RcuPtr<Slice> slices[kLeafSlices];
  };
  struct Top : reclaim::RcuObject<Top> {
    explicit Top(uint64_t n) : size(n), leaves(new reclaim::RcuPtr<Leaf>[n]) {}
    uint64_t size;
    std::unique_ptr<reclaim::RcuPtr<Leaf>[]> leaves;
  };
  struct Loading {
    WaiterList waiters;
  };
  struct WaitLoad;

  void unpin(Slice* s);
  Status insert_locked(Slice* s);
  void evict_locked(Slice* s);
  void list_add_tail(Slice* s);
  void list_remove(Slice* s);
  // Clock: looks at no more than `nr` slices.
  reclaim::ScanReport shrink(uint64_t nr, uint64_t want);
  reclaim::CountReport count_report() const;
  void announce();

  const uint32_t slice_bytes_;
  const uint64_t limit_;
  const Loader loader_;
  reclaim::RcuPtr<Top> top_;
  mutable SpinLock spin_;
  std::unordered_map<uint64_t, Loading> loading_;
  Slice* head_ = nullptr;
  Slice* tail_ = nullptr;
  std::vector<Slice*> dirty_;
  std::atomic<uint64_t> count_{0}, dirty_count_{0};
  Stats stats_;
  reclaim::Shrinker shrinker_;
};

inline void SlicePin::reset() {
  if (slice_ != nullptr) cache_->unpin(std::exchange(slice_, nullptr));
}

}  // namespace spillway::qcow2
