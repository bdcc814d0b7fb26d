// Making an image, and telling about one.
#include <algorithm>
#include <cstring>
#include <ctime>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "src/image/member_io.h"
#include "src/image/qcow2.h"
#include "src/image/qcow2_format.h"

namespace spillway {
namespace {

using qcow2::Header;
using qcow2::MemberIo;

Result<Header> header_of(const Qcow2CreateOptions& o) {
  Header h;
  auto invalid = [](std::string text) { return fail(ErrorKind::kInvalid, "qcow2: " + text); };
  if (o.version != 2 && o.version != 3) return invalid(fmt::format("version {}: 2 and 3 exist", o.version));
  if (o.cluster_size < 512 || o.cluster_size > 2 * kMiB || (o.cluster_size & (o.cluster_size - 1)) != 0)
    return invalid(fmt::format("cluster size {}: a power of two from 512 to 2M", o.cluster_size));
  if (o.refcount_bits == 0 || o.refcount_bits > 64 || (o.refcount_bits & (o.refcount_bits - 1)) != 0)
    return invalid(fmt::format("{} refcount bits: a power of two up to 64", o.refcount_bits));
  if (o.version == 2 && (o.refcount_bits != 16 || o.lazy_refcounts || o.extended_l2 || !o.data_file.empty() ||
                         o.compression != Qcow2Compression::kZlib))
    return invalid("version 2 has 16 refcount bits and no v3 feature");
  if (o.extended_l2 && o.cluster_size < 16 * kKiB) return invalid("subclusters need clusters of 16K");
  if (o.virtual_size > uint64_t{1} << 62) return invalid(fmt::format("size {} is too large", o.virtual_size));
  if (!o.backing_file.empty() && o.backing_format.empty()) return invalid("a backing file needs its format");
  if (!o.backing_file.empty() && !o.data_file.empty() && o.data_file_raw)
    return invalid("a raw data file cannot have a backing file");
  h.version = o.version;
  h.cluster_bits = static_cast<uint32_t>(__builtin_ctz(o.cluster_size));
  h.size = align_up(o.virtual_size, 512);
  h.refcount_order = static_cast<uint32_t>(__builtin_ctz(o.refcount_bits));
  if (o.lazy_refcounts) h.compatible |= qcow2::kLazyRefcounts;
  if (o.extended_l2) h.incompatible |= qcow2::kExtendedL2;
  if (o.compression != Qcow2Compression::kZlib) h.incompatible |= qcow2::kCompressionType;
  h.compression = static_cast<uint8_t>(o.compression);
  h.backing_file = o.backing_file;
  h.backing_format = o.backing_format;
  if (!o.data_file.empty()) {
    h.incompatible |= qcow2::kExternalData;
    h.data_file = o.data_file;
    if (o.data_file_raw) h.autoclear |= qcow2::kRawExternalData;
  }
  const uint64_t l1 = (h.size + h.bytes_per_l2() - 1) / h.bytes_per_l2();
  if (l1 * 8 > qcow2::kMaxL1Bytes)
    return invalid(fmt::format("size {} is too large for clusters of {}", h.size, o.cluster_size));
  h.l1_size = static_cast<uint32_t>(l1);
  return h;
}

}  // namespace

// Header, refcount table, refcount blocks, L1 table; the header goes last, after everything it names is stable.
Task<Status> create_qcow2(VolumePtr file, Qcow2CreateOptions options) {
  SPILLWAY_CO_TRY(Header h, header_of(options));
  const uint64_t cs = h.cluster_size();
  const uint64_t l1_clusters = std::max<uint64_t>(1, align_up(uint64_t{h.l1_size} * 8, cs) / cs);
  uint64_t table = 1, blocks = 1, total = 0;
  for (;;) {
    total = 1 + table + blocks + l1_clusters;
    const uint64_t want_blocks = (total + h.refblock_entries() - 1) / h.refblock_entries();
    const uint64_t want_table = (want_blocks * 8 + cs - 1) / cs;
    if (want_blocks == blocks && want_table == table) break;
    blocks = std::max(blocks, want_blocks);
    table = std::max(table, want_table);
    if (want_blocks < blocks || want_table < table) break;
  }
  total = 1 + table + blocks + l1_clusters;
  h.reftable_offset = cs;
  h.reftable_clusters = static_cast<uint32_t>(table);
  h.l1_offset = (1 + table + blocks) * cs;
  SPILLWAY_CO_TRY(std::vector<std::byte> header, qcow2::write_header(h));

  const MemberIo io(file);
  const uint64_t block_size = file->geometry().block_size, end = align_up(total * cs, std::max(cs, block_size));
  if (io.size() < end) SPILLWAY_CO_CHECK(co_await file->resize(align_up(end, block_size)));
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  // An old header must not be taken for the new image's.
  SPILLWAY_CO_CHECK(co_await io.write_zeroes(ctx, 0, total * cs, false));
  SPILLWAY_CO_CHECK(co_await file->flush(ctx));
  std::vector<std::byte> raw(table * cs);
  for (uint64_t b = 0; b < blocks; ++b) qcow2::store64(&raw[b * 8], (1 + table + b) * cs);
  SPILLWAY_CO_CHECK(co_await io.write(ctx, cs, raw.data(), raw.size()));
  for (uint64_t b = 0; b < blocks; ++b) {
    std::vector<std::byte> block(cs);
    for (uint64_t i = 0; i < h.refblock_entries() && b * h.refblock_entries() + i < total; ++i)
      qcow2::set_refcount(block.data(), i, h.refcount_order, 1);
    SPILLWAY_CO_CHECK(co_await io.write(ctx, (1 + table + b) * cs, block.data(), block.size()));
  }
  SPILLWAY_CO_CHECK(co_await file->flush(ctx));
  SPILLWAY_CO_CHECK(co_await io.write(ctx, 0, header.data(), header.size()));
  co_return co_await file->flush(ctx);
}

Task<Result<ImageInfo>> image_info(VolumePtr file, ImageFormat format) {
  ImageInfo info;
  info.format = format;
  info.file_size = info.virtual_size = file->size();
  if (format == ImageFormat::kRaw) co_return info;
  const MemberIo io(file);
  std::vector<std::byte> bytes(2 * kMiB);
  SPILLWAY_CO_CHECK(co_await io.read(IoContext{}, 0, bytes.data(), bytes.size()));
  Result<Header> h = qcow2::parse_header(bytes, align_up(file->size(), 2 * kMiB));
  if (!h) co_return fail(std::move(h).error().with_context("qcow2 " + file->name()));
  info.virtual_size = align_down(h->size, 512);
  info.version = h->version;
  info.cluster_size = static_cast<uint32_t>(h->cluster_size());
  info.refcount_bits = h->refcount_bits();
  info.compression = static_cast<Qcow2Compression>(h->compression);
  info.lazy_refcounts = (h->compatible & qcow2::kLazyRefcounts) != 0;
  info.dirty = (h->incompatible & qcow2::kDirty) != 0;
  info.corrupt = (h->incompatible & qcow2::kCorrupt) != 0;
  info.extended_l2 = h->extended_l2();
  info.data_file_raw = h->data_raw();
  info.backing_file = h->backing_file;
  info.backing_format = h->backing_format;
  info.data_file = h->data_file;
  if (h->snapshots > 0) {
    const uint64_t have = file->size() - std::min(file->size(), h->snapshots_offset);
    std::vector<std::byte> raw(std::min(have, qcow2::kMaxSnapshotBytes));
    SPILLWAY_CO_CHECK(co_await io.read(IoContext{}, h->snapshots_offset, raw.data(), raw.size()));
    uint64_t used = 0;
    SPILLWAY_CO_TRY(const std::vector<qcow2::Snapshot> list, qcow2::parse_snapshots(raw, *h, &used));
    for (const qcow2::Snapshot& s : list)
      info.snapshots.push_back({s.id, s.name, s.virtual_size, s.vm_state_size, s.date_s, s.date_ns, s.vm_clock_ns});
  }
  co_return info;
}

std::string info_to_json(const std::string& filename, uint64_t actual_bytes, const ImageInfo& i) {
  nlohmann::ordered_json j;
  j["virtual-size"] = i.virtual_size;
  j["filename"] = filename;
  j["actual-size"] = actual_bytes;
  j["file-size"] = i.file_size;
  j["format"] = to_string(i.format);
  if (i.format == ImageFormat::kQcow2) {
    j["cluster-size"] = i.cluster_size;
    j["dirty-flag"] = i.dirty;
    if (!i.backing_file.empty()) {
      j["backing-filename"] = i.backing_file;
      if (!i.backing_format.empty()) j["backing-filename-format"] = i.backing_format;
    }
    nlohmann::ordered_json data;
    data["compat"] = i.version == 2 ? "0.10" : "1.1";
    data["compression-type"] = i.compression == Qcow2Compression::kZstd ? "zstd" : "zlib";
    data["refcount-bits"] = i.refcount_bits;
    if (i.version >= 3) {
      data["lazy-refcounts"] = i.lazy_refcounts;
      data["corrupt"] = i.corrupt;
      data["extended-l2"] = i.extended_l2;
    }
    if (!i.data_file.empty()) {
      data["data-file"] = i.data_file;
      data["data-file-raw"] = i.data_file_raw;
    }
    j["format-specific"] = {{"type", "qcow2"}, {"data", data}};
    for (const Qcow2SnapshotInfo& s : i.snapshots)
      j["snapshots"].push_back({{"id", s.id},
                                {"name", s.name},
                                {"vm-state-size", s.vm_state_size},
                                {"date-sec", s.date_s},
                                {"date-nsec", s.date_ns},
                                {"vm-clock-sec", s.vm_clock_ns / 1000000000},
                                {"vm-clock-nsec", s.vm_clock_ns % 1000000000}});
  }
  // Names come from a hostile file: what is no UTF-8 is replaced.
  return j.dump(4, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string info_to_text(const std::string& filename, uint64_t actual_bytes, const ImageInfo& i) {
  std::string t = fmt::format("image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\nfile size: {}\ndisk size: {}\n",
                              filename, to_string(i.format), format_size(i.virtual_size), i.virtual_size,
                              format_size(i.file_size), format_size(actual_bytes));
  if (i.format != ImageFormat::kQcow2) return t;
  auto safe = [](std::string s) {
    for (char& c : s)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    return s;
  };
  t += fmt::format("cluster size: {}\nversion: {}\nrefcount bits: {}\ncompression: {}\n", i.cluster_size, i.version,
                   i.refcount_bits, i.compression == Qcow2Compression::kZstd ? "zstd" : "zlib");
  if (!i.backing_file.empty())
    t += fmt::format("backing file: {}\nbacking file format: {}\n", safe(i.backing_file),
                     i.backing_format.empty() ? "(not given)" : safe(i.backing_format));
  if (!i.data_file.empty())
    t += fmt::format("data file: {}{}\n", safe(i.data_file), i.data_file_raw ? " (raw)" : "");
  t += fmt::format("lazy refcounts: {}\nsubclusters: {}\ndirty: {}\ncorrupt: {}\n", i.lazy_refcounts, i.extended_l2,
                   i.dirty, i.corrupt);
  for (const Qcow2SnapshotInfo& s : i.snapshots)
    t += fmt::format("snapshot {}: {} ({} bytes{})\n", safe(s.id), safe(s.name), s.virtual_size,
                     s.vm_state_size > 0 ? fmt::format(", VM state {} bytes", s.vm_state_size) : "");
  return t;
}

}  // namespace spillway
