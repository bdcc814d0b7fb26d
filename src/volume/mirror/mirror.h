// mirror (raid1): every member holds everything. Metadata: md 1.2 level 1.
//
// Reads go to one member, spread by position so that sequential streams stay on one disk; a read error is answered
// from another member and the bad range rewritten (a member that refuses the rewrite is faulty). Where members may
// differ after a crash, reads and the resync agree on the first usable member, so a block cannot change back.
// Writes copy the request's memory first: memory that changes while two members take it would make them differ.
// Writes that overlap are ordered by granule locks for the same reason.
#pragma once

#include "src/volume/md/array.h"

namespace spillway {

Result<std::shared_ptr<md::RedundantArray>> make_mirror(std::string name, md::ArrayInit init);

}  // namespace spillway
