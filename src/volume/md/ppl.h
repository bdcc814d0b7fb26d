// The partial parity log: closes the RAID 5 write hole (V2) without a journal.
//
// Before a stripe is written, the partial parity of what is about to change (the xor of the data that does *not*
// change) goes to the log on the member that holds the stripe's parity. After a crash, parity = partial parity xor the
// modified data as found on disk, so data that was not being written never depends on a torn stripe.
//
// Which flush orders what:
//   1. header and partial parity are written with FUA and awaited; data and parity of the batch are written after;
//   2. a header is overwritten only when every stripe of its batch is written *and all members were flushed after
//      that*: data in a member's volatile cache is as good as not written (the kernel once forgot this one);
//   3. a stripe written without a log entry (parity member gone) leaves no entry behind: the log went with the member.
// Full-row writes are logged too, with no partial parity: an older entry of the same row would otherwise be replayed
// over them.
//
// One batch per member at a time; writers that come meanwhile form the next batch (group commit).
// Thread-safety: internally synchronised; any reactor.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/io/sync.h"
#include "src/volume/md/ppl_format.h"
#include "src/volume/md/superblock.h"

namespace spillway::md {

uint32_t crc32c_inverted(std::span<const std::byte> bytes, uint32_t seed = ~0u);
uint32_t ppl_signature(const Uuid& uuid);

// What a log on disk holds; entries whose checksum fails have valid = false (their write never got further).
struct PplEntry {
  RawPplEntry raw;
  bool valid = false;
  std::vector<std::byte> partial_parity;
};
// `area`: the whole log area of a member. Newest valid header wins; nullopt: there is none. Never trusts a size it has
// not checked against the area.
std::optional<std::vector<PplEntry>> parse_ppl(std::span<const std::byte> area, uint32_t signature);
std::vector<std::byte> empty_ppl_header(uint32_t signature);

class PplLog {
 public:
  struct Io {
    // Writes to the log area of a member (offset within it), stable when done.
    std::function<Task<Status>(uint64_t offset, Iov iov)> write;
    // Whether parity is known to be right outside what the log covers. While it is not, every header gets an entry that
    // fits no checksum, so that whoever replays it (we or the kernel, which would call the array clean) resyncs all.
    std::function<bool()> in_sync;
    // Makes all data written so far stable on every member in use.
    std::function<Task<Status>()> flush_members;
  };
  struct Entry {
    RawPplEntry raw;  // checksum is filled in here
    std::span<const std::byte> partial_parity;
  };

  PplLog(uint32_t signature, uint64_t area_size, Io io);
  // Returns when the entries are stable. finish() follows when their data and parity have been written.
  // All or nothing: kIo when the log could not be written (finish() must not be called then).
  Task<Result<uint64_t>> log(std::vector<Entry> entries);
  void finish(uint64_t batch);
  uint64_t capacity() const { return space_; }

 private:
  struct Request : Waiter {
    std::vector<Entry>* entries = nullptr;
    uint64_t bytes = 0;
    bool leader = false;
    Status status{};
    uint64_t batch = 0;
  };
  Task<Status> write_batch(std::vector<Request*>& batch);
  struct Join;

  const uint32_t signature_;
  const uint64_t space_;
  const Io io_;
  SpinLock lock_;
  std::vector<Request*> pending_;  // guarded by lock_
  bool busy_ = false;              // a batch is being written or its stripes are
  bool dirty_ = false;             // a batch was finished and no flush has followed
  uint64_t generation_;
  uint64_t outstanding_ = 0;       // requests of the batch not finished
};

}  // namespace spillway::md
