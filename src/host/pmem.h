// What a `device = "virtio-pmem"` export is made of: a file on its tenant's FUSE mount, and, where the config asks for
// them, the vfio-user device over that file and the companion discard-only disk.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/control/config.h"
#include "src/export/export.h"
#include "src/export/fuse/pmem.h"
#include "src/export/fuse/shrink.h"

#include <spillway/reclaim/reclaim.h>

namespace spillway {

// The mounts of a host, one for each tenant (P3). Thread-confined to the composition root.
class PmemHost {
 public:
  // `folder`: where the mounts go, a subfolder for each tenant.
  PmemHost(std::string folder, FdStore* store, reclaim::Registry* registry)
      : folder_(std::move(folder)), store_(store), registry_(registry) {}

  // Starts everything the export asks for; the first element is the file itself.
  Result<std::vector<std::unique_ptr<Export>>> start(const ExportConfig& config, ExportOptions options,
                                                     const std::string& tenant);
  // When all exports of the config have been started: what a predecessor served and nobody serves any more ends.
  void settle();
  // After the exports have stopped. keep: leave the connections to a successor.
  void stop(bool keep);
  std::string to_text() const;

 private:
  Result<std::shared_ptr<PmemMount>> mount_of(const std::string& tenant);
  std::string folder_;
  FdStore* store_;
  reclaim::Registry* registry_;
  std::map<std::string, std::shared_ptr<PmemMount>> mounts_;
  std::unique_ptr<PmemShrinker> shrinker_;  // freed before the mounts stop
};

}  // namespace spillway
