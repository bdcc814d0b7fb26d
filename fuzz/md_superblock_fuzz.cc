// The md superblock reader: any bytes are either refused or give fields inside their ranges.
#include <cstring>

#include "src/volume/md/superblock.h"

using namespace spillway;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  uint64_t member_size;
  std::memcpy(&member_size, data, 8);
  member_size = (member_size % (1ull << 50)) & ~511ull;
  std::vector<std::byte> page(md::kSuperBytes);
  std::memcpy(page.data(), data + 8, std::min(size - 8, page.size()));
  for (int pass = 0; pass < 2; ++pass) {
    auto r = md::Superblock::parse(page, member_size, "member fuzz");
    if (r && *r) {
      md::Superblock& sb = **r;
      SPILLWAY_ASSERT(sb.raw.data_offset * 512 + sb.raw.data_size * 512 <= member_size);
      SPILLWAY_ASSERT(sb.raw.dev_number < sb.roles.size());
      SPILLWAY_ASSERT(sb.own_role() >= md::kRoleMax || sb.own_role() < sb.raw.raid_disks);
      auto again = md::Superblock::parse(sb.serialize(), member_size, "member fuzz");
      SPILLWAY_ASSERT(again && *again);
    }
    // Second pass behind the checksum.
    md::RawSuperblock raw;
    std::memcpy(&raw, page.data(), sizeof raw);
    if (raw.max_dev == 0 || raw.max_dev > 1920) break;
    std::vector<uint16_t> roles(raw.max_dev);
    std::memcpy(roles.data(), page.data() + sizeof raw, 2 * roles.size());
    raw.checksum = md::superblock_checksum(raw, roles);
    std::memcpy(page.data(), &raw, sizeof raw);
  }
  return 0;
}
