// PmemShrinker: the page caches of pmem files as one of the registry's shrinkers (P9, S10): group-aware.
//
// An object is a page. count asks the kernel (cachestat, about 36 ns a resident page) and remembers the answer for 20
// times as long as it took, so that counting never costs more than 5 % of a processor. scan turns each file's hand
// (PmemFile::evict_cold); the last priorities take warm chunks as well. Dirty pages are written back first, so a scan
// that may not block does nothing.
//
// The pages are charged by the kernel to the VMM's cgroup, not to the registry's groups: `usage` does not count them.
// Not node-aware: cachestat does not tell nodes apart; the registry asks for node 0 on behalf of all.
//
// Thread-safety: internally synchronised. Freed before the registry and before the files' mounts stop.
#pragma once

#include <spillway/reclaim/reclaim.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "src/export/fuse/file.h"

namespace spillway {

class PmemShrinker {
 public:
  // Empty when the registry is out of ids or memory.
  static std::unique_ptr<PmemShrinker> create(reclaim::Registry& registry);
  // The file's options().group is the id of the registry's group that is asked for it.
  void add(std::shared_ptr<PmemFile> file);

 private:
  struct Entry {
    std::shared_ptr<PmemFile> file;
    uint64_t bytes = 0;
    std::chrono::steady_clock::time_point valid_until{};
  };
  explicit PmemShrinker(reclaim::Registry& registry) : registry_(registry) {}
  reclaim::CountReport count(const reclaim::ScanRequest& r);
  reclaim::ScanReport scan(const reclaim::ScanRequest& r);
  std::vector<std::shared_ptr<PmemFile>> files_of(uint32_t group) const;

  reclaim::Registry& registry_;
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
  reclaim::Shrinker shrinker_;  // last: freed first
};

}  // namespace spillway
