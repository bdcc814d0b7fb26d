// TrimVolume: what the companion disk of a pmem export is made of (P7). virtio-pmem has no discard, so the guest's
// `spillway-trim` discards free space through a virtio-blk disk that can do nothing else:
//   discard and write_zeroes(may_unmap) punch a hole through the pmem *file*, so that stale pages go from the guest's
//   mapping and the page cache as well and are not written back into the space just given up;
//   reads give zeros (nobody's data), writes are refused.
// Thread-safety: any reactor; the punching blocks and runs on the pool.
#pragma once

#include <memory>

#include "src/export/fuse/file.h"
#include "src/io/blocking_pool.h"

namespace spillway {

VolumePtr make_trim_volume(std::shared_ptr<PmemFile> file, BlockingPool* blocking);

}  // namespace spillway
