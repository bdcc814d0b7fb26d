// On disk: the Linux md superblock, version 1.x; 1.2 lies 4 KiB into the member. Little endian.
// Source of the layout: include/uapi/linux/raid/md_p.h (struct mdp_superblock_1).
#pragma once

#include <bit>
#include <cstdint>

namespace spillway::md {

static_assert(std::endian::native == std::endian::little);

inline constexpr uint32_t kMagic = 0xa92b4efc;
inline constexpr uint64_t kSuperOffset = 4096;  // bytes, version 1.2
inline constexpr uint16_t kRoleSpare = 0xffff;
inline constexpr uint16_t kRoleFaulty = 0xfffe;
inline constexpr uint16_t kRoleJournal = 0xfffd;
inline constexpr uint16_t kRoleMax = 0xff00;    // real slots are below
inline constexpr uint64_t kInSync = ~0ull;      // resync_offset, recovery_offset: nothing to do

enum Feature : uint32_t {
  kFeatureBitmap = 1,
  kFeatureRecoveryOffset = 2,
  kFeatureReshape = 4,
  kFeatureBadBlocks = 8,
  kFeatureReplacement = 16,
  kFeatureReshapeBackwards = 32,
  kFeatureNewOffset = 64,
  kFeatureRecoveryBitmap = 128,
  kFeatureClustered = 256,
  kFeatureJournal = 512,
  kFeaturePpl = 1024,
  kFeatureMultiplePpls = 2048,
  kFeatureRaid0Layout = 4096,
};

struct RawSuperblock {
  // Of the array.
  uint32_t magic;
  uint32_t major_version;
  uint32_t feature_map;
  uint32_t pad0;
  uint8_t set_uuid[16];
  char set_name[32];
  uint64_t ctime;  // low 40 bits seconds, then microseconds
  int32_t level;
  uint32_t layout;
  uint64_t size;  // sectors used of each member
  uint32_t chunk_sectors;
  uint32_t raid_disks;
  union {
    int32_t bitmap_offset;  // sectors from the superblock
    struct {
      int16_t offset;   // sectors from the superblock
      uint16_t size;    // sectors
    } ppl;
  };
  uint32_t new_level;
  uint64_t reshape_position;
  uint32_t delta_disks;
  uint32_t new_layout;
  uint32_t new_chunk;
  int32_t new_offset;
  // Of this member.
  uint64_t data_offset;
  uint64_t data_size;
  uint64_t super_offset;
  uint64_t recovery_offset;
  uint32_t dev_number;
  uint32_t corrected_reads;
  uint8_t device_uuid[16];
  uint8_t devflags;
  uint8_t bblog_shift;
  uint16_t bblog_size;
  int32_t bblog_offset;
  // State of the array.
  uint64_t utime;
  uint64_t events;
  uint64_t resync_offset;
  uint32_t checksum;
  uint32_t max_dev;
  uint8_t pad3[32];
  // uint16_t dev_roles[max_dev] follow
};
static_assert(sizeof(RawSuperblock) == 256);

}  // namespace spillway::md
