// From members to an array: reads the superblocks, decides which are good, builds the layer they describe.
//
// Every decision that refuses is one line that names the member or the field; until the last check has passed
// nothing is written to any member, and nothing at all when the array is opened read-only.
#pragma once

#include "src/volume/assemble.h"
#include "src/volume/md/superblock.h"

namespace spillway::md {

struct Candidate {
  VolumePtr volume;  // null: missing
  std::string name;
  std::optional<Superblock> sb;
  bool blank = false;  // first MiB is zero
};

// Whether its first MiB is all zeros.
Task<Result<bool>> is_blank(Volume& disk);
// One per member of the spec, then one per spare. Errors: an unreadable or malformed superblock.
Task<Result<std::vector<Candidate>>> examine(const LayerSpec& spec);
Task<Result<VolumePtr>> open_array(LayerSpec spec, std::vector<Candidate> members);
Task<Result<CreatePlan>> create(const LayerSpec& spec, std::vector<Candidate> members, CreateOptions options);

}  // namespace spillway::md
