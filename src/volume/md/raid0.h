// md raid0 over members of different sizes: zones, each striped over the members that reach that far.
//
// Zone k begins where the (k)th smallest member ends. Inside a zone chunk c goes to the c'th of its members, round
// robin; the original layout (1) counts c from the array's start, the alternate one (2) from the zone's.
// Source: Linux drivers/md/raid0.c (described, not copied). Thread-safety: immutable after construction.
#pragma once

#include "src/volume/volume.h"

namespace spillway::md {

enum class Raid0Layout : uint32_t { kOriginal = 1, kAlternate = 2 };

// Bytes of an array over data areas of these sizes, chunk in bytes. Whole chunks of each; where chunks are no power of two
// the kernel rounds with a mask meant for one, so that the last few rows may lie beyond the end: an array must not be
// larger here than there.
uint64_t raid0_size(const std::vector<uint64_t>& areas, uint64_t chunk);

// Members: the data areas, whole chunks each.
Result<VolumePtr> make_raid0(std::string name, std::vector<VolumePtr> members, uint64_t chunk, Raid0Layout layout);

}  // namespace spillway::md
