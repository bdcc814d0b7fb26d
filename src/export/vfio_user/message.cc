#include "src/export/vfio_user/message.h"

#include <cerrno>
#include <cstring>

namespace spillway::vfio {

bool header_ok(const Header& h) {
  return h.size >= sizeof(Header) && h.size <= kMaxMessage && (h.flags & kFlagTypeMask) == 0 &&
         (h.flags & kFlagError) == 0;
}

namespace {

template <class T>
bool take(std::span<const std::byte> body, T& out) {
  if (body.size() < sizeof(T)) return false;
  std::memcpy(&out, body.data(), sizeof(T));
  return true;
}

bool whole_pages(uint64_t v) { return v % 4096 == 0; }

Request parse_set_irqs(std::span<const std::byte> body, size_t fds) {
  SetIrqs s{};
  if (!take(body, s.set) || s.set.argsz < sizeof s.set || s.set.argsz > body.size()) return Refused{EINVAL};
  const uint32_t data = s.set.flags & kSetDataMask, action = s.set.flags & kSetActionMask;
  const bool one_action = action != 0 && (action & (action - 1)) == 0;
  if ((s.set.flags & ~(kSetDataMask | kSetActionMask)) != 0 || !one_action) return Refused{EINVAL};
  if (s.set.index >= kIrqCount || s.set.count > 2048 || s.set.start > 2048) return Refused{EINVAL};
  switch (data) {
    case kSetDataNone: break;
    case kSetDataBool:
      if (body.size() - sizeof s.set < s.set.count) return Refused{EINVAL};
      s.bools = body.subspan(sizeof s.set, s.set.count);
      break;
    case kSetDataEventfd:
      // No descriptor at all takes the vectors' descriptors away; else one for each.
      if (fds != 0 && fds != s.set.count) return Refused{EINVAL};
      break;
    default: return Refused{EINVAL};
  }
  if (data != kSetDataEventfd && fds != 0) return Refused{EINVAL};
  return s;
}

Request parse_access(std::span<const std::byte> body, bool write) {
  RegionAccess a{};
  if (!take(body, a) || a.region >= kRegionCount || a.count == 0 || a.count > kMaxTransfer) return Refused{EINVAL};
  if (a.offset + a.count < a.offset) return Refused{EINVAL};
  if (!write) return RegionRead{a};
  if (body.size() != sizeof a + a.count) return Refused{EINVAL};
  return RegionWrite{a, body.subspan(sizeof a)};
}

}  // namespace

Request parse(const Header& h, std::span<const std::byte> body, size_t fds) {
  const auto command = static_cast<Command>(h.command);
  if (fds != 0 && command != Command::kDmaMap && command != Command::kSetIrqs) return Refused{EINVAL};
  switch (command) {
    case Command::kVersion: {
      Version v{};
      if (!take(body, v)) return Refused{EINVAL};
      return v;
    }
    case Command::kDmaMap: {
      DmaMap m{};
      const bool ok = take(body, m) && m.argsz >= sizeof m && (m.flags & ~3u) == 0 && m.size != 0 && fds <= 1 &&
                      m.address + (m.size - 1) >= m.address && m.offset + m.size >= m.offset &&
                      whole_pages(m.address) && whole_pages(m.size) && whole_pages(m.offset);
      if (!ok) return Refused{EINVAL};
      return m;
    }
    case Command::kDmaUnmap: {
      DmaUnmap u{};
      // Dirty tracking is not offered. "All" comes without a range.
      if (!take(body, u) || u.argsz < sizeof u || (u.flags & ~kUnmapAll) != 0) return Refused{EINVAL};
      const bool all = u.flags == kUnmapAll;
      if (all ? u.address != 0 || u.size != 0 : u.size == 0 || u.address + (u.size - 1) < u.address)
        return Refused{EINVAL};
      return u;
    }
    case Command::kGetInfo: {
      GetInfo g{};
      if (!take(body, g.info) || g.info.argsz < sizeof g.info) return Refused{EINVAL};
      return g;
    }
    case Command::kGetRegionInfo: {
      GetRegionInfo g{};
      if (!take(body, g.info) || g.info.argsz < sizeof g.info || g.info.index >= kRegionCount) return Refused{EINVAL};
      return g;
    }
    case Command::kGetIrqInfo: {
      GetIrqInfo g{};
      if (!take(body, g.info) || g.info.argsz < sizeof g.info || g.info.index >= kIrqCount) return Refused{EINVAL};
      return g;
    }
    case Command::kSetIrqs: return parse_set_irqs(body, fds);
    case Command::kRegionRead: return parse_access(body, false);
    case Command::kRegionWrite: return parse_access(body, true);
    case Command::kReset: return Reset{};
    default: return Refused{ENOTSUP};
  }
}

}  // namespace spillway::vfio
