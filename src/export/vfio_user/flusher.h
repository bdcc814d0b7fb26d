// Flusher: one thread that makes a backing stable. Requests that arrive while it works wait for the next run and share
// it: any number of concurrent flushes costs at most two runs (P1).
//
// The thread may stay inside sync() for as long as the backend holds a write back. So it owns all it needs by shared
// pointer and is left alone, not joined, when the device ends meanwhile.
//
// Thread-safety: request and stop from one thread (the device's reactor).
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "src/export/pmem_backing.h"

namespace spillway::vfio {

class Flusher {
 public:
  // Called on the flusher's thread after a run: every request with a ticket <= `upto` has this outcome.
  using Done = std::function<void(uint64_t upto, bool ok)>;
  Flusher(std::shared_ptr<PmemBacking> backing, Done done);
  // No `done` is running and none comes afterwards.
  ~Flusher();
  // Returns the ticket; tickets count up.
  uint64_t request();
  uint64_t runs() const;

 private:
  struct Shared;
  static void work(std::shared_ptr<Shared> s);
  std::shared_ptr<Shared> shared_;
};

}  // namespace spillway::vfio
