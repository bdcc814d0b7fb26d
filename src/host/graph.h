// Graph: builds the volumes a config describes, each once, in the order members need (ARCHITECTURE, "How things
// stack"): leaf -> qos -> layers -> cache -> image. What stands between is put in by the options, so that the daemon,
// the offline tools and the checks build the same graph.
//
// Every error names file, line and field of the config. Thread-confined.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/control/config.h"
#include "src/image/image.h"
#include "src/io/blocking_pool.h"
#include "src/volume/volume.h"

namespace spillway {

struct GraphOptions {
  // Nothing is written to any disk: superblocks stay as they are, images open read-only.
  bool read_only = false;
  // Disks are locked against other processes.
  bool lock = true;
  uint32_t lock_wait_ms = 0;  // FileOptions: for a successor of a killed process
  // mirror and raid5 over blank members may be created.
  bool create_if_blank = true;
  bool background = true;  // resync and rebuild start by themselves
  // Between leaf and layers; null = nothing.
  std::function<Result<VolumePtr>(VolumePtr leaf, const DiskConfig& disk)> wrap_disk;
  // Around each data node; null = no cache.
  std::function<Result<VolumePtr>(VolumePtr node, CacheMode mode, const std::string& key)> wrap_node;
  // The memfd that keeps a writable image's unwritten table changes over a kill -9, the same one for the same key; null:
  // none is kept.
  std::function<Result<Fd>(const std::string& key)> image_log;
  reclaim::Registry* registry = nullptr;  // where image metadata caches register
};

class Graph {
 public:
  Graph(const Config& config, GraphOptions options) : config_(config), options_(std::move(options)) {}
  Graph(const Graph&) = delete;

  // The volume or disk as members see it: no cache in the way, images included.
  Task<Result<VolumePtr>> open(std::string name);
  // The volume as an export of `mode` for tenant `tenant` sees it: cached at its data node, image on top.
  Task<Result<VolumePtr>> open_cached(std::string name, CacheMode mode, std::string tenant);
  // Everything that was opened, members before users.
  const std::vector<VolumePtr>& opened() const { return opened_; }
  // Closes all, users first; first error wins.
  Task<Status> close();

 private:
  struct Key {
    std::string name, mode, tenant;
    auto operator<=>(const Key&) const = default;
  };
  Task<Result<VolumePtr>> open_disk(const DiskConfig& disk);
  Task<Result<VolumePtr>> open_layer(const VolumeConfig& v);
  // mode null: uncached.
  Task<Result<VolumePtr>> open_image(const VolumeConfig& v, const CacheMode* mode, std::string tenant);
  Task<Result<VolumePtr>> open_image_file(std::string path, std::string format, const CacheMode* mode,
                                          std::string tenant, std::vector<std::string> folders,
                                          std::vector<std::string> chain);
  ImageResolver resolver(std::string image_path, const CacheMode* mode, std::string tenant,
                         std::vector<std::string> folders, std::vector<std::string> chain);
  // The host path of the disk a volume is made of alone, or "" (slices, layers, memory).
  std::string path_of(const std::string& name) const;

  const Config& config_;
  GraphOptions options_;
  std::map<std::string, VolumePtr> plain_;
  std::map<Key, VolumePtr> cached_;
  std::vector<VolumePtr> opened_;
  std::map<std::string, DiskConfig> implied_disks_;  // image files that no [disk] names, by path
};

// Looks at everything the config needs without touching it: sockets that could be bound, disks that open, sizes that
// fit. The first problem, as one line. For --check and before the start.
Task<Status> check_config(const Config& config);

}  // namespace spillway
