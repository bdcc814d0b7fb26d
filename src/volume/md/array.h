// What mirror and raid5 share: members and their states, superblocks, faults, the bitmap, background work.
//
// States of a member:  spare -> rebuilding -> active -> faulty (never back; a new superblock makes it a spare again).
// States of the array on disk: clean (resync_offset = all ones) or active (0); active is written, with FUA and on all
// members, before the first data write after clean, and clean after a flush when nothing was written for a while.
//
// Faults (V2): note_fault() marks a member faulty in memory at once, so nobody uses it; record_faults() writes that
// to the others' superblocks. A write is acknowledged only when recorded_ has caught up with noted_. Event counts go
// up by two in two rounds of one, so that the faulty member is seen as stale, and no crash in between can make a good
// one look stale. A fault the array cannot survive is not written anywhere: a raid5 fails in memory (writes, and reads
// that need the parity, are refused: parity and data may have been left apart), so that nothing on disk stands in the
// way of a rescue; a mirror's last member goes on and its errors are the requests'.
//
// Replacement (md's own: feature bit, two members with one role): a slot's member stays in use while another is filled;
// writes go to both. When it is full, all stripe locks are held, everything is flushed, and the two change places in
// two rounds of superblocks. When the old one fails first, the new one starts again as an ordinary rebuild.
//
// Who protects what: config_ (a coroutine mutex) serialises changes of the superblocks and of the table; the table is
// immutable and published (release / acquire), old ones live as long as the array; a member's state and `recovered`
// are atomics, `recovered` moves only under the stripe locks of what it covers. Lock order: stripe lock -> config_
// -> bitmap io. Legal race: a read that began before a member was marked faulty may still return its data.
// Background work (resync, rebuild, scrub, the daemon that clears bits and marks clean) runs on the reactor that
// assembled the array and ends in close(), which must be called before the array is destroyed.
// Thread-safety: any reactor, except where a line says home reactor.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/io/sync.h"
#include "src/volume/assemble.h"
#include "src/volume/md/bitmap.h"
#include "src/volume/md/superblock.h"

namespace spillway::md {

enum class MemberState : uint8_t { kSpare, kRebuilding, kActive, kFaulty };

struct Member {
  VolumePtr volume;
  std::string name;
  Superblock sb;  // guarded by config_
  int slot = -1;  // guarded by config_; constant while in a table
  std::atomic<MemberState> state{MemberState::kSpare};
  std::atomic<uint64_t> recovered{0};  // bytes of the component that are valid; kInSync when active
  std::atomic<uint64_t> read_errors{0};

  // Whether [.., end) of the component may be read and must be written.
  bool in_use(uint64_t end) const {
    const MemberState s = state.load(std::memory_order_acquire);
    return s == MemberState::kActive ||
           (s == MemberState::kRebuilding && end <= recovered.load(std::memory_order_acquire));
  }
  uint64_t data_offset() const { return data_offset_; }
  uint64_t data_offset_ = 0;
};
using MemberPtr = std::shared_ptr<Member>;

struct Table {
  std::vector<MemberPtr> slots;         // null: missing
  std::vector<MemberPtr> replacements;  // as many; null: none. Written like the slot's member, never read
  bool in_use(size_t slot, uint64_t end) const { return slots[slot] && slots[slot]->in_use(end); }
};

// Hashed locks of rows (raid5) or granules (mirror): no global lock.
class StripeLocks {
 public:
  static constexpr uint64_t kLocks = 256;
  AsyncMutex& of(uint64_t stripe) { return locks_[stripe % kLocks].m; }
  // Takes the locks of [first, last], each once, in index order (so two holders cannot deadlock).
  Task<void> lock_range(uint64_t first, uint64_t last);
  void unlock_range(uint64_t first, uint64_t last);

 private:
  struct alignas(64) Padded {
    AsyncMutex m;
  };
  std::array<Padded, kLocks> locks_;
};

// Page-aligned buffers of one size (bytes), recycled: up to `keep` of them, cut from huge pages where the system has some (a
// request's pages are then few to pin and few to describe to the device); beyond that they are made and freed. What was
// touched once stays until the pool is destroyed. Any thread.
class BufferPool {
 public:
  BufferPool(size_t size, size_t keep) : size_(size), keep_(keep) {}
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  class Lease {  // false: memory is out
   public:
    explicit Lease(BufferPool& p) : pool_(&p) { p.get(this); }
    Lease(Lease&& o) noexcept : pool_(o.pool_), data_(std::exchange(o.data_, nullptr)), own_(std::move(o.own_)) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (data_ != nullptr && !own_) pool_->put(data_);
    }
    std::byte* data() const { return data_; }
    explicit operator bool() const { return data_ != nullptr; }

   private:
    friend class BufferPool;
    BufferPool* pool_;
    std::byte* data_ = nullptr;
    AlignedBuffer own_;  // not the pool's
  };

 private:
  static constexpr size_t kSlab = 2 * kMiB;
  void get(Lease* to);
  void put(std::byte* p);
  const size_t size_, keep_;
  SpinLock lock_;
  std::vector<std::byte*> free_;      // guarded by lock_
  std::vector<AlignedBuffer> slabs_;  // guarded by lock_
  size_t made_ = 0;                   // buffers in slabs_; guarded by lock_
};

struct ArrayInit {
  Superblock sb;                  // of the freshest member
  std::vector<MemberPtr> slots;         // null: missing
  std::vector<MemberPtr> replacements;  // empty, or by slot
  std::vector<MemberPtr> spares;
  std::vector<std::string> slot_names;
  std::unique_ptr<Bitmap> bitmap;
  uint64_t bitmap_offset = 0;     // bytes from a member's start
  bool read_only = false;
  bool background = true;
  uint64_t rebuild_rate_min = 4 * kMiB;
  bool known_in_sync = false;     // PPL replayed: dirty, but nothing to resync
};

class RedundantArray : public Volume, public ArrayControl {
 public:
  std::vector<VolumePtr> members() const override;
  std::string to_text() const override;
  Task<Status> close() override;

  ArrayStatus status() const override;
  Task<Status> fail_member(std::string_view member) override;
  Status may_fail(std::string_view member) const override;
  Task<Status> remove_member(std::string_view member) override;
  Task<Status> add_member(VolumePtr member) override;
  Task<Status> replace_member(std::string_view member, VolumePtr with) override;
  Task<Status> start_scrub(Scrub mode) override;
  Task<Status> stop_scrub() override;
  Task<void> wait_idle() override;

  // After construction, on the home reactor: takes spares into use and starts background work.
  void start();

 protected:
  enum class Sync : uint8_t { kResync, kRebuild, kCheck, kRepair };

  RedundantArray(std::string name, uint64_t size, Geometry geometry, ArrayInit init);

  // What the layer does.
  // Whether the array works without these slots (true: missing).
  virtual bool survives(const std::vector<bool>& missing) const = 0;
  // Whether a write error that it does not survive may have left redundancy and data apart.
  virtual bool unsurvived_fault_is_final() const = 0;
  // Brings component bytes [offset, offset + length) in sync, or compares; takes the stripe locks. For kRebuild it
  // moves target->recovered to the end while it holds them. Returns sectors that differed.
  virtual Task<Result<uint64_t>> sync_step(Sync kind, MemberPtr target, uint64_t offset, uint64_t length) = 0;
  // Bytes of the component a step should have (a multiple of the row).
  virtual uint64_t sync_unit() const = 0;
  // Whether a resync makes sense with the members there are.
  virtual bool can_resync() const = 0;
  // Hook: writes the layer's per-member metadata (PPL header) to a new member.
  virtual Task<Status> prepare_member(Member& m) = 0;
  virtual std::string consistency() const;
  virtual std::string layout_text() const { return {}; }
  // Waits until no operation that began before uses an older table (takes and drops every stripe lock).
  Task<void> grace();
  bool in_sync() const { return resync_position() == kInSync; }

  const Table& table() const { return *table_.load(std::memory_order_acquire); }  // pairs with publish_table
  uint64_t component_size() const { return component_size_; }
  // Whether redundancy may be stale anywhere in [first, end) of the component.
  bool needs_sync(uint64_t first, uint64_t end) const;
  bool array_failed() const { return failed_.load(std::memory_order_acquire); }
  Status failed_error() const;
  bool degraded() const;
  bool read_only_open() const { return read_only_; }

  // Brackets of every write to members; component byte range.
  Task<Status> begin_write(uint64_t first, uint64_t end);
  void end_write(uint64_t first, uint64_t end);
  void note_foreground() { foreground_.fetch_add(1, std::memory_order_relaxed); }

  // True: the member is out of use and the array goes on. False: the array cannot lose it.
  bool note_fault(Member& m, const Error& why);
  // A write to a slot's member and to its replacement, if one is being filled; errors are noted as faults. The error of
  // the member comes back when the array cannot lose it.
  Task<Status> slot_write(size_t slot, IoContext ctx, uint64_t offset, const void* from, uint64_t length);
  Task<Status> slot_write(size_t slot, IoContext ctx, uint64_t offset, Iov from);  // `from` outlives the task
  bool faults_recorded() const {
    return recorded_.load(std::memory_order_acquire) >= noted_.load(std::memory_order_acquire);
  }
  Task<Status> record_faults();
  // The status of an operation whose faults must be on disk before it is acknowledged.
  Task<Status> settle(Status s);

  // Flushes every member in use; a member that fails is faulty.
  Task<Status> flush_members(IoContext ctx);

  // Reads or writes component bytes of one member.
  static Task<Status> member_read(Member& m, IoContext ctx, uint64_t offset, void* to, uint64_t length);
  static Task<Status> member_write(Member& m, IoContext ctx, uint64_t offset, const void* from, uint64_t length);

  StripeLocks stripes_;
  std::unique_ptr<Bitmap> bitmap_;
  Superblock common_;  // the array's part; guarded by config_ after construction

 private:
  void publish_table(std::unique_ptr<Table> t);
  std::vector<MemberPtr> all_members() const;
  MemberPtr find(std::string_view name) const;
  Task<Status> write_superblocks();        // config_ held: one round, events + 1
  Task<Status> superblock_round();         // config_ held
  Task<Status> activate();
  Task<bool> try_mark_clean();
  Task<Status> write_bitmap(uint64_t offset, std::span<const std::byte> bytes, bool fua);
  uint64_t resync_position() const { return resync_.load(std::memory_order_acquire); }

  void kick_background();                  // any reactor
  void kick_daemon();
  Task<void> background();                 // home reactor
  Task<void> daemon();                     // home reactor
  Task<bool> assign_spare();
  Task<bool> promote_replacement();
  Task<bool> run_sync(Sync kind, MemberPtr target);  // false: it did not get to its end, and would not at once
  Task<void> checkpoint(Sync kind, MemberPtr target);
  Task<void> nap(IoOp** slot, uint64_t ns);
  void wake_naps();
  Task<Status> complete_rebuild(MemberPtr target);
  Task<Status> complete_replacement(MemberPtr target);
  bool is_replacement(const MemberPtr& m) const {
    return m->slot >= 0 && table().replacements[static_cast<size_t>(m->slot)] == m;
  }
  bool can_lose(const Member& m) const;
  // config_ held: a member for `volume`, which is not written to yet.
  Task<Result<MemberPtr>> admit(VolumePtr volume);
  // config_ held: superblocks, bitmap and log of one that admit() has made and the caller has put into its place.
  Task<Status> write_first(Member& m);
  uint32_t next_dev_number() const;

  const uint64_t component_size_;
  const bool read_only_;
  const bool background_allowed_;
  const uint64_t rate_min_;
  const uint64_t bitmap_offset_;
  Reactor* const home_;

  std::atomic<const Table*> table_{nullptr};
  std::vector<std::unique_ptr<Table>> tables_;   // guarded by config_
  mutable AsyncMutex config_;
  mutable SpinLock list_lock_;                   // guards spares_, faulty_ (short, never across a suspension)
  std::vector<MemberPtr> spares_;
  std::vector<MemberPtr> faulty_;
  std::vector<std::string> slot_names_;

  bool uneven_ = false;                          // guarded by config_: members an event behind, see write_superblocks()

  SpinLock fault_lock_;
  std::atomic<uint64_t> noted_{0}, recorded_{0};
  std::atomic<bool> failed_{false};

  // Dekker pair: a writer adds to writers_ then loads activated_ (begin_write); the cleaner clears activated_ then loads
  // writers_ (try_mark_clean). Both sequentially consistent.
  std::atomic<uint64_t> writers_{0};
  std::atomic<bool> activated_{false};           // every member's superblock says active; changed under config_
  std::atomic<bool> active_{false};              // what the next superblocks say; changed under config_
  std::atomic<uint64_t> written_{0};             // write operations so far
  std::atomic<uint64_t> foreground_{0};

  std::atomic<uint64_t> resync_;                 // component bytes known in sync; kInSync: all
  std::atomic<bool> stopping_{false};
  std::atomic<bool> background_running_{false}, daemon_running_{false};
  AsyncCounter running_;
  std::atomic<bool> scrub_wanted_{false}, scrub_stop_{false};
  Scrub scrub_mode_ = Scrub::kCheck;
  IoOp* background_nap_ = nullptr;               // home reactor
  IoOp* daemon_nap_ = nullptr;

  // Progress, for status(): written on the home reactor.
  std::atomic<int> operation_{-1};               // Sync, or -1
  std::atomic<uint64_t> progress_{0}, started_ns_{0}, started_at_{0}, now_ns_{0};
  std::atomic<uint64_t> mismatches_{0};
};

}  // namespace spillway::md
