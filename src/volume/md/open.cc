#include "src/volume/md/open.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "src/base/log.h"
#include "src/volume/linear/linear.h"
#include "src/volume/md/layout.h"
#include "src/volume/md/raid0.h"
#include "src/volume/mirror/mirror.h"
#include "src/volume/raid5/raid5.h"
#include "src/volume/slice/slice.h"

namespace spillway::md {
namespace {

constexpr uint64_t kBlankBytes = kMiB;
constexpr uint64_t kDataOffset = kMiB;              // of members made here
constexpr uint64_t kAreaOffset = 8 * kKiB;          // of the bitmap or log of members made here
constexpr uint64_t kDefaultChunk = 64 * kKiB;
constexpr uint64_t kStaged = 64 * kKiB;             // of the bitmap read at once

int layer_level(std::string_view layer) {
  if (layer == "linear") return kLevelLinear;
  if (layer == "stripe") return kLevelStripe;
  if (layer == "mirror") return kLevelMirror;
  return kLevelRaid5;
}

// Writes stay in memory: what a log's replay makes of a dirty degraded array when nothing may be written.
class Overlay final : public Volume {
 public:
  explicit Overlay(VolumePtr below)
      : Volume(below->name(), below->size(), writable(below->geometry())), below_(std::move(below)) {}
  std::string_view layer() const override { return "overlay"; }
  std::vector<VolumePtr> members() const override { return {below_}; }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    Status s = co_await below_->read(ctx, offset, iov);
    if (!s) co_return s;
    const uint64_t end = offset + iov_length(iov);
    for (auto it = blocks_.lower_bound(offset); it != blocks_.end() && it->first < end; ++it)
      copy_to_iov(iov, it->first - offset, it->second.data(), it->second.size());
    co_return Status{};
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    const uint64_t length = iov_length(iov);
    for (uint64_t at = 0; at < length; at += geometry().block_size) {
      auto& block = blocks_[offset + at];
      block.resize(geometry().block_size);
      copy_from_iov(block.data(), iov, at, block.size());
    }
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }

 private:
  static Geometry writable(Geometry g) {
    g.read_only = false;
    g.discard_granularity = 0;
    return g;
  }
  const VolumePtr below_;
  std::map<uint64_t, std::vector<std::byte>> blocks_;  // filled before the array is used, then constant
};

// Everything reads as zeros as far as block_status can tell without reading.
Task<bool> is_hole(Volume& v) {
  auto r = co_await v.block_status(0, v.size());
  if (!r) co_return false;
  for (const Extent& e : *r)
    if (e.kind == Extent::Kind::kData) co_return false;
  co_return true;
}

struct Opening {
  LayerSpec spec;
  std::vector<Candidate> all;
  Superblock best;                  // freshest
  std::vector<Candidate*> slots;    // by role
  std::vector<Candidate*> replacements;
  std::vector<Candidate*> spares;
};

Status check_same_array(Opening& o) {
  const auto& spec = o.spec;
  const Candidate* first = nullptr;
  for (const Candidate& c : o.all) {
    if (!c.sb) continue;
    if (first == nullptr) first = &c;
    if (c.sb->uuid() != first->sb->uuid())
      return fail(ErrorKind::kInvalid,
                  fmt::format("volume {}: members of different arrays: {} of {}, {} of {}", spec.name, first->name,
                              format_uuid(first->sb->uuid()), c.name, format_uuid(c.sb->uuid())));
    for (const Candidate& d : o.all) {
      if (&d == &c) break;
      if (d.sb && d.sb->device_uuid() == c.sb->device_uuid())
        return fail(ErrorKind::kInvalid, fmt::format("volume {}: {} and {} are copies of one member ({})", spec.name,
                                                     d.name, c.name, format_uuid(c.sb->device_uuid())));
    }
    if (c.sb->raw.events >= o.best.raw.events || o.best.raw.magic == 0) {
      if (o.best.raw.magic == 0 || c.sb->raw.events > o.best.raw.events) o.best = *c.sb;
    }
  }
  return {};
}

Status check_agreement(const Opening& o) {
  const auto& spec = o.spec;
  const auto& b = o.best.raw;
  const auto contradicts = [&](const std::string& what) {
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: {}", spec.name, what));
  };
  if (spec.layer != "md") {
    if (layer_level(spec.layer) != b.level)
      return contradicts(fmt::format("layer \"{}\" but the superblocks say md {}", spec.layer, level_name(b.level)));
    if (spec.chunk != 0 && b.chunk_sectors != 0 && b.level != kLevelMirror && b.level != kLevelLinear &&
        spec.chunk != o.best.chunk_bytes())
      return contradicts(fmt::format("chunk {} but the superblocks say {}", spec.chunk, o.best.chunk_bytes()));
    if (b.level == kLevelRaid5 && !spec.raid5_layout.empty() &&
        spec.raid5_layout != to_string(static_cast<Raid5Layout>(b.layout)))
      return contradicts(fmt::format("layout {} but the superblocks say {}", spec.raid5_layout,
                                     to_string(static_cast<Raid5Layout>(b.layout))));
    if (spec.members.size() != b.raid_disks)
      return contradicts(fmt::format("{} members but the superblocks say {}", spec.members.size(), b.raid_disks));
    if (!spec.consistency.empty() && b.level > 0) {
      const std::string_view is = o.best.has(kFeatureBitmap) ? "bitmap"
                                  : o.best.has(kFeaturePpl) || o.best.has(kFeatureMultiplePpls) ? "ppl" : "resync";
      if (spec.consistency != is)
        return contradicts(fmt::format("consistency {} but the superblocks say {}", spec.consistency, is));
    }
  }
  for (const Candidate& c : o.all) {
    if (!c.sb || c.sb->raw.events + 1 < b.events) continue;
    const auto& r = c.sb->raw;
    // A linear array that was being grown: the members that were not reached yet know of fewer.
    if (b.level == kLevelLinear && r.level == b.level && r.events < b.events && r.raid_disks < b.raid_disks) continue;
    if (r.level != b.level || r.layout != b.layout || r.chunk_sectors != b.chunk_sectors || r.raid_disks != b.raid_disks ||
        r.size != b.size)
      return contradicts(fmt::format("member {}: its superblock describes another array than the others'", c.name));
  }
  return {};
}

Status assign_slots(Opening& o) {
  const auto& spec = o.spec;
  const bool redundant = o.best.raw.level > 0;
  o.slots.assign(o.best.raw.raid_disks, nullptr);
  o.replacements.assign(o.best.raw.raid_disks, nullptr);
  for (Candidate& c : o.all) {
    if (!c.volume) continue;
    if (!c.sb) {
      if (redundant && c.blank) {
        log(LogLevel::kWarn, "volume", "volume {}: member {} is blank and not used: spillway volume add {} {}", spec.name,
            c.name, spec.name, c.name);
        continue;
      }
      return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {} has no md superblock", spec.name, c.name));
    }
    const uint16_t role = o.best.role_of(c.sb->raw.dev_number);
    // What says of itself that it is a spare is one, also where the others say already which slot it was to fill: nothing has
    // been copied to it. (The kernel does not keep a spare's event count up to date.)
    if (redundant && role != kRoleFaulty && c.sb->own_role() == kRoleSpare) {
      o.spares.push_back(&c);
      continue;
    }
    if (redundant && c.sb->raw.events + 1 < o.best.raw.events) {
      log(LogLevel::kWarn, "volume", "volume {}: member {} is stale (event {} of {}) and not used", spec.name, c.name,
          c.sb->raw.events, o.best.raw.events);
      continue;
    }
    if (role >= kRoleMax) {
      log(LogLevel::kWarn, "volume", "volume {}: member {} was marked faulty by the others and is not used", spec.name, c.name);
      continue;
    }
    auto& place = redundant && c.sb->has(kFeatureReplacement) ? o.replacements[role] : o.slots[role];
    if (place != nullptr)
      return fail(ErrorKind::kCorrupt,
                  fmt::format("volume {}: {} and {} both claim slot {}", spec.name, place->name, c.name, role));
    place = &c;
  }
  return {};
}


// What reads in whole blocks must begin at one.
Status check_alignment(const Opening& o, const Candidate& c) {
  const uint32_t block = c.volume->geometry().block_size;
  if (is_aligned(c.sb->data_offset_bytes(), block)) return {};
  return fail(ErrorKind::kUnsupported, fmt::format("volume {}: member {}: data at sector {} does not begin at one of its {} byte blocks",
                                                   o.spec.name, c.name, c.sb->raw.data_offset, block));
}

uint64_t wall_seconds() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count());
}

// The part of a member that is in a raid0 or linear array.
Result<VolumePtr> data_area(const std::string& name, VolumePtr disk, const Superblock& sb) {
  const uint64_t round = sb.raw.chunk_sectors != 0 ? sb.chunk_bytes() : kSectorSize;
  return make_slice(name, std::move(disk), sb.data_offset_bytes(), align_down(sb.raw.data_size * kSectorSize, round));
}

// The superblocks of a linear array, for growing it. Under the volume's growth lock.
struct LinearBlocks {
  std::string name;
  std::vector<std::pair<VolumePtr, Superblock>> members;  // by slot, as of the last growth that was finished
  uint64_t events = 0;                                    // the highest that was written anywhere

  // The new member's superblock first: until it is stable, the old ones describe the array as it was; from then on it is
  // the freshest, knows all members, and whoever assembles goes by it, however many of the others follow (md allows one
  // event of difference).
  Task<Result<VolumePtr>> adopt(VolumePtr disk) {
    Superblock common = members.front().second;
    for (const auto& [v, sb] : members) events = std::max(events, sb.raw.events);
    const uint32_t slot = common.raw.raid_disks, number = static_cast<uint32_t>(common.roles.size() > slot ? slot : common.roles.size());
    const auto no = [&](ErrorKind kind, const std::string& why) {
      return fail(kind, fmt::format("volume {}: member {}: {}", name, disk->name(), why));
    };
    if (slot >= kMaxDev) co_return no(ErrorKind::kNoSpace, "the superblock has no room for another member");
    if (number == common.roles.size()) common.roles.push_back(kRoleSpare);
    if (common.roles[number] < kRoleMax) co_return no(ErrorKind::kUnsupported, "device numbers of the array are not those of its slots");
    auto old = co_await read_superblock(*disk);
    if (!old) co_return fail(std::move(old).error());
    if (disk->geometry().read_only) co_return no(ErrorKind::kReadOnly, "read-only");
    // Of this array: an attempt that failed half way.
    if (old->has_value() && (*old)->uuid() != common.uuid()) co_return no(ErrorKind::kExists, "belongs to md array " + format_uuid((*old)->uuid()));
    common.roles[number] = static_cast<uint16_t>(slot);
    common.raw.raid_disks = slot + 1;
    common.raw.events = ++events;
    common.raw.utime = wall_seconds();
    Superblock own = common;
    own.raw.dev_number = number;
    const Uuid id = random_uuid();
    std::copy(id.begin(), id.end(), own.raw.device_uuid);
    own.raw.data_offset = kDataOffset / kSectorSize;
    own.raw.super_offset = kSuperOffset / kSectorSize;
    own.raw.bblog_offset = 0;
    own.raw.bblog_size = 0;
    own.raw.bblog_shift = 0;
    own.raw.devflags = 0;
    own.raw.corrected_reads = 0;
    const uint64_t round = std::max<uint64_t>(own.chunk_bytes(), std::max<uint64_t>(kSectorSize, disk->geometry().block_size));
    if (disk->size() < kDataOffset + round) co_return no(ErrorKind::kNoSpace, fmt::format("size {} is too small", disk->size()));
    own.raw.data_size = align_down(disk->size() - kDataOffset, round) / kSectorSize;
    auto area = data_area(disk->name(), disk, own);
    if (!area) co_return area;
    SPILLWAY_CO_CHECK(co_await write_superblock(*disk, own));
    auto grown = members;
    for (auto& [v, next] : grown) {
      next.roles = common.roles;
      next.raw.raid_disks = common.raw.raid_disks;
      next.raw.events = common.raw.events;
      next.raw.utime = common.raw.utime;
      // Said even though the array is whole with this superblock as it was: the next event would leave it behind.
      Status s = co_await write_superblock(*v, next);
      if (!s) co_return fail(std::move(s).error().with_context(fmt::format("volume {}: half grown", name)));
    }
    members = std::move(grown);
    members.emplace_back(disk, std::move(own));
    co_return area;
  }
};

// raid0 and linear: plain layouts over the data areas.
Result<VolumePtr> open_plain(Opening& o) {
  const auto& b = o.best.raw;
  std::vector<VolumePtr> areas;
  for (size_t i = 0; i < o.slots.size(); ++i) {
    if (o.slots[i] == nullptr)
      return fail(ErrorKind::kNotFound, fmt::format("volume {}: member {} of {} is missing and md {} has no redundancy",
                                                    o.spec.name, i, o.slots.size(), level_name(b.level)));
    SPILLWAY_CHECK(check_alignment(o, *o.slots[i]));
    auto area = data_area(o.slots[i]->name, o.slots[i]->volume, *o.slots[i]->sb);
    if (!area) return area;
    areas.push_back(std::move(*area));
  }
  if (b.level == kLevelLinear) {
    auto blocks = std::make_shared<LinearBlocks>();
    blocks->name = o.spec.name;
    // One that a growth did not reach is brought up to date by the next.
    for (Candidate* c : o.slots) {
      blocks->members.emplace_back(c->volume, *c->sb);
      blocks->members.back().second.roles = o.best.roles;
      blocks->members.back().second.raw.raid_disks = o.best.raw.raid_disks;
    }
    return make_linear(o.spec.name, std::move(areas), [blocks](VolumePtr disk) { return blocks->adopt(std::move(disk)); });
  }
  // Without the layout feature the kernel refuses arrays of several zones; one zone is the same either way.
  uint32_t layout = o.best.has(kFeatureRaid0Layout) ? b.layout : 0;
  bool equal = true;
  for (const auto& a : areas) equal &= a->size() == areas[0]->size();
  if (layout != 1 && layout != 2) {
    if (!equal)
      return fail(ErrorKind::kUnsupported, fmt::format("volume {}: a raid0 of unequal members without a layout; mdadm "
                                                       "--update=layout-original or layout-alternate decides", o.spec.name));
    layout = 2;
  }
  return make_raid0(o.spec.name, std::move(areas), o.best.chunk_bytes(), static_cast<Raid0Layout>(layout));
}

MemberPtr make_member(const Candidate& c, int slot) {
  auto m = std::make_shared<Member>();
  m->volume = c.volume;
  m->name = c.name;
  m->sb = *c.sb;
  m->slot = slot;
  m->data_offset_ = c.sb->data_offset_bytes();
  return m;
}

// Bytes from the superblock to the first thing behind the area, so that no area reaches into data or bad block log.
uint64_t area_space(const Superblock& sb, int64_t offset_sectors) {
  const int64_t begin = static_cast<int64_t>(kSuperOffset / kSectorSize) + offset_sectors;
  int64_t end = static_cast<int64_t>(sb.raw.data_offset);
  if (sb.raw.bblog_size != 0) {
    const int64_t bad = static_cast<int64_t>(kSuperOffset / kSectorSize) + sb.raw.bblog_offset;
    if (bad >= begin) end = std::min(end, bad);
  }
  return begin > 8 && end > begin ? static_cast<uint64_t>(end - begin) * kSectorSize : 0;
}

Task<Result<std::unique_ptr<Bitmap>>> load_bitmap(Opening& o, const ArrayInit& init) {
  const uint64_t component = o.best.raw.size * kSectorSize;
  const int64_t offset = o.best.raw.bitmap_offset;
  std::unique_ptr<Bitmap> bitmap;
  // The active ones first: what a member that is still being filled has there says nothing.
  std::vector<MemberPtr> all;
  for (const MemberPtr& m : init.slots)
    if (m && m->state.load() == MemberState::kActive) all.push_back(m);
  for (const auto* list : {&init.slots, &init.replacements, &init.spares})
    for (const MemberPtr& m : *list)
      if (m && m->state.load() != MemberState::kActive) all.push_back(m);
  for (const MemberPtr& m : all) {
    const std::string who = fmt::format("volume {}: member {}", o.spec.name, m->name);
    const uint64_t space = area_space(m->sb, offset);
    const uint64_t at = static_cast<uint64_t>(static_cast<int64_t>(kSuperOffset) + offset * kSectorSize);
    if (space < sizeof(RawBitmapHeader) || !is_aligned(at, 4096) || m->sb.raw.bitmap_offset != offset)
      co_return fail(ErrorKind::kCorrupt, fmt::format("{}: write-intent bitmap at sector {} has no room", who, offset));
    if (m->state.load() != MemberState::kActive) {
      if (bitmap && space < Bitmap::bytes_for(component, bitmap->chunk()))
        co_return fail(ErrorKind::kCorrupt, fmt::format("{}: write-intent bitmap at sector {} has no room", who, offset));
      continue;
    }
    AlignedBuffer buffer(align_down(std::min(space, kMiB), 4096));
    if (!buffer || buffer.size() == 0) co_return fail(ErrorKind::kNoMemory, who + ": write-intent bitmap");
    const iovec v = buffer.iov();
    Status s = co_await m->volume->read(IoContext{.io_class = IoClass::kMetadata}, at, Iov(&v, 1));
    if (!s) co_return fail(std::move(s).error().with_context(who));
    RawBitmapHeader h;
    std::memcpy(&h, buffer.data(), sizeof h);
    const uint64_t whole = o.best.raw.chunk_sectors != 0 ? align_down(component, o.best.chunk_bytes()) : component;
    s = Bitmap::check(h, component, whole, buffer.size(), who);
    if (!s) co_return fail(std::move(s).error());
    if (std::to_array(h.uuid) != o.best.uuid())
      co_return fail(ErrorKind::kCorrupt, who + ": the write-intent bitmap belongs to another array");
    if (!bitmap) bitmap = std::make_unique<Bitmap>(h, component, buffer.size());
    // A bitmap older than its superblock says nothing about the writes since: everything may differ.
    const bool dirty = !o.best.clean();
    if (dirty && (h.events < m->sb.raw.events || (h.state & kBitmapStale) != 0)) bitmap->set_all();
    bitmap->merge(std::span<const std::byte>(buffer.data(), buffer.size()).subspan(sizeof h), dirty);
  }
  co_return bitmap;
}

Task<Result<VolumePtr>> open_redundant(Opening& o) {
  const auto& spec = o.spec;
  const bool raid5 = o.best.raw.level == kLevelRaid5;
  Raid5Init init;
  ArrayInit& a = init.array;
  a.sb = o.best;
  a.read_only = spec.read_only;
  a.background = spec.background;
  if (spec.rebuild_rate_min != 0) a.rebuild_rate_min = spec.rebuild_rate_min;
  uint32_t active = 0;
  // Only the replacement is left of a slot: it is the member, as far as it was filled. One whose member is there goes on
  // being filled; from the start when the array is dirty, for what was in flight may be on one of the two.
  const bool dirty = !o.best.clean();
  a.replacements.resize(o.slots.size());
  for (size_t i = 0; i < o.slots.size(); ++i) {
    Candidate* r = o.replacements[i];
    if (r == nullptr) continue;
    SPILLWAY_CO_CHECK(check_alignment(o, *r));
    if (o.slots[i] == nullptr) {
      o.slots[i] = r;
    } else if (!spec.read_only && !o.slots[i]->sb->has(kFeatureRecoveryOffset)) {
      MemberPtr m = make_member(*r, static_cast<int>(i));
      m->state.store(MemberState::kRebuilding);
      const uint64_t filled = r->sb->has(kFeatureRecoveryOffset) ? std::min(r->sb->raw.recovery_offset, o.best.raw.size)
                                                                  : o.best.raw.size;
      m->recovered.store(dirty ? 0 : filled * kSectorSize);
      a.replacements[i] = std::move(m);
    }
  }
  for (size_t i = 0; i < o.slots.size(); ++i) {
    a.slot_names.push_back(o.slots[i] != nullptr ? o.slots[i]->name : std::string());
    if (o.slots[i] == nullptr) {
      a.slots.push_back(nullptr);
      continue;
    }
    Candidate& c = *o.slots[i];
    if (c.volume->geometry().read_only && !spec.read_only)
      co_return fail(ErrorKind::kReadOnly, fmt::format("volume {}: member {} is read-only", spec.name, c.name));
    SPILLWAY_CO_CHECK(check_alignment(o, c));
    MemberPtr m = make_member(c, static_cast<int>(i));
    if (c.sb->has(kFeatureRecoveryOffset) && c.sb->raw.recovery_offset < o.best.raw.size) {
      m->recovered.store(c.sb->raw.recovery_offset * kSectorSize);
      m->state.store(MemberState::kRebuilding);
    } else {
      m->recovered.store(kInSync);
      m->state.store(MemberState::kActive);
      ++active;
    }
    a.slots.push_back(std::move(m));
  }
  const uint32_t need = raid5 ? o.best.raw.raid_disks - 1 : 1;
  if (active < need)
    co_return fail(ErrorKind::kDegraded, fmt::format("volume {}: {} of {} members usable, needs {}", spec.name, active,
                                                     o.best.raw.raid_disks, need));
  for (Candidate* c : o.spares) {
    if (!check_alignment(o, *c) || (o.best.has(kFeatureBitmap) && c->sb->raw.bitmap_offset != o.best.raw.bitmap_offset)) {
      log(LogLevel::kWarn, "volume", "volume {}: spare {} is laid out unlike the members and not used", spec.name, c->name);
      continue;
    }
    a.spares.push_back(make_member(*c, -1));
  }

  if (o.best.has(kFeatureBitmap)) {
    auto bitmap = co_await load_bitmap(o, a);
    if (!bitmap) co_return fail(std::move(bitmap).error());
    a.bitmap = std::move(*bitmap);
    a.bitmap_offset = static_cast<uint64_t>(static_cast<int64_t>(kSuperOffset) + int64_t{o.best.raw.bitmap_offset} * kSectorSize);
  }
  const bool degraded = active < o.best.raw.raid_disks;
  if (raid5 && (o.best.has(kFeaturePpl) || o.best.has(kFeatureMultiplePpls))) {
    init.ppl = true;
    init.ppl_offset = static_cast<uint64_t>(static_cast<int64_t>(kSuperOffset) + int64_t{o.best.raw.ppl.offset} * kSectorSize);
    init.ppl_size = std::min<uint64_t>(uint64_t{o.best.raw.ppl.size} * kSectorSize, area_space(o.best, o.best.raw.ppl.offset));
    for (const auto* list : {&a.slots, &a.replacements, &a.spares})
      for (const MemberPtr& m : *list) {
        if (!m) continue;
        if (m->sb.raw.ppl.offset != o.best.raw.ppl.offset)
          co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: member {}: its partial parity log is at another place "
                                                              "than the others'", spec.name, m->name));
        init.ppl_size = std::min(init.ppl_size, area_space(m->sb, m->sb.raw.ppl.offset));
        if (!is_aligned(init.ppl_offset, m->volume->geometry().block_size))
          co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: member {}: its partial parity log begins in the "
                                                              "middle of a block", spec.name, m->name));
      }
    init.ppl_size = align_down(init.ppl_size, kPageSize);
    if (init.ppl_size < kPplHeaderSize + 4096)
      co_return fail(ErrorKind::kCorrupt, fmt::format("volume {}: partial parity log at sector {} has no room", spec.name,
                                                      o.best.raw.ppl.offset));
  }
  if (raid5 && dirty && degraded) {
    if (spec.read_only && !init.ppl)
      log(LogLevel::kWarn, "volume", "volume {}: dirty and degraded: what the missing member held may read back wrong", spec.name);
    else if (!spec.read_only && !init.ppl && !spec.force)
      co_return fail(ErrorKind::kDegraded,
                     fmt::format("volume {}: dirty and degraded without a partial parity log: what the missing member held "
                                 "may be lost; read it with --read-only, or start it with --force (config: force = true)", spec.name));
  }
  if (init.ppl && dirty && degraded && spec.read_only)
    for (const MemberPtr& m : a.slots)
      if (m) m->volume = std::make_shared<Overlay>(m->volume);
  if (init.ppl && dirty && (degraded || !spec.read_only)) {
    auto replayed = co_await replay_ppl(init);
    if (!replayed) co_return fail(std::move(replayed).error().with_context(fmt::format("volume {}", spec.name)));
    // As the kernel: entries replayed and none that does not fit mean that the log covers all that was in flight.
    a.known_in_sync = replayed->entries > 0 && replayed->mismatches == 0 && !degraded && o.best.raw.resync_offset == 0;
    log(LogLevel::kInfo, "volume", "volume {}: {} partial parity log entries replayed, {} mismatches", spec.name,
        replayed->entries, replayed->mismatches);
  }
  // Not before the replayed parity is stable.
  if (init.ppl && !spec.read_only) {
    Status s = co_await reset_ppl(init);
    if (!s) co_return fail(std::move(s).error().with_context(fmt::format("volume {}", spec.name)));
  }
  auto array = raid5 ? make_raid5(spec.name, std::move(init)) : make_mirror(spec.name, std::move(a));
  if (!array) co_return fail(std::move(array).error());
  (*array)->start();
  co_return VolumePtr(std::move(*array));
}

}  // namespace

Task<Result<bool>> is_blank(Volume& v) {
  const uint64_t n = std::min(v.size(), kBlankBytes);
  AlignedBuffer b(n);
  if (!b) co_return fail(ErrorKind::kNoMemory, v.name());
  const iovec iov{b.data(), n};
  Status s = co_await v.read(IoContext{.io_class = IoClass::kMetadata}, 0, Iov(&iov, 1));
  if (!s) co_return fail(std::move(s).error());
  for (uint64_t i = 0; i < n; ++i)
    if (b.data()[i] != std::byte{0}) co_return false;
  co_return true;
}

Task<Result<std::vector<Candidate>>> examine(const LayerSpec& spec) {
  std::vector<Candidate> all;
  std::set<const Volume*> seen;
  const size_t n = spec.members.size();
  for (size_t i = 0; i < n + spec.spares.size(); ++i) {
    Candidate c;
    c.volume = i < n ? spec.members[i] : spec.spares[i - n];
    c.name = c.volume ? c.volume->name() : i < spec.member_names.size() ? spec.member_names[i] : fmt::format("#{}", i);
    if (c.volume) {
      if (!seen.insert(c.volume.get()).second)
        co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {} is listed twice", spec.name, c.name));
      auto sb = co_await read_superblock(*c.volume);
      if (!sb && sb.error().kind() != ErrorKind::kIo)
        co_return fail(std::move(sb).error().with_context(fmt::format("volume {}", spec.name)));
      Result<bool> blank = false;
      if (sb && !*sb) blank = co_await is_blank(*c.volume);
      if (!blank && blank.error().kind() != ErrorKind::kIo) co_return fail(std::move(blank).error());
      if (sb && blank) {
        c.sb = std::move(*sb);
        c.blank = *blank;
      } else {  // a disk that cannot even be read is as good as none; the layer decides whether it can do without
        log(LogLevel::kWarn, "volume", "volume {}: {}", spec.name, sb ? blank.error().message() : sb.error().message());
        c.volume = nullptr;
      }
    }
    all.push_back(std::move(c));
  }
  co_return all;
}

Task<Result<VolumePtr>> open_array(LayerSpec spec, std::vector<Candidate> members) {
  Opening o;
  o.spec = std::move(spec);
  o.all = std::move(members);
  // Blank spares become members' spares after opening; they have no say in what the array is.
  std::vector<VolumePtr> fresh_spares;
  for (auto it = o.all.begin() + static_cast<ptrdiff_t>(o.spec.members.size()); it != o.all.end();) {
    if (it->sb || !it->volume) {
      ++it;
      continue;
    }
    if (!it->blank)
      co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: spare {} is not blank", o.spec.name, it->name));
    fresh_spares.push_back(it->volume);
    it = o.all.erase(it);
  }
  SPILLWAY_CO_CHECK(check_same_array(o));
  if (o.best.raw.magic == 0)
    co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: no member has an md superblock", o.spec.name));
  SPILLWAY_CO_CHECK(check_agreement(o));
  SPILLWAY_CO_CHECK(assign_slots(o));
  if (o.best.raw.level <= 0) co_return open_plain(o);
  auto v = co_await open_redundant(o);
  if (v && !o.spec.read_only)
    for (const VolumePtr& s : fresh_spares) {
      Status added = co_await array_control(**v)->add_member(s);
      if (!added) log(LogLevel::kWarn, "volume", "{}", added.error().message());
    }
  co_return v;
}

Task<Result<CreatePlan>> create(const LayerSpec& spec, std::vector<Candidate> members, CreateOptions options) {
  CreatePlan plan;
  const auto bad = [&](const std::string& what) { return fail(ErrorKind::kInvalid, fmt::format("volume {}: {}", spec.name, what)); };
  if (spec.layer != "linear" && spec.layer != "stripe" && spec.layer != "mirror" && spec.layer != "raid5")
    co_return bad(fmt::format("layer \"{}\" carries no md superblock", spec.layer));
  const int level = layer_level(spec.layer);
  const size_t n = spec.members.size();
  if (n < (level == kLevelRaid5 ? 3u : level == kLevelMirror ? 2u : 1u))
    co_return bad(fmt::format("{} members are too few for a {}", n, spec.layer));
  if (n > 64 || n + spec.spares.size() > kMaxDev) co_return bad(fmt::format("{} members are too many", n));
  const uint64_t chunk = spec.chunk != 0 ? spec.chunk : kDefaultChunk;
  if (level == kLevelRaid5 && (!std::has_single_bit(chunk) || chunk < 4096 || chunk > 64 * kMiB))
    co_return bad(fmt::format("chunk {} is no power of two from 4K to 64M", chunk));
  if (chunk == 0 || chunk % kSectorSize != 0 || chunk > kGiB) co_return bad(fmt::format("chunk {}", chunk));
  Raid5Layout layout = Raid5Layout::kLeftSymmetric;
  if (!spec.raid5_layout.empty() && !parse_raid5_layout(spec.raid5_layout, &layout))
    co_return bad(fmt::format("layout \"{}\"", spec.raid5_layout));
  std::string consistency = spec.consistency.empty() ? "bitmap" : spec.consistency;
  if (level <= 0) consistency = "none";
  else if (consistency != "bitmap" && consistency != "resync" && !(consistency == "ppl" && level == kLevelRaid5))
    co_return bad(fmt::format("consistency \"{}\" on a {}", consistency, spec.layer));
  if (consistency == "ppl" && chunk > 512 * kKiB) co_return bad(fmt::format("chunk {} is too large for ppl", chunk));

  uint64_t smallest = UINT64_MAX, total = 0;
  for (const Candidate& c : members) {
    if (!c.volume) co_return bad(fmt::format("member {} is missing", c.name));
    if (c.volume->geometry().read_only && !options.dry_run) co_return bad(fmt::format("member {} is read-only", c.name));
    if (c.volume->size() < kDataOffset + std::max<uint64_t>(chunk, 64 * kKiB))
      co_return bad(fmt::format("member {}: size {} is too small", c.name, c.volume->size()));
    const uint64_t data = c.volume->size() - kDataOffset;
    smallest = std::min(smallest, data);
    if (c.sb) {
      plan.destroys = true;
      plan.lines.push_back(fmt::format("{}: carries md array {} ({}), which is lost", c.name, format_uuid(c.sb->uuid()),
                                       level_name(c.sb->raw.level)));
    } else if (!c.blank) {
      plan.destroys = true;
      plan.lines.push_back(fmt::format("{}: holds data, which is lost", c.name));
    }
  }
  const uint64_t component = align_down(smallest, level == kLevelMirror ? 64 * kKiB : chunk);
  std::vector<uint64_t> areas;
  for (size_t i = 0; i < n; ++i) areas.push_back(align_down(members[i].volume->size() - kDataOffset, chunk));
  for (uint64_t bytes : areas) total += bytes;
  if (level == kLevelStripe) total = raid0_size(areas, chunk);
  plan.array_size = level == kLevelMirror  ? component
                    : level == kLevelRaid5 ? component * (n - 1)
                                           : total;

  Superblock common;
  RawSuperblock& r = common.raw;
  r.magic = kMagic;
  r.major_version = 1;
  const Uuid uuid = random_uuid();
  std::copy(uuid.begin(), uuid.end(), r.set_uuid);
  std::memcpy(r.set_name, spec.name.data(), std::min(spec.name.size(), sizeof r.set_name - 1));
  r.ctime = r.utime = wall_seconds();
  r.level = level;
  r.layout = level == kLevelRaid5 ? static_cast<uint32_t>(layout) : level == kLevelStripe ? 2 : 0;
  if (level == kLevelStripe) r.feature_map |= kFeatureRaid0Layout;
  r.size = level > 0 ? component / kSectorSize : 0;
  r.chunk_sectors = level == kLevelMirror ? 0 : static_cast<uint32_t>(chunk / kSectorSize);
  r.raid_disks = static_cast<uint32_t>(n);
  r.data_offset = kDataOffset / kSectorSize;
  r.super_offset = kSuperOffset / kSectorSize;
  constexpr int32_t kArea = static_cast<int32_t>((kAreaOffset - kSuperOffset) / kSectorSize);
  if (consistency == "bitmap") {
    r.feature_map |= kFeatureBitmap;
    r.bitmap_offset = kArea;
  } else if (consistency == "ppl") {
    r.feature_map |= kFeaturePpl;
    r.ppl.offset = static_cast<int16_t>(kArea);
    r.ppl.size = static_cast<uint16_t>((kPplHeaderSize + std::max<uint64_t>(chunk, kPplSpace)) / kSectorSize);
  }
  common.roles.assign(kMaxDev, kRoleSpare);
  for (size_t i = 0; i < n; ++i) common.roles[i] = static_cast<uint16_t>(i);

  bool clean = options.assume_clean || level <= 0;
  if (!clean) {
    clean = true;
    for (size_t i = 0; i < n && clean; ++i) clean = co_await is_hole(*members[i].volume);
  }
  r.resync_offset = clean ? kInSync : 0;
  if (level <= 0) r.resync_offset = 0;
  plan.lines.push_back(fmt::format("{}: md 1.2 {}{}, {} members, {}{}{}", spec.name, level_name(level),
                                   level == kLevelRaid5 ? fmt::format(" {}", to_string(layout)) : std::string(), n,
                                   level == kLevelMirror ? std::string() : fmt::format("chunk {}, ", format_size(chunk)),
                                   level > 0 ? fmt::format("consistency {}, ", consistency) : std::string(),
                                   format_size(plan.array_size)));
  for (size_t i = 0; i < members.size(); ++i)
    plan.lines.push_back(fmt::format("{}: {}, superblock at 4 KiB, data from {}", members[i].name,
                                     i < n ? fmt::format("slot {}", i) : "spare", format_size(kDataOffset)));
  if (level > 0)
    plan.lines.push_back(clean ? "members are all zeros (or said to agree): no first resync" : "a first resync follows");
  if (options.dry_run) co_return plan;
  if (plan.destroys && !options.force)
    co_return fail(ErrorKind::kExists, fmt::format("volume {}: {}; --force goes on", spec.name, plan.lines.front()));

  std::vector<std::byte> area;
  if (consistency == "bitmap") {
    RawBitmapHeader h{};
    h.magic = kBitmapMagic;
    h.version = kBitmapVersion;
    std::copy(uuid.begin(), uuid.end(), h.uuid);
    h.sync_size = component / kSectorSize;
    const uint64_t space = kDataOffset - kAreaOffset;
    h.chunk_size = static_cast<uint32_t>(Bitmap::choose_chunk(component, space, std::max<uint64_t>(chunk, kMiB)));
    h.daemon_sleep = 5;
    h.sectors_reserved = static_cast<uint32_t>(space / kSectorSize);
    area.resize(align_up(Bitmap::bytes_for(component, h.chunk_size), 4096));
    if (!clean) std::fill(area.begin() + sizeof h, area.end(), std::byte{0xff});
    std::memcpy(area.data(), &h, sizeof h);
  } else if (consistency == "ppl") {
    area = empty_ppl_header(ppl_signature(uuid));
  }
  // First everything but the superblocks, then these: a crash in between leaves members without, not half an array.
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  for (Candidate& c : members) {
    AlignedBuffer head(kDataOffset);
    if (!head) co_return fail(ErrorKind::kNoMemory, spec.name);
    std::memset(head.data(), 0, head.size());
    if (!area.empty()) std::memcpy(head.data() + kAreaOffset, area.data(), area.size());
    const iovec v = head.iov();
    SPILLWAY_CO_CHECK(co_await c.volume->write(ctx, 0, Iov(&v, 1)));
    SPILLWAY_CO_CHECK(co_await c.volume->flush(ctx));
  }
  for (size_t i = 0; i < members.size(); ++i) {
    Superblock sb = common;
    sb.raw.dev_number = static_cast<uint32_t>(i);
    const Uuid id = random_uuid();
    std::copy(id.begin(), id.end(), sb.raw.device_uuid);
    const uint64_t data = members[i].volume->size() - kDataOffset;
    sb.raw.data_size = (level > 0 ? std::max(component, align_down(data, kSectorSize)) : align_down(data, chunk)) / kSectorSize;
    SPILLWAY_CO_CHECK(co_await write_superblock(*members[i].volume, sb));
  }
  log(LogLevel::kInfo, "volume", "{}", plan.lines[plan.lines.size() - members.size() - (level > 0 ? 2 : 1)]);
  co_return plan;
}

}  // namespace spillway::md
