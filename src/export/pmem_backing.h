// PmemBacking: a file that a VMM maps as the memory range of a virtio-pmem device. Implemented by export/fuse
// (a file of our own FUSE mount), used by export/vfio_user, which must not know where the file comes from.
//
// Thread-safety: any thread, except that `sync` blocks and must not be called on a reactor or a FUSE worker.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "src/base/result.h"

namespace spillway {

class PmemBacking {
 public:
  virtual ~PmemBacking() = default;
  virtual const std::string& name() const = 0;
  // Bytes, a multiple of 2 MiB; constant.
  virtual uint64_t size() const = 0;
  virtual bool read_only() const = 0;
  // The descriptor to map: O_RDWR, or O_RDONLY for a read-only file. Owned by the backing.
  virtual int fd() const = 0;
  // Everything stored through any mapping before the call is stable in the volume when it returns success; costs in
  // proportion to what is dirty (P1). Blocks, for as long as the backend holds a write back: see stalled().
  virtual Status sync() = 0;
  // For how long the oldest request that the backend failed has been waiting for its next try; 0 = none waits.
  virtual std::chrono::nanoseconds stalled() const = 0;
  // A process that maps the file (a VMM): eviction has to take its page table entries too.
  virtual void add_mapper(pid_t pid) = 0;
  virtual void remove_mapper(pid_t pid) = 0;
};

}  // namespace spillway
