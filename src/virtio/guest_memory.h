// GuestMemory: where a guest's (or VMM's) addresses are in this process. A table, so that any transport can fill it:
// vhost-user from its memory table, vfio-user from its DMA map.
//
// Immutable when shared: a transport builds a new table and swaps it in while the queues stand still. It does not own the
// mappings. The memory behind it is hostile: contents change at any time, addresses do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "src/base/result.h"

namespace spillway::virtio {

struct GuestRegion {
  uint64_t guest = 0;         // guest-physical (or I/O virtual) address
  uint64_t size = 0;          // bytes
  uint64_t user = 0;          // the front-end's own virtual address (vhost-user ring addresses); else 0
  std::byte* host = nullptr;  // in this process; null: known, but cannot be mapped here
  bool blocking = false;      // a touch may block (backed by a file that we serve ourselves): never on a reactor
};

class GuestMemory {
 public:
  GuestMemory() = default;
  // kInvalid: overlap, wrap-around or an empty region.
  static Result<GuestMemory> create(std::vector<GuestRegion> regions);

  // The region that holds guest address `addr`, or null. `hint` is the caller's own memory of the last hit.
  const GuestRegion* find(uint64_t addr, uint32_t& hint) const {
    if (hint < regions_.size() && addr - regions_[hint].guest < regions_[hint].size)
      return &regions_[hint];
    return find_slow(addr, hint);
  }
  // [addr, addr + length) of the front-end's address space as one piece of memory that does not block; null if there
  // is none. `alignment` in bytes of the result.
  std::byte* translate_user(uint64_t addr, uint64_t length, uint64_t alignment) const;
  // The same for guest addresses.
  std::byte* translate_guest(uint64_t addr, uint64_t length, uint64_t alignment) const;

  const std::vector<GuestRegion>& regions() const { return regions_; }

 private:
  const GuestRegion* find_slow(uint64_t addr, uint32_t& hint) const;
  std::vector<GuestRegion> regions_;  // sorted by guest address
};

}  // namespace spillway::virtio
