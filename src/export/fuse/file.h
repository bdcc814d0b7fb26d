// PmemFile: one inode of a PmemMount, backed by a volume.
//
// Two sides that must not mix threads (research/pmem.md, pitfall 3 and rule 4):
//   served   read, write, flush, punch: called by the FUSE workers, go down to the volume, never touch the file;
//   used     fd, sync, residency, evict: called by anybody else, go through the kernel; what may wait for the workers
//            is done by an agent process (agent.h), so that this process can be killed at any time.
//
// How long a page stays is the kernel's business; nothing here counts pages (rule 9): residency() asks cachestat.
//
// Eviction goes in chunks of 2 MiB with a hand that comes round. A chunk whose pages were faulted in again soon after
// they had been taken is warm: the hand lets it go by as many times as its heat says (refault distance in its
// simplest form; the kernel does not tell which pages of a remote mapping were used).
//
// Thread-safety: internally synchronised. Lifetime: shared_ptr; the mount holds one until remove().
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "src/base/fd.h"
#include "src/export/fuse/agent.h"
#include "src/export/pmem_backing.h"
#include "src/io/sync.h"
#include "src/volume/volume.h"

namespace spillway {

struct PmemFileOptions {
  std::string name;
  VolumePtr volume;
  GroupId group = GroupId::kRoot;
  bool read_only = false;
  uint32_t uid = 0, gid = 0, mode = 0600;
  uint64_t punch_min_bytes = 64 * kKiB;
};

struct PmemCounters {
  std::atomic<uint64_t> reads{0}, read_bytes{0}, ahead_bytes{0}, writes{0}, write_bytes{0}, flushes{0}, punches{0}, punched_bytes{0};
  std::atomic<uint64_t> errors{0};          // failures of the volume, each try counted
  std::atomic<uint64_t> evict_calls{0}, evicted_bytes{0}, evict_written_bytes{0}, evict_refused{0}, refaults{0};
};

class PmemFile final : public PmemBacking {
 public:
  static constexpr uint64_t kChunk = 2 * kMiB;

  struct Residency {
    uint64_t cached = 0, dirty = 0, writeback = 0;  // bytes
  };
  struct Evicted {
    uint64_t before = 0;    // bytes resident in the range before
    uint64_t freed = 0;     // bytes that went, as cachestat says
    uint64_t written = 0;   // dirty bytes that had to be written first
    bool remote_refused = false;  // process_madvise was not permitted: mapped pages stay
  };

  PmemFile(PmemFileOptions options, uint64_t node);
  ~PmemFile() override;

  // ---- PmemBacking ----
  const std::string& name() const override { return options_.name; }
  uint64_t size() const override { return size_; }
  bool read_only() const override { return options_.read_only; }
  int fd() const override { return fd_.get(); }
  Status sync() override;
  std::chrono::nanoseconds stalled() const override;
  void add_mapper(pid_t pid) override;
  void remove_mapper(pid_t pid) override;
  // A process that opened the file itself. The kernel does not tell when it is done with it: pids that are no more are
  // forgotten at the next one. True when `pid` is new.
  bool add_opener(pid_t pid);
  std::vector<pid_t> openers() const;

  // ---- used: anybody but workers and reactors; all block ----
  Result<Residency> residency(uint64_t offset = 0, uint64_t length = 0) const;
  // Writes back and takes [offset, offset + length) (page multiples) away from page tables and page cache. Loses no
  // store and no DMA: a writable file never uses notify_inval.
  Result<Evicted> evict(uint64_t offset, uint64_t length);
  // Punches a hole: the pages go from mappings and page cache, the space from the volume (P7).
  Status punch_hole(uint64_t offset, uint64_t length);
  // One turn of the hand: looks at up to `chunks` chunks and evicts the cold ones until `want` bytes went.
  struct Turn {
    uint64_t chunks = 0, warm = 0, freed = 0, written = 0;
    bool refused = false;
  };
  Turn evict_cold(uint64_t want, uint64_t chunks, bool ignore_heat);

  // ---- served: the workers ----
  // Any offset and length inside the file. `scratch` is the worker's reply buffer: the bytes asked for end up at the
  // address returned through `at`.
  Task<Status> read(uint64_t offset, uint32_t length, std::span<std::byte> scratch, std::byte** at);
  // Into `to`, whole blocks, before the kernel asks; served_ahead() says when it has been answered from there.
  Task<Status> read_ahead(uint64_t offset, std::span<std::byte> to);
  void served_ahead(uint64_t offset, uint64_t length);
  // `data` is page aligned; `scratch` serves unaligned edges.
  Task<Status> write(uint64_t offset, std::span<const std::byte> data, std::span<std::byte> scratch);
  Task<Status> flush();
  Task<Status> punch(uint64_t offset, uint64_t length);

  uint64_t node() const { return node_; }
  const PmemFileOptions& options() const { return options_; }
  const PmemCounters& counters() const { return counters_; }
  std::string to_text() const;

  // ---- the mount's own ----
  void attach(Fd fd, int channel);
  bool fd_ready() const { return bool(fd_); }  // false until the mount has opened it
  void request_held(bool held);  // one more, or one less, waits for its next try
  void detach();
  // From now on a request that the volume fails is answered with its error instead of being held.
  void give_up() { given_up_.store(true, std::memory_order_relaxed); }
  bool given_up() const { return given_up_.load(std::memory_order_relaxed); }

 private:
  struct Chunk {
    std::atomic<uint8_t> heat{0};
    std::atomic<bool> taken{false};  // evicted by the last turn of the hand
  };
  Task<Status> write_aligned(uint64_t offset, std::span<const std::byte> data);
  Task<Status> write_plain(uint64_t offset, const std::byte* data, uint64_t length);
  IoContext context(IoClass io_class) const;
  void fail_count() { counters_.errors.fetch_add(1, std::memory_order_relaxed); }
  void note_fault(uint64_t offset, uint64_t length);
  std::vector<pid_t> mappers() const;
  // Asks the kernel to take pages [offset, offset+length) out of the page tables of `pid`. False: not permitted.
  bool page_out(pid_t pid, uint64_t offset, uint64_t length);

  const PmemFileOptions options_;
  const uint64_t size_;
  const uint64_t node_;
  Fd fd_;
  // Two, so that a flush that waits for a failing backend does not stop eviction, nor the other way round.
  std::unique_ptr<fuse::Agent> sync_agent_, evict_agent_;
  AsyncMutex unaligned_;  // read-modify-write of blocks that a request covers in part
  mutable std::mutex mutex_;
  std::multiset<pid_t> mappers_;
  std::set<pid_t> openers_;
  std::atomic<bool> given_up_{false};
  std::atomic<uint32_t> held_{0};
  std::atomic<int64_t> held_since_ns_{0};
  std::mutex hand_mutex_;
  uint64_t hand_ = 0;
  std::vector<Chunk> chunks_;
  PmemCounters counters_;
};

}  // namespace spillway
