// Chain: one request as the driver put it in a ring, already translated: memory the device reads, then memory it writes.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "src/base/units.h"
#include "src/io/buffers.h"
#include "src/virtio/guest_memory.h"

namespace spillway::virtio {

inline constexpr unsigned kMaxQueueSize = 1024;
// Pieces of memory in one chain: a full queue of descriptors and some that a region's edge cuts in two.
inline constexpr unsigned kMaxPieces = kMaxQueueSize + 32;

// A descriptor as it was read, for in-flight logs that must give a packed chain back after a restart.
struct RawDesc {
  uint64_t addr;
  uint32_t len;
  uint16_t id;
  uint16_t flags;
};

// Where buffers were found last: heads and status bytes often live in another region than data.
struct RegionHints {
  uint32_t small = 0, large = 0;
};

// Reused from request to request; thread-confined.
struct Chain {
  uint16_t id = 0;         // split: head index; packed: buffer id
  uint16_t slots = 1;      // ring slots it takes (packed)
  uint16_t readable = 0;   // iov[0, readable) is for the device to read
  uint16_t count = 0;      // iov[readable, count) is for it to write
  bool outside = false;    // some of it is in no mapped region: only what lies inside is in iov
  bool blocking = false;   // some of it must not be touched on a reactor
  uint64_t readable_bytes = 0;
  uint64_t writable_bytes = 0;
  iovec iov[kMaxPieces];

  Iov in() const { return {iov, readable}; }                                      // device reads
  Iov out() const { return {iov + readable, static_cast<size_t>(count - readable)}; }  // device writes

  void clear() {
    slots = 1;
    readable = count = 0;
    outside = blocking = false;
    readable_bytes = writable_bytes = 0;
  }
  // Adds one buffer; an error text when the chain breaks a rule, else null.
  const char* add(const GuestMemory& memory, RegionHints& hints, uint64_t addr, uint32_t len, bool writable) {
    // Nearly every buffer lies whole in the region that the last one of its kind lay in.
    uint32_t& hint = len < kSectorSize ? hints.small : hints.large;
    const GuestRegion* r = memory.find(addr, hint);
    if (r == nullptr || r->host == nullptr || len > r->size - (addr - r->guest) || len == 0 ||
        count == kMaxPieces || (!writable && count > readable)) [[unlikely]]
      return add_slow(memory, hint, addr, len, writable);
    iov[count++] = {r->host + (addr - r->guest), len};
    blocking |= r->blocking;
    if (writable) {
      writable_bytes += len;
    } else {
      readable_bytes += len;
      readable = count;
    }
    return nullptr;
  }

 private:
  const char* add_slow(const GuestMemory& memory, uint32_t& hint, uint64_t addr, uint32_t len, bool writable);
};

}  // namespace spillway::virtio
