// qcow2 v2 and v3 as an image layer over any volume (see docs/qcow2.md; format: QEMU's docs/interop/qcow2.txt).
//
// Read and written: backing files, 512 B to 2 MiB clusters, subclusters (extended L2), zero clusters, refcounts of 1 to
// 64 bits, lazy refcounts, external data files. Read, and rewritten uncompressed: zlib and zstd compressed clusters.
// Internal snapshots: listed, read (`snapshot`), kept intact by writes. Refused by name: encryption, bitmaps, unknown
// incompatible features.
//
// Volume semantics: block_size 512 whatever the members have. discard_granularity is the cluster. resize grows.
// close() of a writable image makes it clean and closes file and data file. A read-only one closes nothing, and nobody
// closes the backing volume: they may be shared; whoever opened them closes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/image/image.h"

namespace spillway::reclaim {
class Registry;
}

namespace spillway {

struct Qcow2Options {
  bool read_only = false;
  // Takes the place of the backing file that the header names. Null: ask the resolver.
  VolumePtr backing;
  VolumePtr data_file;
  // Null: an image that names a backing or data file (and has no override here) is refused.
  ImageResolver resolver;
  // Do not open the backing file; clusters that are not allocated read as zeros. For info, check and tools.
  bool ignore_backing = false;
  // Id or name of an internal snapshot to read instead of the active state; implies read_only.
  std::string snapshot;
  // Bounds of the metadata caches. 128 MiB of L2 cover 1 TiB at 64 KiB clusters (256 MiB with subclusters): then no
  // lookup reads metadata twice. Memory is used as tables are touched, and given back to reclaim.
  uint64_t l2_cache_bytes = 128 * kMiB;
  uint64_t refcount_cache_bytes = 8 * kMiB;
  // Decompressed clusters kept.
  uint64_t compressed_cache_bytes = 8 * kMiB;
  // A memfd that outlives the process, empty or left by a predecessor that was killed: then its acknowledged changes are
  // taken over when the image is opened (writable). Without one, what was not flushed before a kill -9 is lost, as with
  // any other program. With one, lazy refcounts are not made use of. One image a memfd; borrowed while opening.
  int log_fd = -1;
  // Where the caches register as shrinkers; null: bounded by the above only. Must outlive the volume.
  reclaim::Registry* registry = nullptr;
};

// Checks header, tables and backing chain; nothing is written unless the image is dirty (lazy refcounts after a crash)
// and opened writable: then its refcounts are rebuilt first. The error is one line that names what is wrong.
Task<Result<VolumePtr>> open_qcow2(std::string name, VolumePtr file, Qcow2Options options);

// Cluster compression of an image.
enum class Qcow2Compression : uint8_t { kZlib = 0, kZstd = 1 };

struct Qcow2CreateOptions {
  uint64_t virtual_size = 0;  // rounded up to 512
  uint32_t version = 3;
  uint32_t cluster_size = 64 * kKiB;  // power of two, 512..2 MiB; 16 KiB.. with extended_l2
  uint32_t refcount_bits = 16;        // 1, 2, 4, .. 64
  bool lazy_refcounts = false;
  bool extended_l2 = false;
  Qcow2Compression compression = Qcow2Compression::kZlib;
  std::string backing_file;
  std::string backing_format;  // required with backing_file
  std::string data_file;       // name of an external data file
  bool data_file_raw = false;
};
// Makes an empty image in `file` (what was there is lost; the file grows as needed).
Task<Status> create_qcow2(VolumePtr file, Qcow2CreateOptions options);

struct Qcow2SnapshotInfo {
  std::string id, name;
  uint64_t virtual_size = 0;
  uint64_t vm_state_size = 0;
  uint64_t date_s = 0, date_ns = 0, vm_clock_ns = 0;
};
struct ImageInfo {
  ImageFormat format = ImageFormat::kRaw;
  uint64_t virtual_size = 0;
  uint64_t file_size = 0;
  // qcow2 only
  uint32_t version = 0, cluster_size = 0, refcount_bits = 0;
  Qcow2Compression compression = Qcow2Compression::kZlib;
  bool lazy_refcounts = false, dirty = false, corrupt = false, extended_l2 = false, data_file_raw = false;
  std::string backing_file, backing_format, data_file;
  std::vector<Qcow2SnapshotInfo> snapshots;
};
// Header only; opens no other file. Works on images that open_qcow2 refuses to write (dirty, corrupt).
Task<Result<ImageInfo>> image_info(VolumePtr file, ImageFormat format);
// qemu-img's names. `actual_bytes`: what the file occupies on its disk.
std::string info_to_json(const std::string& filename, uint64_t actual_bytes, const ImageInfo& info);
std::string info_to_text(const std::string& filename, uint64_t actual_bytes, const ImageInfo& info);

// kAllOrNothing: as kAll, but an image with damage that repair does not cure (tables that overlap, or lead nowhere) is not
// written at all.
enum class Qcow2Repair : uint8_t { kNone, kLeaks, kAll, kAllOrNothing };
struct Qcow2CheckReport {
  uint64_t errors = 0;         // corruptions found (and not repaired)
  uint64_t leaks = 0;          // clusters counted but not used
  uint64_t errors_fixed = 0, leaks_fixed = 0;
  uint64_t clusters_allocated = 0, clusters_total = 0, clusters_compressed = 0, clusters_fragmented = 0;
  uint64_t image_end = 0;
  std::vector<std::string> lines;  // what was found, at most 100
};
// The image must not be open. Compares refcounts with what the tables refer to. Repair writes a whole new refcount
// structure into unused space and switches to it with one header write, so a crash in between costs nothing.
Task<Result<Qcow2CheckReport>> check_qcow2(VolumePtr file, Qcow2Repair repair);
std::string check_to_text(const Qcow2CheckReport& report);

// For tools: `image` (from open_qcow2, writable) gets smaller; what lies beyond `new_size`, a multiple of 512, is freed. Nothing
// else may use it, and it is to be closed next. After a crash in between the image has its old size and zeros, or what is
// below, in parts of its end. kInvalid: not smaller; kReadOnly, kCorrupt, kUnsupported (a snapshot without a size), kIo.
Task<Status> shrink_qcow2(VolumePtr image, uint64_t new_size);

// `image` must come from open_qcow2.
struct Qcow2Stats {
  uint64_t l2_hits = 0, l2_loads = 0, l2_evictions = 0, l2_bytes = 0, l2_dirty = 0;
  uint64_t refcount_loads = 0, refcount_bytes = 0;
  uint64_t clusters_allocated = 0, clusters_freed = 0, cow_bytes = 0, flush_cycles = 0;
  uint64_t decompressed = 0, decompressed_hits = 0;
};
Result<Qcow2Stats> qcow2_stats(const Volume& image);

}  // namespace spillway
