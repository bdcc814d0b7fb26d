// Facade of this folder: volumes as files of a FUSE mount of our own, for VMMs to map as virtio-pmem (P1, P2, P9).
//
//   mount = PmemMount::start({.name = "tenant-a", .directory = "/run/spillway/pmem/tenant-a", .store = store});
//   ex    = start_fuse_pmem(export_options, {.mount = mount, .link = "/srv/vm1.pmem"});
//   start_vfio_user_pmem(..., ex->backing());           // the same file as a BAR
//
// One mount per tenant: the trust domain has its own FUSE workers, its own backing-dev limits, and an inode of its
// own for each image (P3: no page of one tenant is ever resident through another's access). Within a mount, read-only
// exports of one volume share one inode (P5).
//
// `file = "vm1.pmem"` of the config becomes a symbolic link at that place to `<directory>/<export name>`.
//
// The page cache of the inode is the cache: hand in a volume that does not keep the same bytes in frames again
// (exclusive use: the layers below the cache; a base shared by several images: through the cache is right).
#pragma once

#include <memory>
#include <string>

#include "src/export/export.h"
#include "src/export/fuse/mount.h"
#include "src/export/pmem_backing.h"

namespace spillway {

struct PmemOptions {
  std::shared_ptr<PmemMount> mount;
  std::string link;              // a symbolic link to make for VMMs that open the file themselves; empty: none
  uint32_t uid = 0, gid = 0;     // owner of the file, and its mode: who may open it
  uint32_t mode = 0600;
  // Runs of zero pages at least this long are punched out of the volume instead of written (P7); 0 = never.
  uint64_t punch_min_bytes = 64 * kKiB;
};

// ExportOptions: name, volume, group, read_only are used; sockets, queues and reactors are not.
// kInvalid: the volume is not a multiple of 2 MiB, or larger than kPmemMaxBytes.
inline constexpr uint64_t kPmemMaxBytes = 64 * kGiB;
inline constexpr uint64_t kPmemAlign = 2 * kMiB;

class FusePmemExport : public Export {
 public:
  // Shared with the vfio-user device; lives as long as the longer of both.
  virtual std::shared_ptr<PmemBacking> backing() const = 0;
  virtual std::shared_ptr<PmemFile> file() const = 0;
};

Result<std::unique_ptr<FusePmemExport>> start_fuse_pmem(ExportOptions options, PmemOptions pmem);

}  // namespace spillway
