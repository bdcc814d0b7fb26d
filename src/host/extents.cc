#include "src/host/extents.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/units.h"

namespace spillway {

Result<std::vector<FileExtent>> file_extents(int fd) {
  constexpr uint32_t kBatch = 256;
  std::vector<uint64_t> raw((sizeof(fiemap) + kBatch * sizeof(fiemap_extent) + 7) / 8);
  auto* map = reinterpret_cast<fiemap*>(raw.data());
  std::vector<FileExtent> all;
  uint64_t at = 0;
  for (;;) {
    std::memset(map, 0, sizeof *map);
    map->fm_start = at;
    map->fm_length = FIEMAP_MAX_OFFSET - at;
    map->fm_flags = FIEMAP_FLAG_SYNC;
    map->fm_extent_count = kBatch;
    if (::ioctl(fd, FS_IOC_FIEMAP, map) != 0) {
      if (errno == EOPNOTSUPP || errno == ENOTTY || errno == EBADR || errno == EINVAL)
        return fail(ErrorKind::kUnsupported, "the filesystem does not tell extents (FIEMAP)");
      return fail_errno(errno, "FIEMAP");
    }
    if (map->fm_mapped_extents == 0) return all;
    for (uint32_t i = 0; i < map->fm_mapped_extents; ++i) {
      const fiemap_extent& e = map->fm_extents[i];
      const bool known = (e.fe_flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC)) == 0;
      if (known)
        all.push_back({e.fe_logical, e.fe_physical, e.fe_length, (e.fe_flags & FIEMAP_EXTENT_SHARED) != 0});
      at = e.fe_logical + e.fe_length;
      if ((e.fe_flags & FIEMAP_EXTENT_LAST) != 0) return all;
    }
  }
}

namespace {
bool other_than(const std::vector<uint32_t>& tenants, uint32_t t) {
  return std::any_of(tenants.begin(), tenants.end(), [t](uint32_t x) { return x != t; });
}
}  // namespace

Result<ExtentReport> find_shared_extents(const std::vector<LeafUse>& files, bool strict) {
  struct Piece {
    uint64_t device, physical, length, logical;
    size_t file;
  };
  ExtentReport report;
  std::vector<Piece> pieces;
  std::vector<std::vector<FileExtent>> of(files.size());
  for (size_t f = 0; f < files.size(); ++f) {
    auto e = file_extents(files[f].fd);
    if (!e) {
      if (e.error().kind() != ErrorKind::kUnsupported) return fail(std::move(e).error().with_context(files[f].path));
      report.unknown.push_back(files[f].path);
      continue;
    }
    for (auto& x : *e)
      if (x.shared) pieces.push_back({files[f].device, x.physical, x.length, x.logical, f});
    of[f] = std::move(*e);
  }
  // By place on disk: an overlap of two files' pieces is what both have. Pieces of one file that overlap are its own.
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return a.device != b.device ? a.device < b.device : a.physical < b.physical;
  });
  std::vector<bool> explained(pieces.size(), false);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    for (size_t k = i + 1; k < pieces.size(); ++k) {
      const Piece& q = pieces[k];
      if (q.device != p.device || q.physical >= p.physical + p.length) break;
      if (q.file == p.file) continue;
      explained[i] = explained[k] = true;
      const uint64_t length = std::min(p.physical + p.length, q.physical + q.length) - q.physical;
      auto reaches = [&](const LeafUse& writer, const LeafUse& other) {
        for (uint32_t t : writer.writers)
          if (other_than(other.readers, t) || other_than(other.writers, t)) return true;
        return false;
      };
      const LeafUse &a = files[p.file], &b = files[q.file];
      if (reaches(a, b))
        report.shared.push_back({a.path, b.path, p.logical + (q.physical - p.physical), length});
      if (reaches(b, a)) report.shared.push_back({b.path, a.path, q.logical, length});
    }
  }
  if (strict)
    for (size_t i = 0; i < pieces.size(); ++i)
      if (!explained[i] && !files[pieces[i].file].writers.empty())
        report.shared.push_back({files[pieces[i].file].path, "", pieces[i].logical, pieces[i].length});
  return report;
}

Status unshare_extents(int fd, const std::string& path) {
  auto all = file_extents(fd);
  if (!all) return fail(std::move(all).error().with_context(path));
  for (auto& e : *all) {
    if (!e.shared) continue;
    if (::fallocate(fd, FALLOC_FL_UNSHARE_RANGE, static_cast<off_t>(e.logical), static_cast<off_t>(e.length)) != 0)
      return fail_errno(errno, fmt::format("{}: unsharing {} bytes at {}", path, e.length, e.logical));
  }
  if (::fsync(fd) != 0) return fail_errno(errno, fmt::format("{}: fsync after unsharing", path));
  return {};
}

std::string to_text(const SharedExtent& s) {
  return fmt::format("{} shares {} at offset {} with {}: a tenant's write there can be timed by another", s.path,
                     format_size(s.length), s.offset, s.with.empty() ? "a file that is not served" : s.with);
}

}  // namespace spillway
