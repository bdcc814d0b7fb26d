// The write-intent bitmap's header and bits.
#include <algorithm>
#include <cstring>

#include "src/volume/md/bitmap.h"

using namespace spillway;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8 + sizeof(md::RawBitmapHeader)) return 0;
  uint64_t component;
  std::memcpy(&component, data, 8);
  component = (component % (1ull << 40)) & ~511ull;
  md::RawBitmapHeader h;
  std::memcpy(&h, data + 8, sizeof h);
  const std::span<const std::byte> bits(reinterpret_cast<const std::byte*>(data) + 8 + sizeof h, size - 8 - sizeof h);
  constexpr uint64_t kSpace = 64 * 1024;
  if (component == 0 || !md::Bitmap::check(h, component, component, kSpace, "member fuzz")) return 0;
  md::Bitmap b(h, component, kSpace);
  b.merge(bits, true);
  for (uint64_t at = b.next_needing_sync(0), n = 0; at < component && n < 1000; at = b.next_needing_sync(at), ++n) {
    SPILLWAY_ASSERT(b.needs_sync(at, at + 1));
    const uint64_t end = std::min(component, (at / b.chunk() + 1) * b.chunk());
    b.synced(at / b.chunk() * b.chunk(), end);
  }
  return 0;
}
