// FuseChannel: one /dev/fuse connection: mounting, adopting, answering, notifying.
//
// States: mounted or adopted -> unmounted (stop) or left behind (the store keeps the descriptor).
// Thread-safety: reply and notify_* from any thread. notify_inval must not be called by whoever serves requests: it
// waits for writeback, i.e. for our own answers (research/pmem.md, pitfall 3).
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

#include "src/base/fd.h"
#include "src/base/result.h"
#include "src/export/fuse/format.h"

namespace spillway::fuse {

struct BdiOptions {
  uint32_t read_ahead_kb = 128;
  uint64_t dirty_max_bytes = 0;  // dirty page cache of this mount that the kernel lets grow; 0 = only the global limit
};

class FuseChannel {
 public:
  // `max_read`: bytes of the largest READ, up to kMaxWrite.
  // A fresh mount on `directory` (made when missing). A dead mount of an earlier life there is detached first;
  // kBusy when a live file system other than the machine's own is mounted there.
  static Result<FuseChannel> mount(const std::string& directory, uint32_t max_read);
  // Takes over a connection that a predecessor mounted. kNotFound when it has been aborted meanwhile.
  static Result<FuseChannel> adopt(Fd fd, const std::string& directory);

  int fd() const { return fd_.get(); }
  const std::string& directory() const { return directory_; }

  // Sends the answer; false when the kernel no longer wants it (interrupted, aborted).
  bool reply(uint64_t unique, int error, std::span<const iovec> payload);
  bool reply(uint64_t unique, int error) { return reply(unique, error, {}); }
  template <class T>
  bool reply(uint64_t unique, const T& value) {
    const iovec one{const_cast<T*>(&value), sizeof value};
    return reply(unique, 0, {&one, 1});
  }

  Status notify_resend();
  // Drops clean and writes dirty pages of the range, mapped or not. Its success proves nothing: ask cachestat.
  Status notify_inval(uint64_t node, uint64_t offset, uint64_t length);

  // Limits of the mount's backing device. Needs answered INIT: call it while workers run.
  Status tune(const BdiOptions& options);
  // Aborts the connection and takes the mount away: what is dirty is lost, whoever waits for an answer gets an error.
  Status unmount();
  void close() { fd_.reset(); }

 private:
  FuseChannel(Fd fd, std::string directory) : fd_(std::move(fd)), directory_(std::move(directory)) {}
  Fd fd_;
  std::string directory_;
};

}  // namespace spillway::fuse
