#include "src/volume/md/superblock.h"

#include <fmt/core.h>
#include <sys/random.h>

#include <cstring>
#include <utility>

namespace spillway::md {

std::string format_uuid(const Uuid& u) {
  std::string s;
  for (size_t i = 0; i < u.size(); ++i) s += fmt::format("{}{:02x}", i != 0 && i % 4 == 0 ? ":" : "", u[i]);
  return s;
}

Uuid random_uuid() {
  Uuid u{};
  SPILLWAY_ASSERT(::getrandom(u.data(), u.size(), 0) == static_cast<ssize_t>(u.size()));
  return u;
}

std::string level_name(int32_t level) {
  switch (level) {
    case -4: return "multipath";
    case kLevelLinear: return "linear";
    case 0: case 1: case 4: case 5: case 6: case 10: return fmt::format("raid{}", level);
    default: return fmt::format("level {}", level);
  }
}

uint32_t superblock_checksum(const RawSuperblock& raw, std::span<const uint16_t> roles) {
  RawSuperblock copy = raw;
  copy.checksum = 0;
  uint64_t sum = 0;
  uint32_t words[sizeof copy / 4];
  std::memcpy(words, &copy, sizeof copy);
  for (uint32_t w : words) sum += w;
  for (size_t i = 0; i + 1 < roles.size(); i += 2) sum += roles[i] | static_cast<uint32_t>(roles[i + 1]) << 16;
  if (roles.size() % 2 != 0) sum += roles.back();
  return static_cast<uint32_t>(sum) + static_cast<uint32_t>(sum >> 32);
}

namespace {

constexpr uint32_t kKnownFeatures = 0x1fff;

Status check_features(const RawSuperblock& r, const std::string& who) {
  struct Named {
    uint32_t bits;
    const char* text;
  };
  static constexpr Named refused[] = {
      {kFeatureReshape | kFeatureReshapeBackwards | kFeatureNewOffset, "a reshape is under way; finish it with mdadm"},
      {kFeatureBadBlocks, "its bad block log is not empty"},
      {kFeatureClustered, "clustered md"},
      {kFeatureJournal, "a raid5 journal (write cache)"},
  };
  for (const Named& f : refused)
    if ((r.feature_map & f.bits) != 0)
      return fail(ErrorKind::kUnsupported, fmt::format("{}: not supported: {}", who, f.text));
  if ((r.feature_map & ~kKnownFeatures) != 0)
    return fail(ErrorKind::kUnsupported,
                fmt::format("{}: not supported: unknown md features {:#x}", who, r.feature_map & ~kKnownFeatures));
  if ((r.feature_map & kFeatureBitmap) != 0 && (r.feature_map & (kFeaturePpl | kFeatureMultiplePpls)) != 0)
    return fail(ErrorKind::kCorrupt, fmt::format("{}: superblock claims bitmap and PPL at once", who));
  return {};
}

Status check_fields(const RawSuperblock& r, uint64_t member_size, const std::string& who) {
  const uint64_t sectors = member_size / kSectorSize;
  const auto corrupt = [&](const std::string& what) {
    return fail(ErrorKind::kCorrupt, fmt::format("{}: superblock: {}", who, what));
  };
  if (r.level != kLevelLinear && r.level != 0 && r.level != 1 && r.level != 5)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: md {} is not supported", who, level_name(r.level)));
  if (r.super_offset != kSuperOffset / kSectorSize) return corrupt(fmt::format("claims to be at sector {}", r.super_offset));
  if (r.raid_disks == 0 || r.raid_disks > 1024) return corrupt(fmt::format("{} members", r.raid_disks));
  if (r.level == 5 && r.raid_disks < 2) return corrupt("a raid5 of one member");
  if (r.data_offset < (kSuperOffset + 512) / kSectorSize || r.data_offset > sectors)
    return corrupt(fmt::format("data offset {} of {} sectors", r.data_offset, sectors));
  if (r.data_size == 0 || r.data_size > sectors - r.data_offset)
    return fail(ErrorKind::kCorrupt,
                fmt::format("{}: too small: superblock wants {} sectors of data at {}, the member has {} sectors", who,
                            r.data_size, r.data_offset, sectors));
  if ((r.level == 1 || r.level == 5) && (r.size == 0 || r.size > r.data_size))
    return corrupt(fmt::format("uses {} of {} data sectors", r.size, r.data_size));
  if ((r.level == 0 || r.level == 5) && (r.chunk_sectors == 0 || r.chunk_sectors > kGiB / kSectorSize))
    return corrupt(fmt::format("chunk of {} sectors", r.chunk_sectors));
  if (r.level == 5 && ((r.chunk_sectors & (r.chunk_sectors - 1)) != 0 || r.chunk_sectors < 8))
    return corrupt(fmt::format("raid5 chunk of {} sectors", r.chunk_sectors));
  if (r.level == 5 && r.size < r.chunk_sectors) return corrupt("uses less than a chunk");
  if ((r.level == 0 || r.level == kLevelLinear) && r.chunk_sectors != 0 && r.data_size < r.chunk_sectors)
    return corrupt("a member smaller than a chunk");
  if (r.level == 5 && r.layout > 3)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: raid5 layout {} is not supported", who, r.layout));
  if (r.level == 0 && r.layout > 2)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: raid0 layout {} is not supported", who, r.layout));
  return {};
}

}  // namespace

Result<std::optional<Superblock>> Superblock::parse(std::span<const std::byte> page, uint64_t member_size,
                                                    const std::string& who) {
  if (page.size() < sizeof(RawSuperblock)) return std::optional<Superblock>{};
  Superblock sb;
  std::memcpy(&sb.raw, page.data(), sizeof sb.raw);
  if (sb.raw.magic != kMagic) return std::optional<Superblock>{};
  if (sb.raw.major_version != 1)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: md superblock version {} is not supported", who,
                                                     sb.raw.major_version));
  if (sb.raw.max_dev == 0 || sizeof(RawSuperblock) + 2ull * sb.raw.max_dev > page.size())
    return fail(ErrorKind::kCorrupt, fmt::format("{}: superblock: room for {} devices", who, sb.raw.max_dev));
  sb.roles.resize(sb.raw.max_dev);
  std::memcpy(sb.roles.data(), page.data() + sizeof sb.raw, 2 * sb.roles.size());
  const uint32_t want = superblock_checksum(sb.raw, sb.roles);
  if (want != sb.raw.checksum)
    return fail(ErrorKind::kCorrupt,
                fmt::format("{}: superblock checksum {:08x}, should be {:08x}", who, sb.raw.checksum, want));
  SPILLWAY_CHECK(check_features(sb.raw, who));
  SPILLWAY_CHECK(check_fields(sb.raw, member_size, who));
  if (sb.raw.dev_number >= sb.roles.size())
    return fail(ErrorKind::kCorrupt, fmt::format("{}: superblock: device number {} of {}", who, sb.raw.dev_number,
                                                 sb.roles.size()));
  for (uint16_t role : sb.roles)
    if (role < kRoleMax && role >= sb.raw.raid_disks)
      return fail(ErrorKind::kCorrupt, fmt::format("{}: superblock: role {} of {} members", who, role, sb.raw.raid_disks));
  if (sb.own_role() == kRoleJournal)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: not supported: a journal device", who));
  return sb;
}

std::vector<std::byte> Superblock::serialize() {
  raw.max_dev = static_cast<uint32_t>(roles.size());
  raw.checksum = superblock_checksum(raw, roles);
  std::vector<std::byte> page(kSuperBytes);
  SPILLWAY_ASSERT(sizeof raw + 2 * roles.size() <= page.size());
  std::memcpy(page.data(), &raw, sizeof raw);
  std::memcpy(page.data() + sizeof raw, roles.data(), 2 * roles.size());
  return page;
}

uint64_t Superblock::stored_bytes(uint32_t block_size) const {
  return align_up(sizeof raw + 2 * roles.size(), block_size);
}

// Other places an md superblock may be at: 1.1 at the start, 1.0 and 0.90 near the end.
static Task<Status> refuse_other_versions(Volume& member, const std::string& who) {
  const uint64_t size = member.size();
  struct Place {
    uint64_t offset;
    const char* version;
  };
  const Place places[] = {{0, "1.1"},
                          {size >= 16 * kKiB ? align_down(size - 8 * kKiB, 4096) : size, "1.0"},
                          {size >= 128 * kKiB ? align_down(size, 64 * kKiB) - 64 * kKiB : size, "0.90"}};
  AlignedBuffer buffer(4096);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, who);
  for (const Place& p : places) {
    if (p.offset + 4096 > size || !is_aligned(p.offset, member.geometry().block_size)) continue;
    const iovec v = buffer.iov();
    Status s = co_await member.read(IoContext{.io_class = IoClass::kMetadata}, p.offset, Iov(&v, 1));
    if (!s) co_return s;
    uint32_t words[2];
    std::memcpy(words, buffer.data(), sizeof words);
    const uint32_t version = p.version[0] == '0' ? 0 : 1;
    if (words[0] == kMagic && words[1] == version)
      co_return fail(ErrorKind::kUnsupported,
                     fmt::format("{}: md superblock version {} is not supported (1.2 is)", who, p.version));
  }
  co_return Status{};
}

Task<Result<std::optional<Superblock>>> read_superblock(Volume& member) {
  using R = Result<std::optional<Superblock>>;
  const std::string who = fmt::format("member {}", member.name());
  if (member.size() < kSuperOffset + kSuperBytes) co_return R(std::optional<Superblock>{});
  AlignedBuffer buffer(kSuperBytes);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, who);
  const iovec v = buffer.iov();
  Status s = co_await member.read(IoContext{.io_class = IoClass::kMetadata}, kSuperOffset, Iov(&v, 1));
  if (!s) co_return fail(std::move(s).error().with_context(who));
  R sb = Superblock::parse({buffer.data(), buffer.size()}, member.size(), who);
  if (!sb || sb->has_value()) co_return sb;
  s = co_await refuse_other_versions(member, who);
  if (!s) co_return fail(std::move(s).error());
  co_return sb;
}

Task<Status> write_superblock(Volume& member, Superblock& sb) {
  std::vector<std::byte> page = sb.serialize();
  const uint64_t n = sb.stored_bytes(member.geometry().block_size);
  AlignedBuffer buffer(n);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, fmt::format("member {}: superblock", member.name()));
  std::memcpy(buffer.data(), page.data(), std::min<uint64_t>(n, page.size()));
  const iovec v = buffer.iov();
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  ctx.fua = true;
  co_return co_await member.write(ctx, kSuperOffset, Iov(&v, 1));
}

}  // namespace spillway::md
