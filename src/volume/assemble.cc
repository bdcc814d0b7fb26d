#include "src/volume/assemble.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "src/base/log.h"
#include "src/volume/md/open.h"

#include "src/volume/linear/linear.h"
#include "src/volume/slice/slice.h"
#include "src/volume/stripe/stripe.h"

namespace spillway {
namespace {

constexpr uint64_t kDefaultChunk = 64 * kKiB;

Result<VolumePtr> assemble_plain(LayerSpec& spec) {
  for (size_t i = 0; i < spec.members.size(); ++i)
    if (!spec.members[i])
      return fail(ErrorKind::kNotFound,
                  fmt::format("volume {}: member {} is missing and a {} has no redundancy", spec.name,
                              i < spec.member_names.size() ? spec.member_names[i] : std::to_string(i), spec.layer));
  if (spec.layer == "linear") return make_linear(spec.name, std::move(spec.members));
  return make_stripe(spec.name, std::move(spec.members), spec.chunk != 0 ? spec.chunk : kDefaultChunk);
}

}  // namespace

Task<Result<VolumePtr>> assemble(LayerSpec spec) {
  if (spec.layer == "slice") {
    if (spec.members.size() != 1 || !spec.members[0])
      co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: a slice has exactly one member", spec.name));
    co_return make_slice(spec.name, spec.members[0], spec.offset, spec.length);
  }
  const bool plain = spec.layer == "linear" || spec.layer == "stripe";
  if (!plain && spec.layer != "mirror" && spec.layer != "raid5" && spec.layer != "md")
    co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: layer \"{}\"", spec.name, spec.layer));
  if (spec.members.empty())
    co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: {} without members", spec.name, spec.layer));
  if (plain && spec.metadata == "none") co_return assemble_plain(spec);
  auto members = co_await md::examine(spec);
  if (!members) {
    // A plain layout may lie over anything, also over what looks like a broken superblock; asked for by name only.
    co_return fail(std::move(members).error());
  }
  bool any = false, all_blank = true;
  for (const auto& c : *members) {
    any |= c.sb.has_value();
    all_blank &= c.volume && !c.sb && c.blank;
  }
  if (any || spec.layer == "md") co_return co_await md::open_array(std::move(spec), std::move(*members));
  if (plain && spec.metadata != "md") co_return assemble_plain(spec);
  const bool writable = std::all_of(spec.members.begin(), spec.members.end(),
                                    [](const VolumePtr& m) { return m && !m->geometry().read_only; });
  if (!all_blank || !writable || spec.read_only || !spec.create_if_blank)
    co_return fail(ErrorKind::kInvalid,
                   fmt::format("volume {}: its members carry no md superblock; `spillway volume create {}` makes the array",
                               spec.name, spec.name));
  log(LogLevel::kInfo, "volume", "volume {}: all members are blank: creating the array", spec.name);
  auto plan = co_await md::create(spec, std::move(*members), CreateOptions{});
  if (!plan) co_return fail(std::move(plan).error());
  members = co_await md::examine(spec);
  if (!members) co_return fail(std::move(members).error());
  co_return co_await md::open_array(std::move(spec), std::move(*members));
}

Task<Result<CreatePlan>> create_array(const LayerSpec& spec, CreateOptions options) {
  LayerSpec copy = spec;
  auto members = co_await md::examine(copy);
  if (!members) {
    if (!options.force) co_return fail(std::move(members).error());
    // What cannot even be parsed is overwritten like any other data.
    std::vector<md::Candidate> raw;
    for (const auto* list : {&copy.members, &copy.spares})
      for (const VolumePtr& v : *list) raw.push_back(md::Candidate{v, v ? v->name() : "?", std::nullopt, false});
    members = std::move(raw);
  }
  co_return co_await md::create(copy, std::move(*members), options);
}

ArrayControl* array_control(Volume& volume) { return dynamic_cast<ArrayControl*>(&volume); }

ArrayStatus array_status(Volume& volume) {
  if (const ArrayControl* c = array_control(volume)) return c->status();
  ArrayStatus s;
  s.name = volume.name();
  s.layer = volume.layer();
  s.metadata = "none";
  s.consistency = "none";
  s.state = volume.geometry().read_only ? "read-only" : "active";
  s.size = volume.size();
  s.chunk = volume.layer() == "stripe" ? volume.geometry().min_io : 0;
  s.operation = "idle";
  s.advice = "nothing to do";
  int role = 0;
  for (const VolumePtr& m : volume.members()) {
    MemberStatus ms;
    ms.name = m->name();
    ms.state = "active";
    ms.role = role++;
    s.members.push_back(std::move(ms));
  }
  return s;
}

std::string format_status(const ArrayStatus& s) {
  std::string t = fmt::format("{}: {} {}, {}", s.name, s.state, s.layer, format_size(s.size));
  if (s.chunk != 0) t += fmt::format(", chunk {}", format_size(s.chunk));
  if (!s.layout.empty()) t += fmt::format(", {}", s.layout);
  if (!s.members.empty() && s.metadata != "none") {
    size_t slots = 0, up = 0;
    std::string map;
    for (const auto& m : s.members) {
      if (m.role < 0) continue;
      ++slots;
      up += m.state == "active";
      map += m.state == "active" ? 'U' : '_';
    }
    t += fmt::format(" [{}/{}] [{}]\n  {}, uuid {}, events {}, consistency {}", slots, up, map, s.metadata, s.uuid, s.events,
                     s.consistency);
  }
  t += '\n';
  for (const auto& m : s.members) {
    t += fmt::format("  {:<4} {:<16} {}", m.role >= 0 ? std::to_string(m.role) : "-", m.name, m.state);
    if (m.read_errors != 0) t += fmt::format(", {} read errors corrected", m.read_errors);
    t += '\n';
  }
  if (s.operation != "idle")
    t += fmt::format("  {}: {:.1f}%, {}/s, {} s to go\n", s.operation, s.progress_percent,
                     format_size(s.speed_bytes_per_second), s.eta_seconds);
  if (s.mismatch_blocks != 0) t += fmt::format("  mismatches: {} sectors\n", s.mismatch_blocks);
  t += fmt::format("  next: {}\n", s.advice);
  return t;
}

Task<Result<JoinPlan>> plan_join(Volume& volume, VolumePtr disk) {
  JoinPlan plan;
  auto sb = co_await md::read_superblock(*disk);
  if (!sb && sb.error().kind() == ErrorKind::kIo) co_return fail(std::move(sb).error());
  if (!sb) {
    plan.destroys = true;
    plan.lines.push_back(fmt::format("{}: carries a superblock, which is lost: {}", disk->name(), sb.error().message()));
  } else if (*sb && md::format_uuid((*sb)->uuid()) == array_status(volume).uuid) {
    plan.lines.push_back(fmt::format("{}: was a member of {}; what it holds is out of date", disk->name(), volume.name()));
  } else if (*sb) {
    plan.destroys = true;
    plan.lines.push_back(fmt::format("{}: carries md array {} ({}), which is lost", disk->name(),
                                     md::format_uuid((*sb)->uuid()), md::level_name((*sb)->raw.level)));
  } else {
    auto blank = co_await md::is_blank(*disk);
    if (!blank) co_return fail(std::move(blank).error());
    plan.destroys = !*blank;
    if (!*blank) plan.lines.push_back(fmt::format("{}: holds data, which is lost", disk->name()));
  }
  plan.lines.push_back(fmt::format("{}: {} join {} {}", disk->name(), format_size(disk->size()), volume.layer(), volume.name()));
  co_return plan;
}

Task<Status> wipe_disk(Volume& disk) {
  const uint64_t size = disk.size(), block = disk.geometry().block_size;
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  SPILLWAY_CO_CHECK(co_await disk.write_zeroes(ctx, 0, std::min(size, kMiB), false));
  const uint64_t tail = size > 2 * kMiB ? align_down(size - 128 * kKiB, block) : size;  // versions 0.90 and 1.0
  if (tail < size) SPILLWAY_CO_CHECK(co_await disk.write_zeroes(ctx, tail, size - tail, false));
  co_return co_await disk.flush(ctx);
}

Task<Status> grow(Volume& volume, VolumePtr member) {
  auto* linear = dynamic_cast<LinearVolume*>(&volume);
  if (linear == nullptr)
    co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: a {} cannot grow by a member", volume.name(), volume.layer()));
  co_return co_await linear->append(std::move(member));
}

MkfsAdvice advise_mkfs(const Volume& volume, std::string_view device) {
  MkfsAdvice a;
  const Geometry& g = volume.geometry();
  std::string options;
  if (g.min_io != 0 && g.opt_io != 0 && g.opt_io % g.min_io == 0 && is_aligned(g.min_io, 4096)) {
    a.su = g.min_io;
    a.sw = g.opt_io / g.min_io;
    options = fmt::format("su={}k,sw={}", a.su / kKiB, a.sw);
    a.reason = fmt::format("a chunk is {} and {} of them make a full stripe, which is written without reading first",
                           format_size(a.su), a.sw);
  }
  // (Below kMinGroup mkfs.xfs finds no room for its log.) An allocation group per region that seeks on its own: XFS spreads directories over groups, hence over disks.
  const uint64_t region = g.independent_region;
  constexpr uint64_t kMinGroup = 128 * kMiB, kMaxGroup = kTiB - 4096;
  if (region >= kMinGroup && region < volume.size()) {
    uint64_t group = region;
    while (group > kMaxGroup) group = (group / 2 % 4096 == 0) ? group / 2 : 0;
    const uint64_t unit = a.su != 0 ? a.su : 4096;
    if (group != 0 && group % unit == 0) {
      a.agsize = group;
      options += fmt::format("{}agsize={}", options.empty() ? "" : ",", group);
      a.reason += fmt::format("{}an allocation group is one region of {} that seeks independently of the others",
                              a.reason.empty() ? "" : "; ", format_size(region));
    }
  }
  if (options.empty()) a.reason = "one disk as far as anyone can tell: mkfs.xfs's own choice fits";
  a.command = options.empty() ? fmt::format("mkfs.xfs {}", device) : fmt::format("mkfs.xfs -d {} {}", options, device);
  return a;
}

}  // namespace spillway
