// slice: a range of another volume (what a distribution's LVM cuts out of a mirror).
// Thread-safety: any reactor.
#pragma once

#include "src/volume/volume.h"

namespace spillway {

// length 0: to the member's end, and a later growth of the member is followed by resize().
Result<VolumePtr> make_slice(std::string name, VolumePtr member, uint64_t offset, uint64_t length);

}  // namespace spillway
