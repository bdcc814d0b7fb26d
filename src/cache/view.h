// View: what one tenant has read and not yet let go of, with its own replacement state (P3, P4).
//
// One byte a page, kept in chunks of 64 pages that hang off the leaves of the shared index. A ViewList owns the order of
// one tenant on one NUMA node. It never looks at frames, at other views or at the clock, so its decisions follow from
// the tenant's requests (in the order in which they were issued) and its capacity alone.
//
// Policy: S3-FIFO (Yang et al., SOSP 2023) on generations. Two queues, small (a tenth) and main; a page enters small,
// or main when it left small recently (ghost). A queue is cut into up to 8 generations instead of a linked list: the
// victim is any page of the oldest generation that a sweep over the chunks meets next. That costs no links (one byte a
// page and view) and never touches a list on a hit.
//
//   byte: 7 present | 6 loading | 5 main | 4..3 uses since it was queued | 2..0 generation
//         loading: not there yet; a read is under way, or the last one failed and the next touch begins another
//         absent and bit 5: ghost, 2..0 its generation;  0: nothing known
//
// What protects what: `uses` is raised by hits without a lock (compare-exchange on the word, lost races are lost hints).
// Everything else changes under ViewList::lock; present and loading also under the leaf's lock (lock order: list, leaf).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "src/io/sync.h"
#include "spillway/reclaim/rcu.h"

namespace spillway::cache {

struct Leaf;

inline constexpr unsigned kLeafPages = 64;

namespace page_state {
inline constexpr uint8_t kPresent = 0x80, kLoading = 0x40, kMain = 0x20, kGhost = 0x20;
inline constexpr uint8_t kUsesOne = 0x08, kUsesMask = 0x18, kGenMask = 0x07;
inline constexpr unsigned kGens = 8;
}  // namespace page_state

struct ViewChunk : reclaim::RcuObject<ViewChunk> {
  std::atomic<uint64_t> word[kLeafPages / 8] = {};
  Leaf* leaf = nullptr;
  uint32_t slot = 0;      // of the tenant in the node
  uint32_t position = 0;  // in ViewList::slots_
  uint32_t pages = 0;     // present; under the list lock

  uint8_t get(unsigned i) const {
    // acquire: pairs with the release in set(): who sees "present, not loading" sees the index entry.
    return static_cast<uint8_t>(word[i / 8].load(std::memory_order_acquire) >> (i % 8 * 8));
  }
  void set(unsigned i, uint8_t s) {
    std::atomic<uint64_t>& w = word[i / 8];
    const unsigned shift = i % 8 * 8;
    uint64_t old = w.load(std::memory_order_relaxed);
    while (!w.compare_exchange_weak(old, (old & ~(uint64_t{0xff} << shift)) | (uint64_t{s} << shift),
                                    std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  // The same, but a loading bit that is there (or is being taken away meanwhile) stays as it is.
  void requeue(unsigned i, uint8_t s) {
    std::atomic<uint64_t>& w = word[i / 8];
    const unsigned shift = i % 8 * 8;
    uint64_t old = w.load(std::memory_order_relaxed);
    uint64_t next = 0;
    do {
      next = (old & ~(uint64_t{0xff & ~page_state::kLoading} << shift)) | (uint64_t{s} << shift);
    } while (!w.compare_exchange_weak(old, next, std::memory_order_release, std::memory_order_relaxed));
  }
  // Under the leaf's lock: the page is there.
  void loaded(unsigned i) {
    word[i / 8].fetch_and(~(uint64_t{page_state::kLoading} << (i % 8 * 8)), std::memory_order_release);
  }
  // A hit. Saturates at three uses, so that a hot page costs one load.
  void use(unsigned i, uint8_t seen) {
    using namespace page_state;
    if ((seen & kUsesMask) == kUsesMask) return;
    uint64_t old = word[i / 8].load(std::memory_order_relaxed);
    const unsigned shift = i % 8 * 8;
    const auto now = static_cast<uint8_t>(old >> shift);
    if ((now & kPresent) == 0 || (now & kUsesMask) == kUsesMask) return;
    word[i / 8].compare_exchange_strong(old, old + (uint64_t{kUsesOne} << shift), std::memory_order_relaxed);
  }
  bool has(unsigned i) const { return (get(i) & page_state::kPresent) != 0; }
};

class ViewList {
 public:
  SpinLock lock;  // around every call below

  void set_capacity(uint64_t pages);
  uint64_t capacity() const { return capacity_.load(std::memory_order_relaxed); }
  // Present pages, loading ones included. Any thread.
  uint64_t pages() const { return pages_.load(std::memory_order_relaxed); }
  uint64_t chunks() const { return slots_.size(); }

  void add_chunk(ViewChunk* c);
  // Takes it off the list; it must have no page. The caller unlinks and retires it.
  void remove_chunk(ViewChunk* c);

  // absent -> present (loading or not). The state byte to store is returned and stored.
  void insert(ViewChunk& c, unsigned i, bool loading);
  // present -> nothing known (error, discard).
  void remove(ViewChunk& c, unsigned i);

  // The next victim by policy; {nullptr, 0} when no page is there. The caller takes the leaf's lock and calls
  // evicted(). Bounded by the number of chunks.
  std::pair<ViewChunk*, unsigned> victim();
  void evicted(ViewChunk& c, unsigned i);

  // A chunk that a sweep found to hold neither pages nor ghosts worth keeping; nullptr when none waits.
  ViewChunk* take_dead();
  // As new: order, ghosts and hands forgotten. All chunks must be off.
  void reset();
  ViewChunk* chunk_at(uint64_t k) { return slots_[k].chunk; }
  ViewChunk* any_chunk() { return slots_.empty() ? nullptr : slots_.back().chunk; }

 private:
  struct Slot {
    ViewChunk* chunk;
    uint8_t small_gens, main_gens;  // generations that may occur here
  };
  struct Queue {
    std::array<uint64_t, page_state::kGens> count{};
    uint64_t total = 0;
    uint64_t entered = 0;  // into the current generation
    unsigned current = 0;
    uint32_t hand = 0;        // slot
    unsigned hand_page = 0;   // page in it
    unsigned oldest() const;
    void advance();
  };
  uint8_t enter(ViewChunk& c, bool main);
  void leave(uint8_t state);
  bool ghost_fresh(uint8_t state) const;
  std::pair<ViewChunk*, unsigned> find(bool main, unsigned gen);
  void consider_dead(ViewChunk* c);

  std::vector<Slot> slots_;
  Queue queue_[2];  // small, main
  unsigned ghost_gen_ = 0;
  uint64_t ghost_entered_ = 0;
  std::atomic<uint64_t> capacity_{0};
  std::atomic<uint64_t> pages_{0};
  std::vector<ViewChunk*> dead_;
};

}  // namespace spillway::cache
