// Layout of virtqueues in guest memory and the feature bits both devices use (VIRTIO 1.3, 2.7, 2.8, 6).
// Little-endian; this code runs on little-endian machines only.
#pragma once

#include <bit>
#include <cstdint>

namespace spillway::virtio {

static_assert(std::endian::native == std::endian::little);

inline constexpr uint64_t feature_bit(unsigned n) { return uint64_t{1} << n; }

inline constexpr uint64_t kFeatureIndirect = feature_bit(28);
inline constexpr uint64_t kFeatureEventIdx = feature_bit(29);
inline constexpr uint64_t kFeatureVersion1 = feature_bit(32);
inline constexpr uint64_t kFeaturePacked = feature_bit(34);

// Descriptor flags, both layouts.
inline constexpr uint16_t kDescNext = 1, kDescWrite = 2, kDescIndirect = 4;
// Packed only.
inline constexpr uint16_t kDescAvail = 1 << 7, kDescUsed = 1 << 15;

struct SplitDesc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags;
  uint16_t next;
};
static_assert(sizeof(SplitDesc) == 16);

// struct avail { u16 flags; u16 idx; u16 ring[n]; u16 used_event; }
inline constexpr uint16_t kAvailNoInterrupt = 1;
// struct used { u16 flags; u16 idx; {u32 id; u32 len} ring[n]; u16 avail_event; }
inline constexpr uint16_t kUsedNoNotify = 1;

struct UsedElem {
  uint32_t id;
  uint32_t len;
};

struct PackedDesc {
  uint64_t addr;
  uint32_t len;
  uint16_t id;
  uint16_t flags;
};
static_assert(sizeof(PackedDesc) == 16);

// Packed event suppression structure: u16 offset and wrap; u16 flags.
inline constexpr uint16_t kEventEnable = 0, kEventDisable = 1, kEventDesc = 2;

}  // namespace spillway::virtio
