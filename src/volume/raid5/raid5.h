// raid5: one parity chunk per row, rotated in one of four layouts. Metadata: md 1.2 level 5.
//
// A row is one chunk of every member. Every operation on a row runs under the row's (hashed) lock, but reads that
// touch healthy members only.
//
// A write inside a row is cut into rectangles: a range [lo, hi) within the chunk, in which a run of consecutive data
// disks is written whole. At most three cover any contiguous request. Per rectangle the *partial parity* (xor of what
// does not change) comes from reading either the old data and the old parity (read-modify-write) or the disks that
// are not written (reconstruct-write), whichever is fewer reads; none when all disks are written. With a member
// missing: a missing parity needs no parity; a missing disk that is written forces reconstruct-write (the others are
// all there); one that is not written forces read-modify-write. So a degraded write never needs a reconstruction.
//
// Order (V2): bitmap bits or log entry stable -> data and parity written -> acknowledged. See md/bitmap.h, md/ppl.h.
// The data is copied out of the request's memory first: parity must match what is written, whatever the guest does.
#pragma once

#include "src/volume/md/array.h"
#include "src/volume/md/ppl.h"

namespace spillway {

struct Raid5Init {
  md::ArrayInit array;
  bool ppl = false;
  uint64_t ppl_offset = 0;  // bytes from a member's start
  uint64_t ppl_size = 0;
};
Result<std::shared_ptr<md::RedundantArray>> make_raid5(std::string name, Raid5Init init);

struct PplReplay {
  uint64_t entries = 0;  // replayed
  // Logs without a valid header, entries whose checksum is wrong: as in the kernel, these leave the parity to a resync.
  uint64_t mismatches = 0;
};
// Replays the logs of all members into the parity, before the array is used. Writes parity, and flushes it.
Task<Result<PplReplay>> replay_ppl(const Raid5Init& init);
// Empties the logs of all members, whatever the kernel or we left there. After a replay, before the first write.
Task<Status> reset_ppl(const Raid5Init& init);

}  // namespace spillway
