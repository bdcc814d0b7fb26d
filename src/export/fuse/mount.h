// PmemMount: a FUSE mount whose files are volumes. Speaks the kernel's protocol itself, so that a successor process
// can adopt the connection and have the unanswered requests sent again (FUSE_NOTIFY_RESEND).
//
//   worker threads   read a request, run it down the volume on a reactor of their own, answer. Two at the start, more
//                    (bounded) when all are busy. They touch no guest memory and no file of the mount, and hold no
//                    lock while they wait for the volume.
//   retry thread     sleeps until the backend fails a read or a write back. Such a request is never answered with
//                    an error (a failed READ is SIGBUS for the VMM, a failed WRITE loses the page): it is held and
//                    tried again, every 100 ms at first, every second later, until it succeeds or stop(false) aborts it.
//   read-ahead       (ahead.h) a thread that reads streams before the kernel asks.
//
// A request for a file that this process has not added yet (after an adoption) is held the same way, until settle().
//
// Thread-safety: add, remove, stop from one thread at a time (composition root); the rest any thread but the workers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "src/base/fd_store.h"
#include "src/export/fuse/ahead.h"
#include "src/export/fuse/channel.h"
#include "src/export/fuse/file.h"
#include "src/io/reactor.h"

namespace spillway {

struct PmemMountOptions {
  std::string name;              // of the entry in the store, "pmem/<name>", and in status: the tenant
  std::string directory;         // where to mount; made when missing
  FdStore* store = nullptr;      // null: dies with the process (tests, benchmarks)
  unsigned workers_min = 2, workers_max = 16;
  uint32_t read_ahead_kb = 512;  // the kernel's window; a random fault, too, pays for all of it at first (docs/pmem.md)
  // The largest READ. A window comes in pieces of this size, served side by side, and a fault waits for its own only.
  uint32_t max_read = 128 * 1024;
  uint64_t dirty_max_bytes = 0;  // bound of dirty page cache of the mount; 0 = the kernel's global limits
};

struct PmemMountStats {
  unsigned workers = 0;
  uint64_t requests = 0, unknown = 0;  // unknown: opcodes answered with ENOSYS
  uint64_t held = 0, held_total = 0;   // now, and ever
  bool adopted = false;
};

class PmemMount {
 public:
  static Result<std::shared_ptr<PmemMount>> start(PmemMountOptions options);
  ~PmemMount();

  const std::string& directory() const { return options_.directory; }
  const std::string& name() const { return options_.name; }

  // Makes `options.name` appear; a read-only file of the same volume, group and owner is shared, not made twice (the
  // second name is then an alias of one inode). kExists for a name in use, kInvalid for a bad name or size.
  Result<std::shared_ptr<PmemFile>> add(PmemFileOptions options);
  // Takes the name away, after what is dirty has been written back (as far as the volume lets it: nothing is held any
  // more for this file). Blocks for that. Processes that still map it go on with resident pages; others get SIGBUS.
  void remove(const std::string& name);
  // After an adoption, when all files have been added: forgets names that only the predecessor had, whose requests wait.
  void settle();

  // keep: leave the connection and its unanswered requests to a successor. Otherwise dirty pages are written back, held
  // requests are answered with EIO, the connection is aborted, the mount goes, and whoever still maps a file gets SIGBUS
  // at the next cold page. Blocks for the writing back.
  void stop(bool keep);

  PmemMountStats stats() const;
  std::string to_text() const;
  std::vector<std::shared_ptr<PmemFile>> files() const;

 private:
  struct Worker;
  struct Held;
  struct Call;
  enum class Outcome { kAnswered, kHold };
  struct Name {
    uint64_t node = 0;
    std::shared_ptr<PmemFile> file;  // null: named by a predecessor, not added yet
  };

  PmemMount(PmemMountOptions options, fuse::FuseChannel channel);
  Status start_workers();
  void add_worker();
  void work(Worker& w);
  void retry_loop();
  void hold(const Call& call);
  Outcome serve(Call& call);
  Outcome serve_data(Call& call);
  void serve_init(const Call& call);
  void serve_lookup(const Call& call);
  void serve_attr(const Call& call);
  void serve_setattr(const Call& call);
  void serve_open(const Call& call);
  void serve_readdir(const Call& call);
  void serve_statfs(const Call& call);
  Outcome finish(const Call& call, const PmemFile& file, Status status, std::span<const iovec> payload);
  bool too_early(const Call& call) const;
  static std::string name_in(const Call& call);
  void retry_held();
  void sync_last(PmemFile& file);
  std::shared_ptr<PmemFile> file_at(uint64_t node, bool* known) const;
  fuse_attr attr_of(uint64_t node, const PmemFile* file) const;
  Result<Fd> open_file(PmemFile& file, const std::string& name);
  std::string key_of(const PmemFile& file) const;
  Status save();
  Status save_file(const PmemFile& file, int fd);

  const PmemMountOptions options_;
  ReadAhead ahead_;
  fuse::FuseChannel channel_;
  mutable std::mutex names_mutex_;
  std::map<std::string, Name> names_;
  uint64_t next_node_ = fuse::kRootNode + 1;

  std::mutex workers_mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<unsigned> idle_{0}, count_{0};
  std::atomic<bool> stopping_{false}, abort_{false}, stopped_{false};
  bool adopted_ = false;

  mutable std::mutex held_mutex_;
  std::condition_variable held_changed_;
  std::deque<std::unique_ptr<Held>> held_;
  bool retry_now_ = false;
  std::thread retry_thread_;

  std::atomic<uint64_t> requests_{0}, unknown_{0}, held_total_{0};
};

}  // namespace spillway
