#include "src/virtio/chain.h"

#include <algorithm>

namespace spillway::virtio {

const char* Chain::add_slow(const GuestMemory& memory, uint32_t& hint, uint64_t addr, uint32_t len,
                            bool writable) {
  if (writable) writable_bytes += len;
  else if (writable_bytes > 0 || count > readable) return "a readable descriptor after a writable one";
  else readable_bytes += len;
  uint64_t left = len;
  while (left > 0) {
    const GuestRegion* r = memory.find(addr, hint);
    if (r == nullptr || r->host == nullptr) {
      outside = true;
      return nullptr;
    }
    const uint64_t offset = addr - r->guest;
    const uint64_t now = std::min(left, r->size - offset);
    if (count == kMaxPieces) return "too many pieces of memory in one chain";
    iov[count++] = {r->host + offset, static_cast<size_t>(now)};
    if (!writable) readable = count;
    blocking |= r->blocking;
    addr += now;
    left -= now;
  }
  return nullptr;
}

}  // namespace spillway::virtio
