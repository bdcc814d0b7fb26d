#include "src/volume/md/raid0.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "src/volume/scatter.h"
#include "src/volume/stripe/stripe.h"

namespace spillway::md {
namespace {

struct Zone {
  uint64_t end;           // in the array
  uint64_t start;
  uint64_t member_start;  // on each of its members
  std::vector<size_t> members;
};

std::vector<Zone> make_zones(const std::vector<VolumePtr>& members) {
  std::vector<uint64_t> sizes;
  for (const auto& m : members) sizes.push_back(m->size());
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  std::vector<Zone> zones;
  uint64_t previous = 0, start = 0;
  for (uint64_t size : sizes) {
    Zone z{0, start, previous, {}};
    for (size_t i = 0; i < members.size(); ++i)
      if (members[i]->size() > previous) z.members.push_back(i);
    z.end = start + (size - previous) * z.members.size();
    start = z.end;
    previous = size;
    zones.push_back(std::move(z));
  }
  return zones;
}

Geometry zoned_geometry(const std::vector<VolumePtr>& members, uint64_t chunk) {
  Geometry g = combine_geometry(members);
  g.min_io = static_cast<uint32_t>(chunk);
  g.opt_io = static_cast<uint32_t>(chunk * members.size());
  g.independent_region = 0;
  return g;
}

class ZonedStripe final : public Volume {
 public:
  ZonedStripe(std::string name, uint64_t size, std::vector<VolumePtr> members, std::vector<Zone> zones, uint64_t chunk,
              Raid0Layout layout)
      : Volume(std::move(name), size, zoned_geometry(members, chunk)),
        members_(std::move(members)),
        zones_(std::move(zones)),
        chunk_(chunk),
        layout_(layout) {}

  std::string_view layer() const override { return "stripe"; }
  std::vector<VolumePtr> members() const override { return members_; }
  std::string to_text() const override {
    return fmt::format("members: {}\nchunk: {}\nzones: {}\nlayout: {}\n", members_.size(), chunk_, zones_.size(),
                       layout_ == Raid0Layout::kOriginal ? "original" : "alternate");
  }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    return spanning(Scatter::Op::kRead, ctx, offset, iov_length(iov), iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    return spanning(Scatter::Op::kWrite, ctx, offset, iov_length(iov), iov);
  }
  Task<Status> do_flush(IoContext ctx) override { return flush_all(ctx, members_); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return spanning(Scatter::Op::kDiscard, ctx, offset, length, {});
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override {
    return spanning(unmap ? Scatter::Op::kZeroUnmap : Scatter::Op::kZero, ctx, offset, length, {});
  }

 private:
  Task<Status> spanning(Scatter::Op op, IoContext ctx, uint64_t offset, uint64_t length, Iov iov) {
    Scatter scatter(iov);
    while (length > 0) {
      const Zone& z = *std::find_if(zones_.begin(), zones_.end(), [&](const Zone& q) { return offset < q.end; });
      const uint64_t in_zone = offset - z.start;
      const uint64_t chunk = in_zone / chunk_, inside = in_zone % chunk_;
      const uint64_t turn = layout_ == Raid0Layout::kOriginal ? z.start / chunk_ + chunk : chunk;
      const size_t member = z.members[turn % z.members.size()];
      const uint64_t at = z.member_start + chunk / z.members.size() * chunk_ + inside;
      const uint64_t now = std::min(length, chunk_ - inside);
      // Continue the member's last part where it is contiguous.
      Scatter::Part* part = nullptr;
      for (auto& p : scatter.parts())
        if (p.volume == members_[member].get() && p.offset + p.length == at) part = &p;
      scatter.take(part != nullptr ? *part : scatter.add(members_[member].get(), at), now);
      offset += now;
      length -= now;
    }
    co_return co_await scatter.run(op, ctx);
  }

  const std::vector<VolumePtr> members_;
  const std::vector<Zone> zones_;
  const uint64_t chunk_;
  const Raid0Layout layout_;
};

}  // namespace

uint64_t raid0_size(const std::vector<uint64_t>& areas, uint64_t chunk) {
  const uint64_t mask = ~(chunk / kSectorSize - 1);
  uint64_t sectors = 0;
  for (uint64_t bytes : areas) sectors += align_down(bytes, chunk) / kSectorSize & mask;
  return sectors * kSectorSize;
}

Result<VolumePtr> make_raid0(std::string name, std::vector<VolumePtr> members, uint64_t chunk, Raid0Layout layout) {
  bool equal = true;
  for (const auto& m : members) {
    if (!is_aligned(m->size(), chunk) || m->size() == 0)
      return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {}: size {} is no multiple of chunk {}", name,
                                                   m->name(), m->size(), chunk));
    equal &= m->size() == members[0]->size();
  }
  std::vector<uint64_t> areas;
  for (const auto& m : members) areas.push_back(m->size());
  const uint64_t size = align_down(raid0_size(areas, chunk), combine_geometry(members).block_size);
  if (size == 0) return fail(ErrorKind::kInvalid, fmt::format("volume {}: members too small for chunk {}", name, chunk));
  if (equal) return make_stripe(std::move(name), std::move(members), chunk, size);
  if (!is_aligned(chunk, combine_geometry(members).block_size))
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: chunk {} is no multiple of a member's blocks", name, chunk));
  auto zones = make_zones(members);
  return std::make_shared<ZonedStripe>(std::move(name), size, std::move(members), std::move(zones), chunk, layout);
}

}  // namespace spillway::md
