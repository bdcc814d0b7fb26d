// The partial parity log: entries never reach outside the area; checksums are made right in the second pass.
#include <cstring>

#include "src/volume/md/ppl.h"

using namespace spillway;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::byte> area(256 * 1024);
  std::memcpy(area.data(), data, std::min(size, area.size()));
  for (int pass = 0; pass < 2; ++pass) {
    if (const auto entries = md::parse_ppl(area, 0x12345678))
      for (const auto& e : *entries) {
        SPILLWAY_ASSERT(!e.valid || e.partial_parity.size() == e.raw.pp_size);
        SPILLWAY_ASSERT(e.raw.pp_size <= area.size());
      }
    md::RawPplHeader h;
    std::memcpy(&h, area.data(), sizeof h);
    h.signature = 0x12345678;
    h.checksum = 0;
    h.checksum = md::crc32c_inverted(std::as_bytes(std::span(&h, 1)));
    std::memcpy(area.data(), &h, sizeof h);
  }
  return 0;
}
