// The md 1.2 superblock as the layers use it: parsed and checked once, written whole.
//
// A superblock is read by hostile-input rules: every field is checked before anything is derived from it.
// Value type, thread-confined.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/volume/md/superblock_format.h"
#include "src/volume/volume.h"

namespace spillway::md {

using Uuid = std::array<uint8_t, 16>;
std::string format_uuid(const Uuid& uuid);  // as mdadm prints it
Uuid random_uuid();

inline constexpr int kLevelLinear = -1, kLevelStripe = 0, kLevelMirror = 1, kLevelRaid5 = 5;
inline constexpr uint64_t kSuperBytes = 4096;
inline constexpr uint32_t kMaxDev = 128;   // of superblocks made here: the whole is one 512-byte sector
// "linear", "raid0", ... "raid6"; "level 7".
std::string level_name(int32_t level);

struct Superblock {
  RawSuperblock raw{};
  std::vector<uint16_t> roles;  // by dev_number

  Uuid uuid() const { return std::to_array(raw.set_uuid); }
  Uuid device_uuid() const { return std::to_array(raw.device_uuid); }
  bool has(Feature f) const { return (raw.feature_map & f) != 0; }
  uint16_t role_of(uint32_t dev_number) const {
    return dev_number < roles.size() ? roles[dev_number] : kRoleSpare;
  }
  uint16_t own_role() const { return role_of(raw.dev_number); }
  uint64_t data_offset_bytes() const { return raw.data_offset * kSectorSize; }
  uint64_t chunk_bytes() const { return uint64_t{raw.chunk_sectors} * kSectorSize; }
  bool clean() const { return raw.resync_offset == kInSync; }

  // `page` holds kSuperBytes from kSuperOffset. nullopt: no md magic. Errors: kCorrupt, kUnsupported, with a line
  // that starts with `who`. member_size: bytes, for range checks.
  static Result<std::optional<Superblock>> parse(std::span<const std::byte> page, uint64_t member_size,
                                                 const std::string& who);
  // Sets the checksum. The result is kSuperBytes long, zero behind the roles.
  std::vector<std::byte> serialize();
  // Bytes of it that matter, rounded to the member's blocks.
  uint64_t stored_bytes(uint32_t block_size) const;
};

uint32_t superblock_checksum(const RawSuperblock& raw, std::span<const uint16_t> roles);

// Reads and parses; also names superblocks of other md versions (0.90, 1.0, 1.1) as unsupported.
Task<Result<std::optional<Superblock>>> read_superblock(Volume& member);
Task<Status> write_superblock(Volume& member, Superblock& sb);

}  // namespace spillway::md
