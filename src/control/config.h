// Config: the one declarative TOML file, parsed and checked as far as text alone allows.
//
// Every mistake is one line "FILE:LINE: [section.name] key: what is wrong" (kInvalid). Nothing outside the text is
// looked at here: files, sizes and sockets are checked when the host builds the graph (src/host), with `where` to
// name the line. Relative paths have been resolved against the folder of the file.
//
// Immutable when shared.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/base/units.h"
#include "src/cache/cache.h"

namespace spillway {

// A place in the file, for messages.
struct Where {
  std::string file;
  int line = 0;
  std::string section;  // "volume.fast"
  // "file:line: [section] key: text"; the line of the key where it is known.
  Error error(std::string_view key, std::string_view text, ErrorKind kind = ErrorKind::kInvalid) const;
  std::map<std::string, int, std::less<>> key_lines;
};

enum class DiskKind : uint8_t { kFile, kMemory, kSim };

struct DiskConfig {
  Where where;
  std::string name;
  DiskKind kind = DiskKind::kFile;
  std::string path;          // kFile
  uint64_t size = 0;         // memory, sim: bytes; file: 0 = as it is
  bool direct = true;        // file: O_DIRECT
  bool read_only = false;
  bool scheduler = true;     // the disk's proportional-weight scheduler (Q1)
  uint32_t block_size = 512;
  // sim
  std::string model = "ssd";  // hdd | ssd | null
  uint64_t seed = 1;
  uint64_t delay_us = 0;
  std::vector<std::string> faults;  // see docs/man/spillway.toml.5.md
};

struct VolumeConfig {
  Where where;
  std::string name;
  std::string layer;  // linear stripe mirror raid5 slice md qcow2
  std::vector<std::string> members;
  std::vector<std::string> spares;
  uint64_t chunk = 64 * kKiB;
  std::string layout;       // raid5: left-symmetric (default), left-asymmetric, right-...
  std::string consistency;  // mirror, raid5: bitmap | ppl | resync
  std::string metadata;     // "", "none", "md"
  uint64_t offset = 0, length = 0;  // slice; length 0 = to the end
  std::string backing;      // qcow2: volume name that replaces the image's own backing file
  std::string image_folder; // qcow2: backing files must lie in here (default: the folder of the image)
  std::string data_file;    // qcow2: volume name of the external data file; a writable image needs it
  std::string snapshot;     // qcow2: id or name of the internal snapshot to read; implies read_only
  bool read_only = false;
  bool force = false;       // start a dirty degraded array
};

struct GroupConfig {
  Where where;
  std::string name;    // "tenant-a" or "tenant-a/vm1": a path below the root
  uint32_t weight = 100;
  uint64_t memory_min = 0, memory_low = 0, memory_high = UINT64_MAX, memory_max = UINT64_MAX;
  uint64_t rbps = 0, wbps = 0, riops = 0, wiops = 0;  // 0 = no cap
};

struct ExportConfig {
  Where where;
  std::string name;
  std::string device;  // virtio-blk | virtio-pmem
  std::string volume;
  std::string group;   // empty: the root group
  uint32_t queues = 1;
  CacheMode cache = CacheMode::kIsolated;
  bool read_only = false;
  bool write_through = false;
  std::string socket;
  std::string file;           // virtio-pmem: the FUSE file for VMMs with their own device
  std::string trim_socket;    // virtio-pmem: companion discard-only virtio-blk
};

struct HostConfig {
  Where where;
  std::string control;             // control socket
  std::string pmem_folder;         // where the FUSE mounts of virtio-pmem exports go
  std::vector<int> cpus;           // a reactor each; -1 = not pinned
  uint64_t cache_size = 256 * kMiB;
  uint64_t cache_dirty = 0;        // 0 = a quarter of the size
  uint32_t nodes = 1;              // NUMA nodes of the cache
  bool unshare = false;            // copy extents that a tenant's disk shares with another's, instead of refusing (P6)
  uint32_t extent_check_s = 60;    // how often to look for such extents while running; 0 = at the start only
  bool psi = true;                 // watch the system's memory pressure
};

struct Config {
  std::string file;
  HostConfig host;
  std::map<std::string, DiskConfig> disks;
  std::map<std::string, VolumeConfig> volumes;
  std::map<std::string, GroupConfig> groups;
  std::map<std::string, ExportConfig> exports;

  // kInvalid (one line as above) or kNotFound / kPermission for the file itself.
  static Result<Config> load(const std::string& file);
  static Result<Config> parse(std::string_view text, const std::string& file);
  // The same config as TOML text: load(dump(c)) == c.
  std::string dump() const;

  // Volume names in an order in which every member comes before its user.
  Result<std::vector<std::string>> build_order() const;
  bool has_volume(const std::string& name) const {
    return volumes.contains(name) || disks.contains(name);
  }
  // The volume whose offsets the cache keys by: `name` with the slices above it taken off (ARCHITECTURE, cache).
  std::string data_node(const std::string& name) const;
  // The writable export that changes what volume or disk `name` reads as, or null. Disjoint slices of one volume are
  // not told from overlapping ones by this: both below a slice, they pass.
  const ExportConfig* writer_of(const std::string& name) const;

 private:
  Status check_references() const;
  Status check_overlaps() const;
};

}  // namespace spillway
