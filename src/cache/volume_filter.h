// FilterVolume: the volume that attach() gives out. Hits are answered without a coroutine, a lock or an allocation.
//
// What a request does to the views happens when it is issued, before the first suspension, so a tenant's replacement
// state follows the order of its requests and no device timing (P3). A read that misses reads whole pages into fresh
// frames; what was written meanwhile wins (PendingRead::stale). The tail of a volume that is no whole page is never
// cached. A write of part of an absent page reads the page first; where that read fails, it goes around the cache.
//
// Thread-safety: internally synchronised, as every Volume.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "src/cache/impl.h"

namespace spillway::cache {

// Sequential streams of one tenant on one volume, kept apart by reactor. A hit only reads `marker`.
struct ReadAhead {
  struct Stream {
    std::atomic<uint64_t> marker{UINT64_MAX};  // page: touching it asks for the next window
    uint64_t next = UINT64_MAX;                // page that would continue the stream
    uint64_t end = 0;                          // first page not asked for yet
    uint64_t window = 0;                       // pages
  };
  static constexpr unsigned kStreams = 4;
  SpinLock lock;
  Stream stream[kStreams];
  unsigned victim = 0;
};

// A group as this volume knows it. Immutable but for `dead` and the streams; lives as long as the volume.
struct Binding {
  GroupId group{};
  std::atomic<bool> dead{false};
  Tenant* tenant = nullptr;
  uint32_t slot = 0;
  DirtySet* set = nullptr;
  Binding* next = nullptr;
  static constexpr unsigned kShards = 4;
  ReadAhead ahead[kShards];
};

class FilterVolume final : public Volume, public std::enable_shared_from_this<FilterVolume> {
 public:
  FilterVolume(Cache::Impl& cache, Node& node, VolumePtr lower, CacheMode mode);
  ~FilterVolume() override;
  void listen();
  void unbind(GroupId group);

  std::vector<std::shared_ptr<Volume>> members() const override { return {lower_}; }
  std::string_view layer() const override { return "cache"; }
  std::string to_text() const override;
  Task<Status> close() override;
  void expect(IoContext ctx, uint64_t offset, uint64_t length, bool write) override;

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_flush(IoContext ctx) override;
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override;
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) override;
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override;
  Task<Status> do_resize(uint64_t new_size) override;

 private:
  // What becomes of one page of a read, in order of the pages.
  struct Step {
    enum class Kind : uint8_t { kFrame, kRead, kAround } kind;
    uint64_t page;
    FrameId frame = kNoFrame;     // kFrame: with a reference
    PendingRead* read = nullptr;  // kRead: with a reference
    bool answered = false;        // kRead: the guest has its bytes
  };
  // A read of a guest, for what can be answered before the fresh frames come into the index.
  struct Answer {
    std::vector<Step>& steps;
    uint64_t offset, skip;  // of the request; its bytes that are answered already
    Iov iov;
  };
  struct Plan {
    std::vector<Step> steps;
    std::vector<PendingRead*> own;  // to be issued by us, with a reference
    uint64_t hits = 0, misses = 0, joined = 0;
  };

  uint64_t cacheable_pages() const { return size() / kPageSize; }
  Binding& bind(GroupId group) {
    for (Binding* b = bindings_.load(std::memory_order_acquire); b != nullptr; b = b->next)
      if (b->group == group && !b->dead.load(std::memory_order_acquire)) return *b;
    return bind_slow(group);
  }
  Binding& bind_slow(GroupId group);

  void fetch(const Binding& b, uint64_t page, size_t in, bool write);
  FrameId hit(Binding& b, uint64_t page);  // with a reference; kNoFrame: not a plain hit
  void plan(Binding& b, uint64_t first, uint64_t count, bool ahead, Plan& out);
  void plan_leaf(Binding& b, uint64_t number, unsigned first, unsigned count, bool ahead, Plan& out);
  void ask(Binding& b, Leaf& leaf, unsigned i, FrameId fresh, PendingRead*& open, Plan& out);
  void take(Binding& b, Leaf& leaf, ViewChunk& chunk, unsigned i, PendingRead*& open, Plan& out);
  Task<Status> read_slow(Binding& b, IoContext ctx, uint64_t offset, Iov iov, uint64_t skip);
  Task<Status> read_pages(Binding& b, IoContext ctx, PendingRead* p, Answer* answer = nullptr);
  void answer_early(PendingRead& p, Answer& a);
  uint64_t absorb(PendingRead& p, Tenant& t, uint32_t slot, uint64_t todo);
  void end_read(PendingRead& p, bool failed);
  void drop(PendingRead* p);
  void note_read(Binding& b, IoContext ctx, uint64_t offset, uint64_t length, bool missed);
  void start_ahead(Binding& b, IoContext ctx, uint64_t first, uint64_t count);
  Task<void> ahead_task(std::shared_ptr<FilterVolume> self, Binding& b, IoContext ctx, std::vector<PendingRead*> own);

  bool write_present(Binding& b, uint64_t page, size_t in, size_t n, Iov iov, uint64_t skip, bool use);
  Task<Status> write_slow(Binding& b, IoContext ctx, uint64_t offset, Iov iov, uint64_t skip);
  bool admit(Binding& b, uint64_t page);
  Task<bool> load(Binding& b, IoContext ctx, uint64_t page);
  bool fill(Binding& b, uint64_t page, Iov iov, uint64_t skip);
  Task<Status> throttle(Binding& b);
  Task<Status> through(Binding& b, IoContext ctx, uint64_t offset, uint64_t length);

  // Around the cache, coherent with whatever frames there are.
  Task<Status> read_around(IoContext ctx, uint64_t offset, Iov iov);
  Task<Status> write_around(IoContext ctx, uint64_t offset, Iov iov);
  template <class Fn>
  void for_frames(uint64_t offset, uint64_t length, Fn fn);
  void leave_view(Binding& b, uint64_t first, uint64_t end);
  void drop_from_all(Leaf& leaf, unsigned i, FrameId f, const Binding& self);
  Task<Status> settle_writeback(uint64_t offset, uint64_t length);

  Cache::Impl& c_;
  Node& node_;
  VolumePtr lower_;
  const CacheMode mode_;
  std::atomic<Binding*> bindings_{nullptr};
  std::mutex bind_mutex_;
  std::vector<std::unique_ptr<Binding>> owned_;
  AsyncCounter ahead_;
  uint64_t listener_ = 0;
};

}  // namespace spillway::cache
