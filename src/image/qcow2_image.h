// Qcow2Image: the qcow2 volume. See docs/qcow2.md for the order of writes and the argument for it.
//
// Who changes what:
//   mapping (L1 array, L2 slices)   written under `owner_`, read without a lock under RCU
//   refcounts, reftable, free hint, pending frees, flights   `owner_` only
//   on-disk tables                  written by the flush cycle (`flush_mutex_`), one at a time
// Lock order: flush_mutex_, then owner_, then spin locks. A request that waits for one of the two mutexes holds no
// InFlight ticket (the flush cycle drains them).
//
// Legal races: a lookup may see the old or the new entry of a cluster that is being changed. What the old one names
// stays untouched until all requests that entered before the change have left (InFlight), and until the change is
// stable on disk.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "src/image/epochs.h"
#include "src/image/member_io.h"
#include "src/image/qcow2.h"
#include "src/image/qcow2_format.h"
#include "src/image/table_cache.h"
#include "src/image/table_log.h"
#include "src/io/sync.h"

namespace spillway::qcow2 {

// In memory only: an L2 entry that failed its checks. Never written: such an image refuses writes.
inline constexpr uint64_t kBadEntry = ~uint64_t{0};
// Bounds: clusters remembered as punched; frees that wait for a flush before one is made.
inline constexpr size_t kMaxPunched = 1 << 20, kMaxPendingFree = 1 << 14;

class Qcow2Image final : public Volume {
 public:
  static Task<Result<VolumePtr>> open(std::string name, VolumePtr file, Qcow2Options options);
  ~Qcow2Image() override;

  std::vector<VolumePtr> members() const override;
  std::string_view layer() const override { return "qcow2"; }
  std::string to_text() const override;
  Task<Status> close() override;
  void expect(IoContext ctx, uint64_t offset, uint64_t length, bool write) override;

  // What the mapping says of a range of guest bytes, from its beginning.
  enum class Kind : uint8_t { kUnallocated, kZero, kData, kPacked, kMiss /* slice not in memory */, kBad };
  struct Run {
    Kind kind = Kind::kMiss;
    bool in_place = false;   // kData: may be overwritten where it is
    bool has_host = false;   // kZero: a host cluster is reserved
    uint64_t length = 0;
    uint64_t host = 0;       // kData, kZero with has_host: byte offset; kPacked (compressed): the entry
  };
  // As lookup, but loads what is missing. For map and block status.
  Task<Result<Run>> map_run(uint64_t offset, uint64_t length);
  const MemberIo& backing() const { return backing_; }
  const MemberIo& data() const { return data_; }
  // QEMU's guess whether the image was preallocated: its refcounts count clearly more than the file occupies.
  Task<Result<bool>> counts_more_than(uint64_t allocated_bytes);
  uint64_t cluster_size() const { return cluster_size_; }
  // Writes whole clusters compressed where that makes them smaller (convert). One caller, nothing else running.
  Task<Status> write_compressed(IoContext ctx, uint64_t offset, std::span<const std::byte> cluster);
  // See shrink_qcow2.
  Task<Status> shrink(uint64_t new_size);
  Qcow2Stats stats() const;
  const Header& header() const { return header_; }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_flush(IoContext ctx) override;
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override;
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) override;
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override;
  Task<Status> do_resize(uint64_t new_size) override;

 private:
  Qcow2Image(std::string name, uint64_t size, Geometry g, Header h, VolumePtr file, Qcow2Options o);

  struct L1Table : reclaim::RcuObject<L1Table> {
    explicit L1Table(uint64_t n) : size(n), entries(new std::atomic<uint64_t>[n]) {}
    uint64_t get(uint64_t i) const { return i < size ? entries[i].load(std::memory_order_acquire) : 0; }
    uint64_t size;
    std::unique_ptr<std::atomic<uint64_t>[]> entries;  // release by the owner, acquire by lookups
  };
  // Ticket of InFlight, given back at the end of the scope.
  struct Entered {
    explicit Entered(InFlight& f) : flights(f), ticket(f.enter()) {}
    Entered(const Entered&) = delete;
    ~Entered() { flights.leave(ticket); }
    InFlight& flights;
    InFlight::Ticket ticket;
  };
  // Clusters that are being written for the first time. Others wait until it is over and look again.
  struct Flight {
    AsyncEvent over;
  };
  struct Free {
    uint64_t host = 0;    // byte offset
    uint64_t length = 0;  // bytes; whole clusters, or a compressed span
    uint64_t compressed = 0;  // entry, for the cache of decompressed clusters
  };
  struct Allocation {
    uint64_t host = 0;
    uint64_t clusters = 0;
    bool zero = false;  // reads as zeros already
  };
  // An allocating write: guest clusters [first, first + clusters).
  struct Plan {
    std::shared_ptr<Flight> wait;  // somebody else's: wait, then look again
    std::shared_ptr<Flight> mine;
    bool retry = false;
    bool log_full = false;  // a flush cycle first
    TableLog::Room room;
    uint64_t first = 0, clusters = 0;
    uint64_t host = 0;
    bool fresh = false;       // new host clusters (else: an unused part of one that is ours)
    bool known_zero = false;
    uint64_t begin = 0, end = 0;          // guest bytes of the request
    uint64_t cow_begin = 0, cow_end = 0;  // with what must be copied around them
  };

  // qcow2_open.cc
  Task<Status> load(Qcow2Options& options);
  Task<Status> load_l1(uint64_t offset, uint64_t entries);
  Task<Status> load_reftable();
  Task<Status> load_snapshots(const std::string& wanted, uint64_t* l1_offset, uint64_t* l1_size);
  Task<Status> prepare_writing(int log_fd);
  Task<Status> replay(const std::vector<TableLog::Record>& records);
  Task<Status> replay_tables(const std::unordered_map<uint64_t, TableLog::Record>& last);
  Task<Status> replay_entries(const std::unordered_map<uint64_t, TableLog::Record>& last);
  Task<Status> count_once(uint64_t cluster);
  Status claim_metadata(const char* what, uint64_t offset, uint64_t length);
  Task<Status> load_l2_slice(IoContext ctx, uint64_t index, std::byte* to);
  Task<Status> load_refcount_slice(IoContext ctx, uint64_t index, std::byte* to);
  uint64_t check_entry(uint64_t entry, uint64_t bitmap, uint64_t guest, std::string* why);

  // qcow2_read.cc
  Run lookup(uint64_t offset, uint64_t length) const;
  Run lookup_standard(Slice* s, uint64_t offset, uint64_t length) const;
  Run lookup_extended(Slice* s, uint64_t offset, uint64_t length) const;
  Run classify(uint64_t entry, uint64_t in_cluster) const;
  Task<Result<Run>> map_run_slow(uint64_t offset, uint64_t length);
  Task<Status> finish(Task<Status> io, InFlight::Ticket ticket);
  Task<Status> read_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length);
  Task<Status> read_part(IoContext ctx, Run run, uint64_t offset, Iov iov, uint64_t skip);
  Task<Status> read_backing(IoContext ctx, uint64_t offset, Iov iov);
  Task<Status> read_compressed(IoContext ctx, uint64_t entry, uint64_t in_cluster, Iov iov);
  // Guest bytes, zeros beyond the virtual end. For copy on write.
  Task<Status> read_bytes(IoContext ctx, uint64_t offset, std::byte* to, uint64_t length);
  Status bad_entry(uint64_t offset) const;

  // qcow2_write.cc
  Task<Status> write_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length);
  Task<Result<uint64_t>> write_new(IoContext ctx, uint64_t offset, Iov iov, uint64_t skip, uint64_t length);
  Task<Status> make_plan(IoContext ctx, uint64_t offset, uint64_t length, Plan& plan);
  Status plan_in_owned(Plan& plan, uint64_t entry, uint64_t bitmap, uint64_t offset, uint64_t length);
  Task<Status> fill(IoContext ctx, const Plan& plan, Iov iov, uint64_t skip);
  Task<Status> commit(IoContext ctx, Plan& plan);
  void end_flight(const Plan& plan);
  bool needs_new(uint64_t entry) const;
  bool is_zero_now(uint64_t offset, uint64_t length) const;
  enum class Change : uint8_t { kDiscard, kZeroUnmap, kZeroKeep, kForget /* shows what is below */ };
  Task<Status> change_clusters(IoContext ctx, uint64_t first, uint64_t count, Change how);
  Task<Result<uint64_t>> change_slice(IoContext ctx, uint64_t first, uint64_t count, Change how,
                                      std::shared_ptr<Flight>* wait, TableLog::Room& room);
  bool change_entry(Slice* s, uint64_t cluster, Change how, TableLog::Room& room);
  Task<Status> write_zero_bytes(IoContext ctx, uint64_t offset, uint64_t length);
  void read_entry(Slice* s, uint64_t cluster, uint64_t* entry, uint64_t* bitmap) const;
  void write_entry(Slice* s, uint64_t cluster, uint64_t entry, uint64_t bitmap, TableLog::Room& room);
  void release_entry(uint64_t entry);
  Task<Result<SlicePin>> writable_slice(IoContext ctx, uint64_t cluster, TableLog::Room& room);
  Task<Status> put_compressed(IoContext ctx, uint64_t cluster, std::span<const std::byte> packed);
  Task<Status> new_l2_table(IoContext ctx, uint64_t l1_index, uint64_t old, TableLog::Room& room);
  bool reserve(uint64_t clusters, TableLog::Room& room);
  Status refuse_writes() const;

  // qcow2_alloc.cc; all under owner_
  Task<Status> begin_changes(IoContext ctx);
  Task<Result<Allocation>> allocate(IoContext ctx, uint64_t want);
  Task<Result<uint64_t>> allocate_contiguous(IoContext ctx, uint64_t clusters);
  Task<Status> add_refblock(IoContext ctx, uint64_t block);
  Task<Status> grow_reftable(IoContext ctx, uint64_t block);
  Task<Result<SlicePin>> refcount_slice(IoContext ctx, uint64_t cluster);
  Task<Status> change_refcount(IoContext ctx, uint64_t cluster, int64_t delta);
  Task<Status> ensure_file(uint64_t end);
  void add_metadata(uint64_t offset, uint64_t length);
  void drop_metadata(uint64_t offset, uint64_t length);
  bool take_zero(uint64_t cluster);
  bool is_metadata(uint64_t offset, uint64_t length);
  void defer_free(uint64_t host, uint64_t length, uint64_t compressed = 0);

  // qcow2_flush.cc
  struct Cycle;
  struct Piece {
    uint64_t at = 0;
    std::unique_ptr<std::byte[]> bytes;
    uint64_t length = 0;
  };
  Task<Status> flush_cycle(IoContext ctx);
  Task<Status> collect(IoContext ctx, Cycle& c);
  Task<Status> write_pieces(IoContext ctx, const std::vector<Piece>& pieces);
  Task<Status> write_tables(IoContext ctx, Cycle& c);
  void restore(Cycle& c);
  Task<Status> release_frees(IoContext ctx, std::vector<Free> frees);
  Task<Result<std::vector<uint64_t>>> last_references(IoContext ctx, const std::vector<Free>& frees);
  Task<std::vector<uint64_t>> punch(IoContext ctx, const std::vector<uint64_t>& clusters);
  enum class FlushNeed : uint8_t { kNone, kSoon, kMust };
  FlushNeed flush_need();
  Task<Status> relieve(IoContext ctx, FlushNeed need);
  Task<Status> flush_data(IoContext ctx);
  Task<Status> write_field(uint64_t at, const void* value, uint64_t length);
  Task<Status> update_incompatible(uint64_t set, uint64_t clear);
  Status may_resize(uint64_t new_size) const;
  Task<Status> write_size(uint64_t new_size);
  Task<Status> grow_l1(uint64_t entries);
  Task<Status> corruption(std::string what);
  bool tables_dirty() const;

  IoContext metadata(IoContext ctx) const {
    ctx.io_class = IoClass::kMetadata;
    ctx.fua = false;
    return ctx;
  }
  uint64_t slice_of(uint64_t cluster) const { return cluster / slice_entries_; }
  uint64_t l1_index(uint64_t cluster) const { return cluster / l2_entries_; }

  Header header_;
  MemberIo file_;
  MemberIo data_;     // = file_, or the external data file
  MemberIo backing_;  // may be empty
  const bool read_only_;
  const bool extended_;
  const uint32_t cluster_bits_;
  const uint64_t cluster_size_, subcluster_size_;
  const uint64_t l2_entries_, slice_entries_;
  const uint32_t entry_words_;  // 1, or 2 with subclusters
  const std::string prefix_;    // of messages
  std::vector<Snapshot> snapshots_;

  reclaim::RcuPtr<L1Table> l1_;
  std::unique_ptr<TableCache> l2_;
  std::unique_ptr<TableCache> refcounts_;
  InFlight in_flight_;
  std::unique_ptr<TableLog> log_;  // null: none is kept

  AsyncMutex owner_;
  std::vector<uint64_t> reftable_;
  std::unordered_map<uint64_t, std::shared_ptr<Flight>> flights_;  // by guest cluster
  std::vector<Free> pending_free_;       // unmapped in memory; free once that is stable
  std::unordered_set<uint64_t> dirty_l1_;  // 512-byte pieces of the L1 table
  std::unordered_set<uint64_t> dirty_reftable_;  // entries that name a refcount block and are not on disk
  uint64_t free_hint_ = 0;               // no free cluster below
  uint64_t zero_frontier_ = 0;           // host bytes from here on were never written since they came into being
  std::unordered_set<uint64_t> punched_;   // free clusters below it that read as zeros too
  bool cycle_wanted_ = false;            // somebody is about to begin a flush cycle
  bool marked_dirty_ = false;            // the dirty bit is on disk
  uint64_t compressed_end_ = 0;          // write_compressed goes on here
  std::mutex metadata_mutex_;            // guards metadata_ (slice loads look at it from any reactor)
  std::unordered_set<uint64_t> metadata_;  // host clusters that hold tables

  AsyncMutex header_mutex_;  // fields of the header that change in place; taken last

  AsyncMutex flush_mutex_;
  std::atomic<uint64_t> flush_arrivals_{0};
  uint64_t flush_covered_ = 0;  // under flush_mutex_: arrivals up to this one are done
  Status flush_status_{};       // ... with this
  // Anything a plain member flush would not make stable. Released by whoever changes a table, before it acknowledges;
  // acquired by do_flush.
  std::atomic<uint64_t> unstable_{0};
  std::atomic<bool> corrupt_{false};
  std::atomic<bool> closed_{false};

  // Decompressed clusters, by L2 entry.
  struct Decompressed {
    uint64_t entry;
    std::shared_ptr<const AlignedBuffer> data;
  };
  std::shared_ptr<const AlignedBuffer> decompressed_find(uint64_t entry);
  void decompressed_put(uint64_t entry, std::shared_ptr<const AlignedBuffer> data);
  void decompressed_drop(uint64_t entry);
  mutable std::mutex decompressed_mutex_;
  std::list<Decompressed> decompressed_;  // most recent first
  std::unordered_map<uint64_t, std::list<Decompressed>::iterator> decompressed_index_;
  uint64_t decompressed_limit_ = 0;
  reclaim::Shrinker decompressed_shrinker_;

  mutable std::atomic<uint64_t> stat_cow_bytes_{0}, stat_allocated_{0}, stat_freed_{0}, stat_cycles_{0},
      stat_decompressed_{0}, stat_decompressed_hits_{0};
};

// Bytes the whole of [b, b + n) zero?
bool all_zero(const void* b, uint64_t n);

}  // namespace spillway::qcow2
