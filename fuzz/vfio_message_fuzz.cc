// The vfio-user message parser: any header and body; what it accepts must be inside the message and within bounds.
#include <cstring>

#include "src/base/result.h"
#include "src/export/vfio_user/message.h"

using namespace spillway::vfio;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < sizeof(Header) + 1) return 0;
  Header h{};
  std::memcpy(&h, data, sizeof h);
  const size_t fds = data[sizeof h] % (kMaxFds + 1);
  const auto* bytes = reinterpret_cast<const std::byte*>(data) + sizeof h + 1;
  const std::span<const std::byte> body(bytes, size - sizeof h - 1);
  (void)header_ok(h);
  const Request r = parse(h, body, fds);
  if (auto* w = std::get_if<RegionWrite>(&r)) {
    SPILLWAY_ASSERT(w->data.size() == w->at.count && w->at.count <= kMaxTransfer && w->at.region < kRegionCount);
    SPILLWAY_ASSERT(w->data.data() >= body.data() && w->data.data() + w->data.size() <= body.data() + body.size());
  } else if (auto* read = std::get_if<RegionRead>(&r)) {
    SPILLWAY_ASSERT(read->at.count != 0 && read->at.count <= kMaxTransfer);
  } else if (auto* s = std::get_if<SetIrqs>(&r)) {
    SPILLWAY_ASSERT(s->bools.size() <= body.size() && s->set.count <= 2048);
  } else if (auto* m = std::get_if<DmaMap>(&r)) {
    SPILLWAY_ASSERT(m->size != 0 && m->address + (m->size - 1) >= m->address && fds <= 1);
  }
  return 0;
}
