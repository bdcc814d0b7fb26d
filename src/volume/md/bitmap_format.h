// On disk: the write-intent bitmap's header (256 bytes), the bits follow at once: bit i of the little-endian bit
// string covers bytes [i, i + 1) * chunksize of every member's data area.
// Source of the layout: Linux drivers/md/md-bitmap.h (bitmap_super_t).
#pragma once

#include <cstdint>

namespace spillway::md {

inline constexpr uint32_t kBitmapMagic = 0x6d746962;  // "bitm"
inline constexpr uint32_t kBitmapVersion = 4;
inline constexpr uint32_t kBitmapStale = 1u << 1, kBitmapWriteError = 1u << 2;

struct RawBitmapHeader {
  uint32_t magic;
  uint32_t version;
  uint8_t uuid[16];
  uint64_t events;          // of the array when last written
  uint64_t events_cleared;  // a member at least this fresh is repaired by the bits alone
  uint64_t sync_size;       // sectors covered: used part of each member
  uint32_t state;
  uint32_t chunk_size;      // bytes
  uint32_t daemon_sleep;    // seconds between clearing rounds
  uint32_t write_behind;
  uint32_t sectors_reserved;
  uint32_t nodes;
  uint8_t cluster_name[64];
  uint8_t pad[120];
};
static_assert(sizeof(RawBitmapHeader) == 256);

}  // namespace spillway::md
