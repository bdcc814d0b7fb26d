// linear: members one after the other, a plain layout (nothing of its own on disk). Each member is a region that
// seeks on its own (V3, V4), and a member can be appended while the volume is in use (V5).
//
// The member table is immutable; growth publishes a longer one (release) before the larger size becomes visible, so
// whoever sees the size sees the table. Replaced tables live as long as the volume: one per growth.
// Thread-safety: any reactor; append() and resize() are serialised inside.
#pragma once

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

Result<VolumePtr> make_linear(std::string name, std::vector<VolumePtr> members);

}  // namespace spillway
