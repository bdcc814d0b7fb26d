// The memory leaf: anonymous memory, for tests, benchmarks and scratch disks. Gone when closed.
// Thread-safety: any reactor; requests to one block race as on a disk.
#pragma once

#include "src/volume/volume.h"

namespace spillway {

// Reserves address space so that it can grow to eight times its size (at least 64 MiB) without moving.
Result<VolumePtr> make_memory(std::string name, uint64_t size, uint32_t block_size = 512);

}  // namespace spillway
