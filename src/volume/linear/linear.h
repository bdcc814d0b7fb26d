// linear: members one after the other. A plain layout has nothing of its own on disk; md's has superblocks, which
// md/open.cc keeps and `Adopt` brings up to date when the volume grows. Each member is a region that
// seeks on its own (V3, V4), and a member can be appended while the volume is in use (V5).
//
// The member table is immutable; growth publishes a longer one (release) before the larger size becomes visible, so
// whoever sees the size sees the table. Replaced tables live as long as the volume: one per growth.
// Thread-safety: any reactor; append() and resize() are serialised inside.
#pragma once

#include <functional>
#include <vector>

#include "src/volume/volume.h"

namespace spillway {

class LinearVolume : public Volume {
 public:
  // Adds the member's bytes at the end. kInvalid when its blocks are larger than ours.
  virtual Task<Status> append(VolumePtr member) = 0;

 protected:
  using Volume::Volume;
};

// Makes a disk a member, durably, before its bytes are part of the volume; gives the part of it that counts.
using Adopt = std::function<Task<Result<VolumePtr>>(VolumePtr disk)>;

// Without `adopt` a member is appended as it is.
Result<VolumePtr> make_linear(std::string name, std::vector<VolumePtr> members, Adopt adopt = {});

}  // namespace spillway
