#include "src/image/image.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include <fmt/core.h>

#include "src/image/qcow2_image.h"

namespace spillway {

using qcow2::all_zero;
using qcow2::MemberIo;
using qcow2::Qcow2Image;

std::string_view to_string(ImageFormat format) { return format == ImageFormat::kQcow2 ? "qcow2" : "raw"; }

Result<ImageFormat> parse_image_format(std::string_view name) {
  if (name == "raw") return ImageFormat::kRaw;
  if (name == "qcow2") return ImageFormat::kQcow2;
  std::string shown;
  for (char c : name.substr(0, 32)) shown += c >= 0x20 && c < 0x7f ? c : '?';
  return fail(ErrorKind::kUnsupported, fmt::format("image format '{}': raw and qcow2 are supported", shown));
}

Task<Result<ImageFormat>> probe_format(VolumePtr file) {
  const MemberIo io(file);
  std::byte b[8] = {};
  SPILLWAY_CO_CHECK(co_await io.read(IoContext{}, 0, b, sizeof b));
  co_return qcow2::load32(b) == qcow2::kMagic ? ImageFormat::kQcow2 : ImageFormat::kRaw;
}

Result<std::string> resolve_image_path(const std::string& image_path, std::string_view name,
                                       const std::vector<std::string>& folders) {
  std::string shown;
  for (char c : name.substr(0, 200)) shown += c >= 0x20 && c < 0x7f ? c : '?';
  if (name.empty() || name.find('\0') != std::string_view::npos)
    return fail(ErrorKind::kInvalid, fmt::format("image {}: '{}' is no file name", image_path, shown));
  std::string_view path = name;
  if (path.starts_with("file:")) path.remove_prefix(path.starts_with("file://") ? 7 : 5);
  // As QEMU: what stands before a colon that comes before any slash is a protocol.
  const size_t colon = path.find(':'), slash = path.find('/');
  if (colon != std::string_view::npos && (slash == std::string_view::npos || colon < slash))
    return fail(ErrorKind::kUnsupported, fmt::format("image {}: '{}' is not a plain file", image_path, shown));
  std::string full(path);
  if (!path.starts_with('/')) {
    const size_t cut = image_path.rfind('/');
    full = (cut == std::string::npos ? std::string() : image_path.substr(0, cut + 1)) + full;
  }
  auto canonical = [](const std::string& p) {
    const std::unique_ptr<char, decltype(&std::free)> r(::realpath(p.c_str(), nullptr), &std::free);
    return r == nullptr ? std::string() : std::string(r.get());
  };
  const std::string target = canonical(full);
  const int why = errno;
  // Whether a file exists outside the folders is nobody's business: the same answer for both.
  const auto refused = fail(ErrorKind::kPermission,
                            fmt::format("image {}: '{}' is not inside the image folders", image_path, shown));
  for (const std::string& f : folders) {
    std::string folder = canonical(f);
    if (folder.empty()) continue;
    if (folder.back() != '/') folder += '/';
    if (!target.empty() && target.starts_with(folder)) {
      // Opening a fifo would wait for somebody, opening a terminal or a tape does things.
      struct stat st {};
      if (::stat(target.c_str(), &st) == 0 && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return fail(ErrorKind::kInvalid,
                    fmt::format("image {}: '{}' is neither a file nor a block device", image_path, shown));
      return target;
    }
    if (target.empty()) {
      const size_t cut = full.rfind('/');
      const std::string parent = canonical(cut == std::string::npos ? "." : full.substr(0, cut + 1)) + "/";
      if (parent.starts_with(folder)) return fail_errno(why, fmt::format("image {}: '{}'", image_path, shown));
    }
  }
  return refused;
}

ImageResolver refuse_names_in_guessed() {
  return [](ImageReference ref) -> Task<Result<VolumePtr>> {
    std::string shown;
    for (char c : ref.name.substr(0, 200)) shown += c >= 0x20 && c < 0x7f ? c : '?';
    return Task<Result<VolumePtr>>::ready(
        fail(ErrorKind::kPermission, fmt::format("'{}' is named by an image whose format the image above does not say: "
                                                 "not followed (qemu-img rebase -u -F qcow2 says it)", shown)));
  };
}

Status check_chain(const std::vector<std::string>& chain, const std::string& path) {
  if (std::find(chain.begin(), chain.end(), path) != chain.end()) {
    std::string text;
    for (const std::string& p : chain) text += p + " -> ";
    return fail(ErrorKind::kInvalid, "backing files form a loop: " + text + path);
  }
  if (chain.size() >= kMaxBackingChain)
    return fail(ErrorKind::kInvalid, fmt::format("more than {} backing files on top of {}", kMaxBackingChain, path));
  return {};
}

namespace {

bool follows(const MapEntry& last, const MapEntry& e) {
  return last.depth == e.depth && last.present == e.present && last.zero == e.zero && last.data == e.data &&
         last.has_offset == e.has_offset && last.compressed == e.compressed && last.file == e.file &&
         (!e.has_offset || last.offset + last.length == e.offset);
}

// The file's own block status for [offset, offset + e.length): cuts `e` where it changes.
Task<Result<bool>> file_has_hole(Volume& file, uint64_t offset, MapEntry& e) {
  const uint32_t block = file.geometry().block_size;
  const uint64_t from = align_down(offset, block), to = std::min(file.size(), align_up(offset + e.length, block));
  if (from >= to) co_return true;  // beyond the end
  SPILLWAY_CO_TRY(const std::vector<Extent> extents, co_await file.block_status(from, to - from));
  if (extents.empty()) co_return fail(ErrorKind::kIo, fmt::format("volume {}: no block status", file.name()));
  const bool hole = extents[0].kind != Extent::Kind::kData;
  const uint64_t end = extents[0].offset + extents[0].length;
  // A hole at the end of the file goes on for ever.
  if (!(hole && end >= file.size())) e.length = std::min(e.length, end - offset);
  co_return hole;
}

}  // namespace

Task<Result<std::vector<MapEntry>>> map_image(VolumePtr image, AllocatedBytes allocated) {
  std::vector<MapEntry> all;
  std::map<const Qcow2Image*, bool> preallocated;
  const uint64_t total = image->size();
  for (uint64_t at = 0; at < total;) {
    MapEntry e;
    e.start = at;
    e.length = total - at;
    Volume* v = image.get();
    for (;;) {
      auto* q = dynamic_cast<Qcow2Image*>(v);
      if (q == nullptr) {
        SPILLWAY_CO_TRY(e.zero, co_await file_has_hole(*v, at, e));
        e.present = e.has_offset = true;
        e.data = !e.zero;
        e.offset = at;
        e.file = v->name();
        break;
      }
      SPILLWAY_CO_TRY(const Qcow2Image::Run r, co_await q->map_run(at, e.length));
      e.length = r.length;
      if (r.kind == Qcow2Image::Kind::kUnallocated) {
        if (q->backing() && at < q->backing().size()) {
          e.length = std::min(e.length, q->backing().size() - at);
          v = &q->backing().volume();
          ++e.depth;
          continue;
        }
        e.zero = true;
        e.has_offset = r.has_host;
        e.offset = r.has_host ? r.host : 0;
        break;
      }
      e.present = true;
      e.zero = r.kind == Qcow2Image::Kind::kZero;
      e.data = !e.zero;
      e.compressed = r.kind == Qcow2Image::Kind::kPacked;
      e.has_offset = r.kind == Qcow2Image::Kind::kData || (e.zero && r.has_host);
      e.offset = e.has_offset ? r.host : 0;
      e.file = q->data().volume().name();
      if (allocated && r.kind == Qcow2Image::Kind::kData) {
        auto known = preallocated.find(q);
        if (known == preallocated.end()) {
          SPILLWAY_CO_TRY(const bool is, co_await q->counts_more_than(allocated(*q->members()[0])));
          known = preallocated.emplace(q, is).first;
        }
        if (known->second) {
          SPILLWAY_CO_TRY(e.zero, co_await file_has_hole(q->data().volume(), r.host, e));
        }
      }
      break;
    }
    at += e.length;
    if (!all.empty() && follows(all.back(), e)) all.back().length += e.length;
    else all.push_back(std::move(e));
  }
  co_return all;
}

std::string map_to_json(const std::vector<MapEntry>& entries) {
  std::string t = "[";
  for (const MapEntry& e : entries) {
    if (t.size() > 1) t += ",\n";
    t += fmt::format("{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}", e.start,
                     e.length, e.depth, e.present, e.zero, e.data);
    if (e.has_offset) t += fmt::format(", \"offset\": {}", e.offset);
    t += "}";
  }
  return t + "]\n";
}

std::string map_to_text(const std::vector<MapEntry>& entries) {
  std::string t = fmt::format("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
  MapEntry last;
  auto out = [&] {
    if (last.length == 0) return;
    std::string file;
    for (char c : last.file) file += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
    t += fmt::format("{:<#16x}{:<#16x}{:<16}{}\n", last.start, last.length,
                     last.compressed ? "compressed" : fmt::format("{:#x}", last.offset), file);
  };
  for (const MapEntry& e : entries) {
    if (!e.data || e.zero) continue;
    if (last.length != 0 && last.start + last.length == e.start && follows(last, e)) {
      last.length += e.length;
      continue;
    }
    out();
    last = e;
  }
  out();
  return t;
}

namespace {

// Reads ahead `kPiece` bytes at a time; the caller owns the buffer.
constexpr uint64_t kPiece = 2 * kMiB;

Task<Status> copy_piece(Volume& source, Volume& target, Qcow2Image* compressed, bool holes_are_zero, uint64_t at,
                        uint64_t n, AlignedBuffer& buffer) {
  const MemberIo from(std::shared_ptr<Volume>(std::shared_ptr<Volume>(), &source));
  const MemberIo to(std::shared_ptr<Volume>(std::shared_ptr<Volume>(), &target));
  const uint64_t unit = compressed != nullptr ? compressed->cluster_size() : 4096;
  const IoContext ctx;
  const iovec v{buffer.data(), n};
  SPILLWAY_CO_CHECK(co_await from.read(ctx, at, Iov(&v, 1)));
  if (n % unit != 0) std::memset(buffer.data() + n, 0, std::min(unit - n % unit, buffer.size() - n));
  for (uint64_t i = 0; i < n;) {
    const uint64_t one = std::min(unit, n - i);
    if (all_zero(buffer.data() + i, one)) {
      if (!holes_are_zero) SPILLWAY_CO_CHECK(co_await to.write_zeroes(ctx, at + i, one, true));
      i += one;
    } else if (compressed != nullptr) {
      SPILLWAY_CO_CHECK(co_await compressed->write_compressed(ctx, at + i, std::span(buffer.data() + i, unit)));
      i += one;
    } else {
      uint64_t end = i + one;
      while (end < n && !all_zero(buffer.data() + end, std::min(unit, n - end))) end = std::min(n, end + unit);
      const iovec part{buffer.data() + i, end - i};
      SPILLWAY_CO_CHECK(co_await to.write(ctx, at + i, Iov(&part, 1)));
      i = end;
    }
  }
  co_return Status{};
}

}  // namespace

Task<Status> convert_image(VolumePtr source, VolumePtr target, ConvertOptions options) {
  if (target->size() < source->size())
    co_return fail(ErrorKind::kInvalid, fmt::format("convert: the target of {} bytes is smaller than the source of {}",
                                                    target->size(), source->size()));
  auto* compressed = options.compress ? dynamic_cast<Qcow2Image*>(target.get()) : nullptr;
  if (options.compress && compressed == nullptr)
    co_return fail(ErrorKind::kUnsupported, "convert: only a qcow2 target can be compressed");
  AlignedBuffer buffer(kPiece);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "convert: no memory for a buffer");
  const MemberIo to(target);
  const uint64_t total = source->size();
  const uint32_t block = source->geometry().block_size;
  for (uint64_t at = 0; at < total;) {
    const uint64_t window = std::min(total - at, kGiB);
    SPILLWAY_CO_TRY(const std::vector<Extent> extents,
                    co_await source->block_status(align_down(at, block), align_up(window, block)));
    for (const Extent& e : extents) {
      const uint64_t end = std::min(e.offset + e.length, total);
      if (end <= at) continue;
      // Whole clusters at a time when compressing: a hole that does not fill one is read like data.
      const uint64_t unit = compressed != nullptr ? compressed->cluster_size() : block;
      const bool aligned = is_aligned(at, unit) && (is_aligned(end, unit) || end == total);
      if (e.kind != Extent::Kind::kData && (compressed == nullptr || aligned)) {
        if (!options.target_is_zero) SPILLWAY_CO_CHECK(co_await to.write_zeroes(IoContext{}, at, end - at, true));
        at = end;
      } else {
        const uint64_t stop = compressed != nullptr ? std::min(total, align_up(end, unit)) : end;
        while (at < stop) {
          const uint64_t n = std::min(kPiece - at % kPiece, stop - at);
          SPILLWAY_CO_CHECK(co_await copy_piece(*source, *target, compressed, options.target_is_zero, at, n, buffer));
          at += n;
        }
      }
      if (options.progress) options.progress(at, total);
    }
  }
  if (target->size() > total && !options.target_is_zero)
    SPILLWAY_CO_CHECK(co_await to.write_zeroes(IoContext{}, total, target->size() - total, true));
  co_return co_await target->flush(IoContext{});
}

Task<Status> compare_images(VolumePtr a, VolumePtr b) {
  const MemberIo left(a), right(b);
  AlignedBuffer x(kPiece), y(kPiece);
  if (!x || !y) co_return fail(ErrorKind::kNoMemory, "compare: no memory for a buffer");
  const uint64_t total = std::max(a->size(), b->size());
  for (uint64_t at = 0; at < total;) {
    const uint64_t n = std::min(kPiece, total - at);
    SPILLWAY_CO_CHECK(co_await left.read(IoContext{}, at, x.data(), n));
    SPILLWAY_CO_CHECK(co_await right.read(IoContext{}, at, y.data(), n));
    if (std::memcmp(x.data(), y.data(), n) != 0) {
      const uint64_t i = static_cast<uint64_t>(std::mismatch(x.data(), x.data() + n, y.data()).first - x.data());
      co_return fail(ErrorKind::kInvalid, fmt::format("contents differ at offset {}", at + i));
    }
    at += n;
  }
  co_return Status{};
}

}  // namespace spillway
