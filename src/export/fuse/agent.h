// Agent: a tiny process that makes, for a PmemFile, the system calls that wait for our own FUSE workers.
//
// Why a process: fdatasync, write back, page locks and punching wait *uninterruptibly* for answers of the mount. A
// worker killed (-9) with a thread in such a call cannot end before somebody answers, so the holder would wait for
// its death, and the successor that could answer would never start. In the agent such a call just waits for the
// successor: the worker itself never sleeps on its own mount.
//
// The agent is forked without exec and only makes system calls: no memory is allocated and no lock is taken after the
// fork. It keeps two descriptors, the file and its socket (and /dev/fuse, for read-only files), and ends when the
// socket closes. It is nobody's child in the end (double fork), so nobody has to reap it.
//
// Thread-safety: call() from any thread, one at a time (a mutex); blocks until the call is done.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>
#include <mutex>
#include <span>

#include "src/base/fd.h"
#include "src/base/result.h"

namespace spillway::fuse {

class Agent {
 public:
  enum class Op : uint32_t {
    kSync,       // fdatasync
    kWriteBack,  // sync_file_range, waiting
    kPageOut,    // process_madvise(MADV_PAGEOUT) of `ranges` in process `pid`; result: bytes advised
    kDrop,       // fadvise(DONTNEED)
    kPunch,      // fallocate(PUNCH_HOLE | KEEP_SIZE)
    kInvalidate, // FUSE_NOTIFY_INVAL_INODE of node `pid`
  };
  static constexpr size_t kMaxRanges = 64;

  // `file` stays the caller's and outlives the agent; `channel` -1 unless kInvalidate is used.
  Agent(int file, int channel) : file_(file), channel_(channel) {}
  // 0 or more, or an error with the call's errno. Starts the process when there is none (any more).
  Result<int64_t> call(Op op, uint64_t offset, uint64_t length, int64_t pid = 0, std::span<const iovec> ranges = {});
  // The process ends when it is done; the next call would start another one.
  void close();

 private:
  Status start();
  std::mutex mutex_;
  const int file_, channel_;
  Fd socket_;
};

}  // namespace spillway::fuse
