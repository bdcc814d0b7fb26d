// Export: a volume offered to one VM over one transport. Each transport folder (vhost_user, vfio_user, fuse)
// has a factory `Result<std::unique_ptr<Export>> start(...)` taking ExportOptions (and more where it needs more).
//
// Thread-safety: start/stop from the composition root; stats and to_text from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "src/base/fd_store.h"
#include "src/io/blocking_pool.h"
#include "src/io/reactor_pool.h"
#include "src/volume/volume.h"

namespace spillway {

struct ExportOptions {
  std::string name;                    // the config's [export.NAME]
  VolumePtr volume;                    // top of the graph
  GroupId group = GroupId::kRoot;      // whom requests are accounted to
  std::string socket;                  // UNIX socket path
  uint32_t queues = 1;
  bool read_only = false;
  bool trusted_flush = true;           // false: the cache mode is write-through whatever the guest negotiates
  FdStore* store = nullptr;            // survives the worker: listening and connected sockets, device state
  ReactorPool* reactors = nullptr;     // queues are spread over them
  BlockingPool* blocking = nullptr;    // for what must not block a reactor
};

struct ExportStats {
  bool connected = false;
  uint64_t reads = 0, writes = 0, flushes = 0, discards = 0;
  uint64_t read_bytes = 0, write_bytes = 0;
  uint64_t errors = 0;            // requests answered with an error
  uint64_t connections = 0;       // since the start of the worker
  uint64_t protocol_errors = 0;   // connections ended because of what the peer sent
};

class Export {
 public:
  virtual ~Export() = default;
  virtual const std::string& name() const = 0;
  virtual std::string_view transport() const = 0;  // "vhost-user-blk", "vfio-user-pmem", "fuse-pmem"
  virtual ExportStats stats() const = 0;
  virtual std::string to_text() const { return {}; }
  // From now on the first `reactors` of the pool (at least one) serve it; queues that run are handed over, nothing is lost. Not beside
  // stop(); a transport that has no queues of its own ignores it.
  virtual Task<Status> spread(uint32_t /*reactors*/) { return Task<Status>::ready(Status{}); }
  // Ends connections and waits until no request is in flight. keep = leave the sockets with the store (hand-over).
  virtual Task<void> stop(bool keep) = 0;
};

}  // namespace spillway
