// Frames: physical pages in memfds that outlive the worker, and the frame table that says what is in them.
//
// "cache/frames<N>": one memfd for each NUMA node; frame f is page f / nodes of memfd f % nodes. "cache/table": one memfd:
//   header | node directory (key of every data node) | tenant directory | one entry a frame
// An entry is rewritten by ordered stores: `views` and `generation` first, then `word` (release), which alone decides
// what the frame holds. A frame's data is complete before its word says so; the word is cleared before the frame is
// used for something else. `dirty` is set before the first byte of a dirty frame changes and cleared after its
// writeback has ended. So whenever the worker is killed, a scan of the table finds a state that was true.
//
// Thread-safety: allocation is internally synchronised; an entry belongs to whoever holds the leaf's lock of its page
// (or the frame while it is in no index).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/base/fd_store.h"
#include "src/base/result.h"
#include "src/base/units.h"
#include "src/io/sync.h"

namespace spillway::cache {

using FrameId = uint32_t;
inline constexpr FrameId kNoFrame = 0xffffffff;

// On shared memory; see cache_format in docs/formats.
struct TableEntry {
  std::atomic<uint64_t> word;        // 63 valid | 62 dirty | 61..46 node | 45..0 page
  std::atomic<uint64_t> generation;  // larger = written later; decides should two frames claim one page
  std::atomic<uint64_t> views;       // bit t: tenant t of the tenant directory has it in its view
  uint64_t reserved;

  static constexpr uint64_t kValid = uint64_t{1} << 63, kDirty = uint64_t{1} << 62;
  static constexpr unsigned kNodeShift = 46;
  static constexpr uint64_t kPageMask = (uint64_t{1} << kNodeShift) - 1;
};
static_assert(sizeof(TableEntry) == 32);

// What this process knows of a frame. refs: one of the index while the frame is in it, one for each user of the data;
// 0 = free. Everything else is guarded by the leaf's lock of the page.
struct Frame {
  std::atomic<uint32_t> refs{0};
  uint16_t node = 0;
  uint16_t writers = 0;        // copies into it under way
  bool dirty = false;          // differs from the volume below
  bool writeback = false;      // a copy of it is on its way down
  bool unclaimed = false;      // adopted, in nobody's view yet
  bool counted = false;        // in its owner's dirty bytes: from the first write to the end of the last writeback
  bool suspect = false;        // its last writeback failed: the next goes by itself, not to take good neighbours with it
  bool orphan = false;         // dirty and in no view: charged to its owner until it is written
  uint64_t page = 0;
  struct DirtySet* owner = nullptr;  // whose dirty bytes these are; constant while `counted`

  bool try_get() {
    uint32_t n = refs.load(std::memory_order_relaxed);
    while (n != 0)
      // acquire: pairs with the release that made refs 1 after the frame was filled.
      if (refs.compare_exchange_weak(n, n + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    return false;
  }
};

class FrameStore {
 public:
  static constexpr uint32_t kMaxNodes = 1024;   // data nodes
  static constexpr uint32_t kMaxKey = 200;
  static constexpr uint32_t kMaxTenants = 64;   // whose views survive a restart
  static constexpr uint32_t kNoTenant = 0xffffffff;

  static Result<std::unique_ptr<FrameStore>> open(FdStore* store, int numa_nodes, uint64_t frames);
  ~FrameStore();

  FrameId frames() const { return frames_; }
  int numa_nodes() const { return numa_; }
  bool adopted() const { return adopted_; }

  // A frame with refs 0 and undefined contents, or kNoFrame. The one that has been free for longest: what a miss costs
  // must not depend on whether the frame of the one before was kept or, another tenant having had the page, given back.
  FrameId alloc(int numa);
  // Free frames that are backed fell below `low`: a miss would soon wait for the kernel.
  bool wants_refill(uint64_t low) const;
  // Backs free frames until `target` of each memfd are. Takes page faults; any thread.
  void refill(uint64_t target);
  // refs must be 0 and the entry cleared.
  void free(FrameId f);
  // Gives free frames back to the kernel until at most `keep` per memfd stay backed. Blocks for system calls.
  uint64_t punch(uint64_t keep);
  uint64_t warm() const;         // free but backed
  uint64_t in_use() const { return used_.load(std::memory_order_relaxed); }
  uint64_t backed_bytes() const; // st_blocks of the memfds
  uint64_t punched_bytes() const { return punched_.load(std::memory_order_relaxed); }

  Frame& frame(FrameId f) { return frame_[f]; }
  std::byte* data(FrameId f) const {
    const auto n = static_cast<unsigned>(numa_);
    return n == 1 ? base_[0] + uint64_t{f} * kPageSize : base_[f % n] + uint64_t{f / n} * kPageSize;
  }
  TableEntry& entry(FrameId f) { return entries_[f]; }

  // Leaf lock held (or frame private).
  void publish(FrameId f, bool dirty);         // node and page from frame(f)
  void clear(FrameId f);
  void set_dirty(FrameId f, bool dirty);
  void add_view(FrameId f, uint32_t tenant_bit);
  void drop_view(FrameId f, uint32_t tenant_bit);

  // Directory: the slot of a key, made when it is new; kNoSpace when the directory is full.
  Result<uint32_t> node_slot(const std::string& key);
  std::string node_key(uint32_t slot) const;   // empty: unused
  void free_node_slot(uint32_t slot);
  // kNoTenant when all 64 are taken.
  uint32_t tenant_bit(const std::string& name);
  bool knows_tenant(const std::string& name) const;

  // For adoption: calls fn(frame, node slot, page, dirty, views) for every valid entry; duplicates are resolved. Then
  // everything not taken over by fn (refs still 0) is free.
  template <class Fn>
  void scan(Fn fn) {
    for (FrameId f = 0; f < scan_end_; ++f) {
      const uint64_t w = entries_[f].word.load(std::memory_order_acquire);
      if ((w & TableEntry::kValid) == 0) continue;
      fn(f, static_cast<uint32_t>((w >> TableEntry::kNodeShift) & 0xffff), w & TableEntry::kPageMask,
         (w & TableEntry::kDirty) != 0, entries_[f].views.load(std::memory_order_relaxed));
    }
  }
  void finish_adoption();

 private:
  struct FreeList {
    SpinLock lock;
    std::deque<FrameId> warm;   // longest free first
    std::vector<FrameId> cold;
    std::atomic<uint64_t> warm_size{0};
    FrameId next = 0;   // never used from here on (local number)
    FrameId limit = 0;
  };
  FrameStore() = default;
  Result<void> map(uint64_t frames);

  int numa_ = 1;
  FrameId frames_ = 0;
  FrameId scan_end_ = 0;  // frames from here on were never used by a predecessor
  bool adopted_ = false;
  std::vector<Fd> fds_;
  Fd table_fd_;
  std::vector<std::byte*> base_;
  std::byte* table_ = nullptr;
  TableEntry* entries_ = nullptr;
  Frame* frame_ = nullptr;
  std::unique_ptr<FreeList[]> free_;
  std::atomic<uint64_t> generation_{1};
  std::atomic<uint64_t> used_{0};
  std::atomic<uint64_t> punched_{0};
  mutable SpinLock directory_lock_;
};

}  // namespace spillway::cache
