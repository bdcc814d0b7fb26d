// On disk: the partial parity log, one area per member. A header of 4 KiB, then the partial parity of its entries, one
// after the other. Little endian; checksums are inverted CRC-32C.
// Source of the layout: include/uapi/linux/raid/md_p.h (struct ppl_header).
#pragma once

#include <cstdint>

namespace spillway::md {

inline constexpr uint32_t kPplHeaderSize = 4096;
inline constexpr uint32_t kPplReserved = 512;
inline constexpr uint32_t kPplMaxEntries = 148;  // fills the header
inline constexpr uint32_t kPplSpace = 128 * 1024;

struct RawPplEntry {
  uint64_t data_sector;  // first array sector modified
  uint32_t pp_size;      // bytes of partial parity; 0: all data disks of the row are modified
  uint32_t data_size;    // bytes modified, over all data disks
  uint32_t parity_disk;  // slot
  uint32_t checksum;     // of the partial parity
};
static_assert(sizeof(RawPplEntry) == 24);

struct RawPplHeader {
  uint8_t reserved[kPplReserved];  // 0xff
  uint32_t signature;              // inverted CRC-32C of the array's uuid
  uint32_t padding;
  uint64_t generation;
  uint32_t entries_count;
  uint32_t checksum;               // of the header with this field zero
  RawPplEntry entries[kPplMaxEntries];
  uint8_t pad[8];
};
static_assert(sizeof(RawPplHeader) == kPplHeaderSize);

}  // namespace spillway::md
