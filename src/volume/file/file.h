// The file leaf: a regular file or a block device, by default past the host's page cache (O_DIRECT).
//
// Buffers that are not aligned as the device asks are bounced; a buffered leaf (FileOptions::direct = false) never
// bounces. Flush is fdatasync, `fua` is RWF_DSYNC. A regular file whose size is no whole number of blocks reads as
// zeros to the end of its last block.
// The image is locked with open-file-description locks on the bytes QEMU uses, so that two writers of any of the
// two programs refuse each other and readers share.
// Thread-safety: any reactor; the descriptor is shared, nothing else changes after opening but the size.
#pragma once

#include <string>

#include "src/base/fd.h"
#include "src/volume/volume.h"

namespace spillway {

struct FileOptions {
  std::string path;
  bool read_only = false;
  // O_DIRECT. A file system that cannot (tmpfs before 6.6) makes the open fail with kUnsupported, unless
  // `buffered_fallback`: then the leaf is buffered, and a log line says so.
  bool direct = true;
  bool buffered_fallback = true;
  bool lock = true;
  // How long to wait for a lock that somebody has. A process that was killed keeps its locks until the kernel is done
  // with the requests it had in flight: a successor that waits for them also knows that none of them lands after its own.
  uint32_t lock_wait_ms = 0;
  // Logical block size to offer; 0 = as the device says (512 for files where O_DIRECT allows it).
  uint32_t block_size = 0;
  // > 0: the file is created (sparse) with this size when it does not exist.
  uint64_t create_size = 0;
  // Use this open descriptor instead of the path (which is then for messages only).
  Fd fd = {};
};

Result<VolumePtr> open_file(std::string name, FileOptions options);

}  // namespace spillway
