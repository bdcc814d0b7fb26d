// The index of one data node: page number -> frame, and the views on it (P5, P8: the same cost up to 1 TiB and beyond).
//
// A radix tree under RCU: top (sized by the node, replaced when it grows) -> mid (512 leaves, 128 MiB) -> leaf (64 pages,
// 256 KiB). A leaf goes when it has neither frames nor chunks nor reads under way; mids stay as long as their node.
// Readers walk it inside an RCU section and take a reference on the frame; then they look again whether the entry still
// names it, because a frame descriptor is reused at once (type-stable memory).
//
// Lock order: ViewList::lock -> Index::lock_ -> Leaf::lock -> FrameStore's. A leaf's lock guards its entries, its
// chunk pointers, its pending reads, the present/loading bits of its chunks and all fields of the frames in it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "src/base/result.h"
#include "src/cache/frames.h"
#include "src/cache/view.h"
#include "src/io/sync.h"
#include "spillway/reclaim/rcu.h"

namespace spillway::cache {

struct Node;
struct Tenant;

// One read from the volume below into fresh frames, for one tenant: pages [first, first + count) of one leaf.
// Guarded by the leaf's lock until it is `done`; then constant. Lives until the last reference.
struct PendingRead {
  std::atomic<uint32_t> refs{1};
  PendingRead* next = nullptr;  // in Leaf::pending
  Leaf* leaf = nullptr;
  Tenant* tenant = nullptr;
  uint8_t first = 0, count = 0;
  uint64_t stale = 0;     // bit i: page `first + i` was written since the device was asked
  uint64_t dropped = 0;   // bit i: the view let go of it, or a write put it there
  FrameId frame[kLeafPages];  // after success: frames with a reference each, holding what was read
  AsyncEvent done;
  bool failed = false;
  bool covers(unsigned i) const { return i >= first && i < unsigned{first} + count; }
};

struct ViewTable : reclaim::RcuObject<ViewTable> {
  explicit ViewTable(uint32_t n) : size(n), chunk(new std::atomic<ViewChunk*>[n]()) {}
  const uint32_t size;
  std::unique_ptr<std::atomic<ViewChunk*>[]> chunk;
};

struct alignas(64) Leaf : reclaim::RcuObject<Leaf> {
  static constexpr uint32_t kInlineViews = 2;
  std::atomic<uint32_t> frame[kLeafPages] = {};  // frame + 1; 0 = none
  uint16_t views[kLeafPages] = {};               // how many have the page and its frame
  uint64_t unclean = 0;  // bit i: page i has a frame that may differ from the volume below, or is on its way down
  std::atomic<ViewChunk*> chunk0[kInlineViews] = {};
  std::atomic<ViewTable*> more{nullptr};         // slots from kInlineViews on
  Node* node = nullptr;
  uint64_t number = 0;   // first page / kLeafPages
  PendingRead* pending = nullptr;
  SpinLock lock;
  bool dead = false;
  uint16_t frames = 0;   // entries in use
  uint32_t chunks = 0;

  FrameId at(unsigned i) const {
    // acquire: pairs with the release in put().
    return frame[i].load(std::memory_order_acquire) - 1;  // 0 - 1 == kNoFrame
  }
  void put(unsigned i, FrameId f) {
    frames = static_cast<uint16_t>(frames + (f != kNoFrame) - (at(i) != kNoFrame));
    frame[i].store(f + 1, std::memory_order_release);
  }
  // RCU section or lock.
  ViewChunk* chunk(uint32_t slot) const {
    if (slot < kInlineViews) return chunk0[slot].load(std::memory_order_acquire);
    ViewTable* t = more.load(std::memory_order_acquire);
    return t != nullptr && slot - kInlineViews < t->size
               ? t->chunk[slot - kInlineViews].load(std::memory_order_acquire)
               : nullptr;
  }
  void set_chunk(uint32_t slot, ViewChunk* c);  // lock held
  bool clean(unsigned i) const { return (unclean >> i & 1) == 0; }
  bool empty() const { return frames == 0 && chunks == 0 && pending == nullptr; }
  PendingRead* find_pending(const Tenant* t, unsigned i) const {
    for (PendingRead* p = pending; p != nullptr; p = p->next)
      if (p->tenant == t && p->covers(i) && (p->dropped >> (i - p->first) & 1) == 0) return p;
    return nullptr;
  }
  void mark_stale(unsigned i) {
    for (PendingRead* p = pending; p != nullptr; p = p->next)
      if (p->covers(i)) p->stale |= uint64_t{1} << (i - p->first);
  }
};
static_assert(kNoFrame + 1 == 0u);

class Index {
 public:
  Index(Node* node, uint64_t pages) : node_(node) { grow(pages); }
  ~Index();
  void grow(uint64_t pages);

  // Inside an RCU section.
  Leaf* find(uint64_t number) const {
    Top* t = top_.load(std::memory_order_acquire);
    if (number / kFan >= t->size) return nullptr;
    Mid* m = t->mid[number / kFan].load(std::memory_order_acquire);
    return m != nullptr ? m->leaf[number % kFan].load(std::memory_order_acquire) : nullptr;
  }
  // The leaf with its lock held; null when there is none (lock) / made when there is none (lock_or_make).
  Leaf* lock(uint64_t number);
  Leaf* lock_or_make(uint64_t number);
  // Unlocks, and lets the leaf go when it is empty.
  void unlock(Leaf* leaf);

  // Calls fn(leaf) with the lock held for every leaf in [first, last], cheap where there are none.
  template <class Fn>
  void for_each(uint64_t first, uint64_t last, Fn fn) {
    for (uint64_t n = first; n <= last;) {
      n = next(n, last);
      if (n > last) return;
      if (Leaf* l = lock(n)) {
        fn(*l);
        unlock(l);
      }
      ++n;
    }
  }
  uint64_t leaves() const { return leaves_.load(std::memory_order_relaxed); }
  uint64_t heap_bytes() const;

 private:
  static constexpr uint64_t kFan = 512;
  struct Mid {
    std::atomic<Leaf*> leaf[kFan] = {};
  };
  struct Top : reclaim::RcuObject<Top> {
    explicit Top(uint64_t n) : size(n), mid(new std::atomic<Mid*>[n]()) {}
    const uint64_t size;
    std::unique_ptr<std::atomic<Mid*>[]> mid;
  };
  uint64_t next(uint64_t number, uint64_t last) const;  // first leaf number >= number that may exist

  Node* node_;
  SpinLock lock_;  // structure: leaves come and go, growth
  std::atomic<Top*> top_{nullptr};
  std::atomic<uint64_t> leaves_{0};
  std::atomic<uint64_t> mids_{0};
};

}  // namespace spillway::cache
