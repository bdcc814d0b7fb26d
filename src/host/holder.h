// The holder: a tiny process that keeps descriptors and restarts the worker (ARCHITECTURE, "What survives").
//
// States: start -> worker running -> (worker died: restart, at most kMaxRestarts in kRestartWindow) ...
//         -> SIGTERM/SIGINT: passed on to the worker -> worker ended by itself -> exit with its code.
// The holder parses no config, serves no guest, allocates only for store entries. Single-threaded: one poll() over
// the store socket, a signalfd and the worker's pidfd. When the holder dies the kernel kills the worker
// (PR_SET_PDEATHSIG): two generations never serve at once.
//
// Protocol on the SOCK_SEQPACKET pair, request and reply one packet each:
//   {u8 op, u8 status, u16 name_length, u32 blob_length, u32 fd_count} name blob, descriptors by SCM_RIGHTS.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "src/base/fd_store.h"

namespace spillway {

// The worker's side: the FdStore in the holder. Any thread; calls are serialised.
class RemoteFdStore final : public FdStore {
 public:
  explicit RemoteFdStore(Fd socket) : socket_(std::move(socket)) {}
  Status put(const std::string& name, std::span<const int> fds, std::string_view blob) override;
  Result<Entry> get(const std::string& name) override;
  Status remove(const std::string& name) override;
  Result<std::vector<std::string>> list(const std::string& prefix) override;
  // Tells the holder that all exports listen: systemd's READY=1, and from now on a death means restart.
  Status ready();
  // How often the worker was restarted so far.
  Result<uint64_t> restarts();

 private:
  struct Reply {
    std::string blob;
    std::vector<Fd> fds;
  };
  Result<Reply> call(uint8_t op, const std::string& name, std::span<const int> fds, std::string_view blob);
  std::mutex mutex_;
  Fd socket_;
};

// Runs the holder on this thread until the worker ends for good; returns the exit code.
// `worker_argv`: the command line of the worker; "--store-fd=N" is added to it.
// Before `ready` a worker that exits is not restarted: its code (2 for a bad config) is the holder's.
int run_holder(const std::vector<std::string>& worker_argv);

}  // namespace spillway
