// stripe (raid0): chunks dealt out round robin over members of one size, a plain layout (nothing of its own on
// disk). A request inside one chunk is the member's request; a longer one becomes one request per member.
// Thread-safety: immutable after construction.
#pragma once

#include <vector>

#include "src/volume/volume.h"

namespace spillway {

// chunk: bytes, a multiple of the members' blocks. Every member's size must be a multiple of it and all the same.
// size: bytes of the volume, at most what the members hold, whole blocks; 0: all of it.
Result<VolumePtr> make_stripe(std::string name, std::vector<VolumePtr> members, uint64_t chunk, uint64_t size = 0);

}  // namespace spillway
