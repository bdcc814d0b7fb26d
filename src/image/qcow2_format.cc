#include "src/image/qcow2_format.h"

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

namespace spillway::qcow2 {
namespace {

enum Extension : uint32_t {
  kExtEnd = 0, kExtBackingFormat = 0xe2792aca, kExtFeatureNames = 0x6803f857, kExtBitmaps = 0x23852875,
  kExtCrypto = 0x0537be77, kExtDataFile = 0x44415441,
};

// Text from an image, made safe for a log line.
std::string printable(std::string_view s) {
  std::string out;
  for (char c : s.substr(0, 64)) out += c >= 0x20 && c < 0x7f ? c : '?';
  return out;
}

struct FeatureName {
  uint8_t type, bit;
  std::string name;
};

Status parse_extensions(std::span<const std::byte> bytes, Header& h, uint64_t end,
                        std::vector<FeatureName>& names) {
  uint64_t at = h.version == 2 ? kHeaderV2 : h.header_length;
  while (at + 8 <= end) {
    const uint32_t type = load32(&bytes[at]);
    const uint64_t length = load32(&bytes[at + 4]);
    at += 8;
    if (type == kExtEnd) return {};
    if (length > end - at)
      return fail(ErrorKind::kInvalid, fmt::format("header extension {:#x} of {} bytes is too long", type, length));
    const std::string_view text(reinterpret_cast<const char*>(&bytes[at]), length);
    switch (type) {
      case kExtBackingFormat: h.backing_format = text; break;
      case kExtDataFile: h.data_file = text; break;
      case kExtFeatureNames:
        for (uint64_t i = 0; i + 48 <= length; i += 48) {
          std::string_view name = text.substr(i + 2, 46);
          names.push_back({static_cast<uint8_t>(text[i]), static_cast<uint8_t>(text[i + 1]),
                           printable(name.substr(0, name.find('\0')))});
        }
        break;
      case kExtCrypto: return fail(ErrorKind::kUnsupported, "encryption (LUKS header extension) is not supported");
      default: break;  // bitmaps: judged by the autoclear bit; the rest may be ignored
    }
    at += align_up(length, 8);
  }
  return {};
}

Status check_features(const Header& h, const std::vector<FeatureName>& names) {
  const uint64_t unknown = h.incompatible & ~uint64_t{kKnownIncompatible};
  if (unknown != 0) {
    std::string text;
    for (uint32_t bit = 0; bit < 64; ++bit) {
      if ((unknown >> bit & 1) == 0) continue;
      auto n = std::find_if(names.begin(), names.end(), [&](auto& f) { return f.type == 0 && f.bit == bit; });
      if (!text.empty()) text += ", ";
      text += n != names.end() ? fmt::format("'{}' (bit {})", n->name, bit) : fmt::format("bit {}", bit);
    }
    return fail(ErrorKind::kUnsupported, fmt::format("unknown incompatible feature {}", text));
  }
  if ((h.autoclear & kBitmaps) != 0) return fail(ErrorKind::kUnsupported, "persistent bitmaps are not supported");
  return {};
}

Status check_table(const char* what, uint64_t offset, uint64_t length, const Header& h, uint64_t file_size) {
  if (length == 0) return {};
  if (!is_aligned(offset, h.cluster_size()))
    return fail(ErrorKind::kInvalid, fmt::format("{} at {}: not on a cluster boundary", what, offset));
  if (offset == 0) return fail(ErrorKind::kCorrupt, fmt::format("{} overlaps the header", what));
  if (offset > file_size || length > file_size - offset)
    return fail(ErrorKind::kCorrupt,
                fmt::format("{} at {} ({} bytes) is beyond the end of the file at {}", what, offset, length, file_size));
  return {};
}

bool overlap(uint64_t a, uint64_t an, uint64_t b, uint64_t bn) { return an > 0 && bn > 0 && a < b + bn && b < a + an; }

Status check_geometry(const Header& h, uint64_t file_size) {
  if (h.extended_l2() && h.cluster_bits < kMinExtendedClusterBits)
    return fail(ErrorKind::kInvalid, fmt::format("subclusters need clusters of 16 KiB, not {}", h.cluster_size()));
  if (h.size > uint64_t{1} << 62) return fail(ErrorKind::kInvalid, fmt::format("virtual size {} is too large", h.size));
  const uint64_t l1_bytes = uint64_t{h.l1_size} * 8;
  if (l1_bytes > kMaxL1Bytes)
    return fail(ErrorKind::kInvalid, fmt::format("L1 table of {} entries is too large", h.l1_size));
  const uint64_t need = h.size / h.bytes_per_l2() + (h.size % h.bytes_per_l2() != 0);
  if (need > h.l1_size)
    return fail(ErrorKind::kInvalid, fmt::format("L1 table of {} entries is too small: {} bytes need {}",
                                                 h.l1_size, h.size, need));
  if (h.reftable_clusters == 0) return fail(ErrorKind::kInvalid, "no refcount table");
  const uint64_t reftable_bytes = uint64_t{h.reftable_clusters} << h.cluster_bits;
  if (reftable_bytes > kMaxRefTableBytes)
    return fail(ErrorKind::kInvalid, fmt::format("refcount table of {} clusters is too large", h.reftable_clusters));
  SPILLWAY_CHECK(check_table("L1 table", h.l1_offset, l1_bytes, h, file_size));
  SPILLWAY_CHECK(check_table("refcount table", h.reftable_offset, reftable_bytes, h, file_size));
  if (overlap(h.l1_offset, l1_bytes, h.reftable_offset, reftable_bytes))
    return fail(ErrorKind::kCorrupt, "L1 table and refcount table overlap");
  if (h.snapshots > kMaxSnapshots)
    return fail(ErrorKind::kInvalid, fmt::format("{} snapshots are too many", h.snapshots));
  if (h.snapshots > 0) {
    SPILLWAY_CHECK(check_table("snapshot table", h.snapshots_offset, uint64_t{h.snapshots} * 40, h, file_size));
    if (overlap(h.snapshots_offset, uint64_t{h.snapshots} * 40, h.l1_offset, l1_bytes) ||
        overlap(h.snapshots_offset, uint64_t{h.snapshots} * 40, h.reftable_offset, reftable_bytes))
      return fail(ErrorKind::kCorrupt, "snapshot table overlaps another table");
  }
  return {};
}

}  // namespace

uint64_t header_bytes_needed(std::span<const std::byte> b) {
  if (b.size() < kHeaderV2 || load32(&b[0]) != kMagic) return 0;
  const uint32_t bits = load32(&b[20]);
  return bits < kMinClusterBits || bits > kMaxClusterBits ? b.size() : uint64_t{1} << bits;
}

Result<Header> parse_header(std::span<const std::byte> b, uint64_t file_size) {
  if (b.size() < kHeaderV2) return fail(ErrorKind::kInvalid, "too short for a qcow2 header");
  if (load32(&b[0]) != kMagic) return fail(ErrorKind::kInvalid, "not a qcow2 image (no magic)");
  Header h;
  h.version = load32(&b[4]);
  if (h.version != 2 && h.version != 3)
    return fail(ErrorKind::kUnsupported, fmt::format("qcow version {} is not supported", h.version));
  const uint64_t backing_offset = load64(&b[8]);
  const uint32_t backing_length = load32(&b[16]);
  h.cluster_bits = load32(&b[20]);
  h.size = load64(&b[24]);
  const uint32_t crypt = load32(&b[32]);
  h.l1_size = load32(&b[36]);
  h.l1_offset = load64(&b[40]);
  h.reftable_offset = load64(&b[48]);
  h.reftable_clusters = load32(&b[56]);
  h.snapshots = load32(&b[60]);
  h.snapshots_offset = load64(&b[64]);
  if (h.cluster_bits < kMinClusterBits || h.cluster_bits > kMaxClusterBits)
    return fail(ErrorKind::kInvalid, fmt::format("cluster size 2^{} is not between 512 B and 2 MiB", h.cluster_bits));
  if (crypt != 0)
    return fail(ErrorKind::kUnsupported, fmt::format("encryption ({}) is not supported",
                                                     crypt == 1 ? "AES" : crypt == 2 ? "LUKS" : "unknown method"));
  const uint64_t limit = std::min<uint64_t>(b.size(), h.cluster_size());
  if (h.version == 3) {
    if (limit < kHeaderV3) return fail(ErrorKind::kInvalid, "too short for a qcow2 v3 header");
    h.incompatible = load64(&b[72]);
    h.compatible = load64(&b[80]);
    h.autoclear = load64(&b[88]);
    h.refcount_order = load32(&b[96]);
    h.header_length = load32(&b[100]);
    if (h.header_length < kHeaderV3 || h.header_length > limit || h.header_length % 8 != 0)
      return fail(ErrorKind::kInvalid, fmt::format("header length {} is invalid", h.header_length));
    if (h.header_length > kHeaderV3) h.compression = static_cast<uint8_t>(b[104]);
  } else {
    h.header_length = kHeaderV2;
  }
  uint64_t end = limit;
  if (backing_offset != 0) {
    if (backing_length > kMaxBackingName || backing_offset > limit || backing_length > limit - backing_offset ||
        backing_offset < h.header_length)
      return fail(ErrorKind::kInvalid, fmt::format("backing file name at {} ({} bytes) is not inside the header cluster",
                                                   backing_offset, backing_length));
    h.backing_file.assign(reinterpret_cast<const char*>(&b[backing_offset]), backing_length);
    if (h.backing_file.find('\0') != std::string::npos)
      return fail(ErrorKind::kInvalid, "backing file name contains a NUL byte");
    end = backing_offset;
  }
  std::vector<FeatureName> names;
  SPILLWAY_CHECK(parse_extensions(b, h, end, names));
  SPILLWAY_CHECK(check_features(h, names));
  if (h.refcount_order > 6)
    return fail(ErrorKind::kInvalid, fmt::format("refcounts of 2^{} bits are invalid", h.refcount_order));
  if (h.compression > 1)
    return fail(ErrorKind::kUnsupported, fmt::format("compression type {} is not supported", h.compression));
  if ((h.compression != 0) != ((h.incompatible & kCompressionType) != 0))
    return fail(ErrorKind::kInvalid, "compression type and its feature bit disagree");
  if (h.data_file.find('\0') != std::string::npos)
    return fail(ErrorKind::kInvalid, "data file name contains a NUL byte");
  SPILLWAY_CHECK(check_geometry(h, file_size));
  return h;
}

Result<std::vector<std::byte>> write_header(const Header& h) {
  std::vector<std::byte> out(h.cluster_size());
  std::byte* b = out.data();
  store32(b, kMagic);
  store32(b + 4, h.version);
  store32(b + 20, h.cluster_bits);
  store64(b + 24, h.size);
  store32(b + 36, h.l1_size);
  store64(b + 40, h.l1_offset);
  store64(b + 48, h.reftable_offset);
  store32(b + 56, h.reftable_clusters);
  store32(b + 60, h.snapshots);
  store64(b + 64, h.snapshots_offset);
  uint64_t at = kHeaderV2;
  if (h.version >= 3) {
    store64(b + 72, h.incompatible);
    store64(b + 80, h.compatible);
    store64(b + 88, h.autoclear);
    store32(b + 96, h.refcount_order);
    at = 112;  // with the compression type, padded to 8
    store32(b + 100, static_cast<uint32_t>(at));
    b[104] = std::byte{h.compression};
  }
  auto extension = [&](uint32_t type, std::string_view data) {
    if (at + 8 + align_up(data.size(), 8) > out.size()) return false;
    store32(b + at, type);
    store32(b + at + 4, static_cast<uint32_t>(data.size()));
    if (!data.empty()) std::memcpy(b + at + 8, data.data(), data.size());
    at += 8 + align_up(data.size(), 8);
    return true;
  };
  bool fits = true;
  if (!h.backing_format.empty()) fits = extension(kExtBackingFormat, h.backing_format);
  if (!h.data_file.empty()) fits = fits && extension(kExtDataFile, h.data_file);
  if (h.version >= 3) {
    static constexpr struct { uint8_t type, bit; const char* name; } kNames[] = {
        {0, 0, "dirty bit"}, {0, 1, "corrupt bit"}, {0, 2, "external data file"}, {0, 3, "compression type"},
        {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"}, {2, 0, "bitmaps"}, {2, 1, "raw external data"}};
    std::string table;
    for (auto& n : kNames) {
      std::string row(48, '\0');
      row[0] = static_cast<char>(n.type);
      row[1] = static_cast<char>(n.bit);
      std::memcpy(&row[2], n.name, std::strlen(n.name));
      table += row;
    }
    // Courtesy to other readers: left out where a small cluster has no room for it.
    if (at + 8 + table.size() + 8 + h.backing_file.size() <= out.size()) (void)extension(kExtFeatureNames, table);
  }
  fits = fits && extension(kExtEnd, {});
  if (fits && !h.backing_file.empty()) {
    fits = at + h.backing_file.size() <= out.size() && h.backing_file.size() <= kMaxBackingName;
    if (fits) {
      store64(b + 8, at);
      store32(b + 16, static_cast<uint32_t>(h.backing_file.size()));
      std::memcpy(b + at, h.backing_file.data(), h.backing_file.size());
    }
  }
  if (!fits)
    return fail(ErrorKind::kInvalid, fmt::format("file names do not fit a header of {} bytes", out.size()));
  return out;
}

Result<std::vector<Snapshot>> parse_snapshots(std::span<const std::byte> b, const Header& h, uint64_t* used) {
  std::vector<Snapshot> all;
  uint64_t at = 0;
  for (uint32_t i = 0; i < h.snapshots; ++i) {
    if (b.size() - at < 40) return fail(ErrorKind::kCorrupt, fmt::format("snapshot {} is cut off", i));
    const std::byte* p = &b[at];
    Snapshot s;
    s.l1_offset = load64(p);
    s.l1_size = load32(p + 8);
    const uint64_t id_size = load16(p + 12), name_size = load16(p + 14);
    s.date_s = load32(p + 16);
    s.date_ns = load32(p + 20);
    s.vm_clock_ns = load64(p + 24);
    s.vm_state_size = load32(p + 32);
    const uint64_t extra = load32(p + 36);
    if (extra > 1024) return fail(ErrorKind::kCorrupt, fmt::format("snapshot {}: {} bytes of extra data", i, extra));
    if (b.size() - at - 40 < extra + id_size + name_size)
      return fail(ErrorKind::kCorrupt, fmt::format("snapshot {} is cut off", i));
    if (extra >= 8) s.vm_state_size = load64(p + 40);
    s.virtual_size = h.size;
    if (extra >= 16) {
      s.virtual_size = load64(p + 48);
      s.has_virtual_size = true;
    }
    const char* text = reinterpret_cast<const char*>(p + 40 + extra);
    s.id.assign(text, id_size);
    s.name.assign(text + id_size, name_size);
    if (uint64_t{s.l1_size} * 8 > kMaxL1Bytes || !is_aligned(s.l1_offset, h.cluster_size()) ||
        s.virtual_size > uint64_t{1} << 62)
      return fail(ErrorKind::kCorrupt, fmt::format("snapshot {}: its L1 table is invalid", i));
    all.push_back(std::move(s));
    at = std::min<uint64_t>(b.size(), align_up(at + 40 + extra + id_size + name_size, 8));
  }
  *used = at;
  return all;
}

uint64_t get_refcount(const std::byte* t, uint64_t i, uint32_t order) {
  switch (order) {
    case 3: return static_cast<uint8_t>(t[i]);
    case 4: return load16(t + i * 2);
    case 5: return load32(t + i * 4);
    case 6: return load64(t + i * 8);
    default: {  // 1, 2, 4 bits: the lowest bits of a byte come first
      const uint32_t bits = 1u << order, per_byte = 8 / bits;
      return static_cast<uint8_t>(t[i / per_byte]) >> (i % per_byte * bits) & ((1u << bits) - 1);
    }
  }
}

void set_refcount(std::byte* t, uint64_t i, uint32_t order, uint64_t v) {
  switch (order) {
    case 3: t[i] = static_cast<std::byte>(v); return;
    case 4: store16(t + i * 2, static_cast<uint16_t>(v)); return;
    case 5: store32(t + i * 4, static_cast<uint32_t>(v)); return;
    case 6: store64(t + i * 8, v); return;
    default: {
      const uint32_t bits = 1u << order, per_byte = 8 / bits, shift = i % per_byte * bits;
      const uint32_t mask = ((1u << bits) - 1) << shift;
      const uint32_t old = static_cast<uint8_t>(t[i / per_byte]);
      t[i / per_byte] = static_cast<std::byte>((old & ~mask) | (v << shift & mask));
    }
  }
}

}  // namespace spillway::qcow2
