// Opening: header, tables and their checks; everything that refuses an image does so here, before anything is written.
#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/image/qcow2_image.h"

namespace spillway::qcow2 {
namespace {

Geometry geometry_for(const Header& h, const Volume& file, bool read_only) {
  Geometry g = file.geometry();
  g.block_size = 512;
  g.physical_block_size = std::max(g.physical_block_size, file.geometry().block_size);
  g.read_only = read_only;
  g.discard_granularity = read_only ? 0 : static_cast<uint32_t>(h.cluster_size());
  g.independent_region = 0;  // clusters may lie anywhere
  return g;
}

Task<Result<Header>> read_header(std::string name, const MemberIo& file) {
  std::vector<std::byte> bytes(4096);
  SPILLWAY_CO_CHECK(co_await file.read(IoContext{}, 0, bytes.data(), bytes.size()));
  const uint64_t need = header_bytes_needed(bytes);
  if (need > bytes.size()) {
    bytes.resize(need);
    SPILLWAY_CO_CHECK(co_await file.read(IoContext{}, 0, bytes.data(), bytes.size()));
  }
  Result<Header> h = parse_header(bytes, align_up(file.size(), uint64_t{1} << kMaxClusterBits));
  if (h) {
    // Now that the cluster size is known: the last cluster may be cut off, no more.
    h = parse_header(bytes, align_up(file.size(), h->cluster_size()));
  }
  if (!h) co_return fail(std::move(h).error().with_context("qcow2 " + name));
  co_return h;
}

}  // namespace

Qcow2Image::Qcow2Image(std::string name, uint64_t size, Geometry g, Header h, VolumePtr file, Qcow2Options o)
    : Volume(name, size, g),
      header_(std::move(h)),
      file_(std::move(file)),
      read_only_(g.read_only),
      extended_(header_.extended_l2()),
      cluster_bits_(header_.cluster_bits),
      cluster_size_(header_.cluster_size()),
      subcluster_size_(header_.subcluster_size()),
      l2_entries_(header_.l2_entries()),
      slice_entries_(std::min<uint64_t>(cluster_size_, 4096) / header_.l2_entry_size()),
      entry_words_(header_.l2_entry_size() / 8),
      prefix_("qcow2 " + name),
      decompressed_limit_(o.compressed_cache_bytes) {}

Qcow2Image::~Qcow2Image() {
  if (decompressed_shrinker_) decompressed_shrinker_.free();
  delete l1_.load();
}

std::vector<VolumePtr> Qcow2Image::members() const {
  std::vector<VolumePtr> all{file_.ptr()};
  if (header_.external_data() && data_) all.push_back(data_.ptr());
  if (backing_) all.push_back(backing_.ptr());
  return all;
}

// A table's clusters must be nobody else's.
Status Qcow2Image::claim_metadata(const char* what, uint64_t offset, uint64_t length) {
  const uint64_t end = align_up(offset + length, cluster_size_) >> cluster_bits_;
  for (uint64_t c = offset >> cluster_bits_; c < end; ++c)
    if (!metadata_.insert(c).second)
      return fail(ErrorKind::kCorrupt,
                  fmt::format("{} at {} overlaps another table at {}", what, offset, c << cluster_bits_));
  return {};
}

Task<Status> Qcow2Image::load_l1(uint64_t offset, uint64_t entries) {
  auto table = std::make_unique<L1Table>(entries);
  std::vector<std::byte> raw(entries * 8);
  if (entries > 0) SPILLWAY_CO_CHECK(co_await file_.read(metadata(IoContext{}), offset, raw.data(), raw.size()));
  const uint64_t end = align_up(file_.size(), cluster_size_);
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t e = load64(&raw[i * 8]), at = e & kOffsetMask;
    if ((e & kL1Reserved) != 0)
      co_return fail(ErrorKind::kCorrupt, fmt::format("L1 entry {} ({:#x}) has reserved bits set", i, e));
    if (at != 0) {
      if (!is_aligned(at, cluster_size_))
        co_return fail(ErrorKind::kCorrupt, fmt::format("L2 table {} at {}: not on a cluster boundary", i, at));
      if (at >= end || cluster_size_ > end - at)
        co_return fail(ErrorKind::kCorrupt, fmt::format("L2 table {} at {} is beyond the end of the file", i, at));
      SPILLWAY_CO_CHECK(claim_metadata("L2 table", at, cluster_size_));
    }
    table->entries[i].store(e, std::memory_order_relaxed);
  }
  l1_.store(table.release());
  co_return Status{};
}

Task<Status> Qcow2Image::load_reftable() {
  const uint64_t n = header_.reftable_entries();
  std::vector<std::byte> raw(n * 8);
  SPILLWAY_CO_CHECK(
      co_await file_.read(metadata(IoContext{}), header_.reftable_offset, raw.data(), raw.size()));
  const uint64_t end = align_up(file_.size(), cluster_size_);
  reftable_.resize(n);
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t at = load64(&raw[i * 8]);
    if (at != 0) {
      if ((at & kRefTableReserved) != 0 || !is_aligned(at, cluster_size_))
        co_return fail(ErrorKind::kCorrupt, fmt::format("refcount block {} at {:#x}: not on a cluster boundary", i, at));
      if (at >= end || cluster_size_ > end - at)
        co_return fail(ErrorKind::kCorrupt, fmt::format("refcount block {} at {} is beyond the end of the file", i, at));
      SPILLWAY_CO_CHECK(claim_metadata("refcount block", at, cluster_size_));
    }
    reftable_[i] = at;
  }
  co_return Status{};
}

Task<Status> Qcow2Image::load_snapshots(const std::string& wanted, uint64_t* l1_offset, uint64_t* l1_size) {
  if (header_.snapshots > 0) {
    const uint64_t have = align_up(file_.size(), cluster_size_) - header_.snapshots_offset;
    // Rows are short; the bound is QEMU's. Small tables are read in one go, others as far as they go.
    std::vector<std::byte> raw;
    uint64_t used = 0;
    for (uint64_t n = std::min<uint64_t>(have, 64 * kKiB);; n = std::min(have, std::min(n * 8, kMaxSnapshotBytes))) {
      raw.resize(n);
      SPILLWAY_CO_CHECK(co_await file_.read(metadata(IoContext{}), header_.snapshots_offset, raw.data(), n));
      Result<std::vector<Snapshot>> list = parse_snapshots(raw, header_, &used);
      if (list) {
        snapshots_ = std::move(*list);
        break;
      }
      if (n == have || n == kMaxSnapshotBytes) co_return std::unexpected(std::move(list).error());
    }
    SPILLWAY_CO_CHECK(claim_metadata("snapshot table", header_.snapshots_offset, used));
  }
  for (const Snapshot& s : snapshots_) {
    const uint64_t end = align_up(file_.size(), cluster_size_);
    if (s.l1_offset > end || uint64_t{s.l1_size} * 8 > end - s.l1_offset)
      co_return fail(ErrorKind::kCorrupt, fmt::format("snapshot {}: its L1 table is beyond the end of the file", s.id));
    // The L2 tables of snapshots may be shared with the active state; their L1 tables may not.
    if (s.l1_size > 0) SPILLWAY_CO_CHECK(claim_metadata("snapshot's L1 table", s.l1_offset, uint64_t{s.l1_size} * 8));
  }
  if (wanted.empty()) co_return Status{};
  auto it = std::find_if(snapshots_.begin(), snapshots_.end(), [&](auto& s) { return s.id == wanted; });
  if (it == snapshots_.end())
    it = std::find_if(snapshots_.begin(), snapshots_.end(), [&](auto& s) { return s.name == wanted; });
  if (it == snapshots_.end()) co_return fail(ErrorKind::kNotFound, fmt::format("no snapshot '{}'", wanted));
  const uint64_t per_l2 = header_.bytes_per_l2();
  if (it->virtual_size / per_l2 + (it->virtual_size % per_l2 != 0) > it->l1_size)
    co_return fail(ErrorKind::kCorrupt, fmt::format("snapshot {}: its L1 table is too small", it->id));
  *l1_offset = it->l1_offset;
  *l1_size = it->l1_size;
  set_size(align_down(it->virtual_size, 512));
  co_return Status{};
}

// Reads one slice of an L2 table and checks every entry, so that a lookup need not. `to`: big-endian, as on disk.
Task<Status> Qcow2Image::load_l2_slice(IoContext ctx, uint64_t index, std::byte* to) {
  const uint64_t first = index * slice_entries_;
  const uint32_t bytes = l2_->slice_bytes();
  uint64_t table = 0;
  {
    reclaim::RcuGuard guard;  // resize replaces the array
    table = l1_.load()->get(l1_index(first)) & kOffsetMask;
  }
  if (table == 0) co_return fail(ErrorKind::kCorrupt, prefix_ + ": an L2 table went away");  // tables never go
  const uint64_t at = table + first % l2_entries_ * header_.l2_entry_size();
  SPILLWAY_CO_CHECK(co_await file_.read(metadata(ctx), at, to, bytes));
  std::string why;
  for (uint64_t i = 0; i < slice_entries_; ++i) {
    std::byte* p = to + i * header_.l2_entry_size();
    const uint64_t entry = load64(p), bitmap = extended_ ? load64(p + 8) : 0;
    if (entry == 0 && bitmap == 0) continue;
    const uint64_t checked = check_entry(entry, bitmap, (first + i) << cluster_bits_, &why);
    if (checked == kBadEntry) {
      store64(p, kBadEntry);
      if (extended_) store64(p + 8, 0);
    }
  }
  if (!why.empty()) {
    Status s = co_await corruption(std::move(why));
    (void)s;  // the entries that are sound can still be read
  }
  co_return Status{};
}

uint64_t Qcow2Image::check_entry(uint64_t entry, uint64_t bitmap, uint64_t guest, std::string* why) {
  auto bad = [&](std::string text) {
    *why = fmt::format("L2 entry for offset {} ({:#x}): {}", guest, entry, text);
    return kBadEntry;
  };
  const uint64_t end = align_up(data_.size(), cluster_size_);
  if ((entry & kCompressed) != 0) {
    const CompressedSpan span = compressed_span(entry, cluster_bits_);
    if ((entry & kCopied) != 0) return bad("a compressed cluster is marked as writable in place");
    if (header_.external_data()) return bad("a compressed cluster in an image with external data");
    if (span.offset >= file_.size()) return bad("compressed data beyond the end of the file");
    if (is_metadata(span.offset, span.length)) return bad("compressed data overlaps a table");
    return entry;
  }
  const uint64_t reserved = kL2Reserved | (extended_ || header_.version < 3 ? kZeroFlag : 0);
  if ((entry & reserved) != 0) return bad("reserved bits are set");
  if (extended_ && (bitmap & (bitmap >> 32) & 0xffffffff) != 0)
    return bad("a subcluster is marked as allocated and zero at once");
  const uint64_t host = entry & kOffsetMask;
  const bool has_host = host != 0 || (header_.external_data() && (entry & kCopied) != 0);
  if (extended_ && !has_host && (bitmap & 0xffffffff) != 0) return bad("allocated subclusters without a cluster");
  if (!has_host) return entry;
  if (!is_aligned(host, cluster_size_)) return bad("not on a cluster boundary");
  if (header_.external_data()) {
    if (host != guest) return bad("external data at another place than the guest's");
    return entry;
  }
  if (host >= end) return bad("beyond the end of the file");
  if (is_metadata(host, cluster_size_)) return bad("overlaps a table");
  return entry;
}

Task<Status> Qcow2Image::load_refcount_slice(IoContext ctx, uint64_t index, std::byte* to) {
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  const uint64_t cluster = index * per_slice;
  const uint64_t block = reftable_[cluster / header_.refblock_entries()];
  const uint64_t at = block + cluster % header_.refblock_entries() / per_slice * refcounts_->slice_bytes();
  co_return co_await file_.read(metadata(ctx), at, to, refcounts_->slice_bytes());
}

Task<Status> Qcow2Image::load(Qcow2Options& options) {
  metadata_.insert(0);
  SPILLWAY_CO_CHECK(claim_metadata("refcount table", header_.reftable_offset,
                                   uint64_t{header_.reftable_clusters} << cluster_bits_));
  if (header_.l1_size > 0) SPILLWAY_CO_CHECK(claim_metadata("L1 table", header_.l1_offset, uint64_t{header_.l1_size} * 8));
  uint64_t l1_offset = header_.l1_offset, l1_size = header_.l1_size;
  SPILLWAY_CO_CHECK(co_await load_snapshots(options.snapshot, &l1_offset, &l1_size));
  SPILLWAY_CO_CHECK(co_await load_reftable());
  SPILLWAY_CO_CHECK(co_await load_l1(l1_offset, l1_size));

  const uint32_t slice_bytes = static_cast<uint32_t>(std::min<uint64_t>(cluster_size_, 4096));
  l2_ = std::make_unique<TableCache>(
      slice_bytes, l1_size * l2_entries_ / slice_entries_, options.l2_cache_bytes,
      [this](IoContext ctx, uint64_t i, std::byte* to) { return load_l2_slice(ctx, i, to); });
  refcounts_ = std::make_unique<TableCache>(
      slice_bytes, reftable_.size() * (cluster_size_ / slice_bytes), options.refcount_cache_bytes,
      [this](IoContext ctx, uint64_t i, std::byte* to) { return load_refcount_slice(ctx, i, to); });
  if (options.registry != nullptr) {
    SPILLWAY_CO_CHECK(l2_->enrol(*options.registry, "qcow2-l2:" + name()));
    if (!read_only_) SPILLWAY_CO_CHECK(refcounts_->enrol(*options.registry, "qcow2-refcount:" + name()));
    decompressed_shrinker_ = options.registry->alloc(reclaim::ShrinkerFlags::kNoBlock, "qcow2-decompressed:" + name());
    if (!decompressed_shrinker_) co_return fail(ErrorKind::kNoMemory, "no shrinker left");
    decompressed_shrinker_.set_count([this](const reclaim::ScanRequest&) {
      std::lock_guard lock(decompressed_mutex_);
      if (decompressed_.empty()) return reclaim::CountReport::empty();
      reclaim::CountReport r;
      r.objects = decompressed_.size();
      r.bytes = r.objects * cluster_size_;
      return r;
    });
    decompressed_shrinker_.set_scan([this](const reclaim::ScanRequest& q) {
      std::lock_guard lock(decompressed_mutex_);
      reclaim::ScanReport r;
      for (; r.scanned < q.nr_to_scan && !decompressed_.empty(); ++r.scanned) {
        decompressed_index_.erase(decompressed_.back().entry);
        decompressed_.pop_back();
        ++r.freed_objects;
        r.freed_bytes += cluster_size_;
      }
      r.status = decompressed_.empty() ? reclaim::ScanStatus::kEmpty : reclaim::ScanStatus::kProgress;
      return r;
    });
    if (decompressed_shrinker_.register_() != reclaim::Errc::kOk)
      co_return fail(ErrorKind::kNoMemory, "a shrinker could not be registered");
  }
  if (!read_only_) SPILLWAY_CO_CHECK(co_await prepare_writing(options.log_fd));
  co_return Status{};
}

Task<Status> Qcow2Image::prepare_writing(int log_fd) {
  // What was never written since the file grew reads as zeros; what is inside the file now may be anything.
  zero_frontier_ = align_up(file_.size(), cluster_size_);
  compressed_end_ = 0;
  SPILLWAY_CO_CHECK(co_await ensure_file(zero_frontier_));
  if (header_.external_data() && data_.size() < align_up(size(), cluster_size_)) {
    const uint64_t want = align_up(size(), std::max<uint64_t>(cluster_size_, data_.volume().geometry().block_size));
    SPILLWAY_CO_CHECK(co_await data_.volume().resize(want));
  }
  // Autoclear bits of features that we do not keep up to date: cleared before anything changes.
  const uint64_t keep = header_.autoclear & kRawExternalData;
  if (header_.version >= 3 && keep != header_.autoclear) {
    std::byte b[8];
    store64(b, keep);
    SPILLWAY_CO_CHECK(co_await write_field(kFieldAutoclear, b, 8));
    SPILLWAY_CO_CHECK(co_await file_.volume().flush(IoContext{}));
    header_.autoclear = keep;
  }
  if (log_fd < 0) co_return Status{};
  SPILLWAY_CO_TRY(log_, TableLog::open(log_fd));
  const std::vector<TableLog::Record> records = log_->records();
  if (!records.empty()) SPILLWAY_CO_CHECK(co_await replay(records));
  co_return Status{};
}

// Takes over what a predecessor had acknowledged and not written when it was killed: as if we had made these changes,
// now in memory and on disk with the next flush cycle. An interrupted cycle may have written any part of them before.
Task<Status> Qcow2Image::replay(const std::vector<TableLog::Record>& records) {
  std::unordered_map<uint64_t, TableLog::Record> last;
  for (const TableLog::Record& r : records) last[r.where] = r;
  co_await owner_.lock();
  Status s = co_await replay_tables(last);
  if (s) s = co_await replay_entries(last);
  owner_.unlock();
  if (!s) co_return s;
  log(LogLevel::kInfo, "qcow2", "{}: {} changes taken over from a predecessor", name(), last.size());
  s = co_await flush_cycle(IoContext{});
  // The changes are in memory and in the log still; the guest's flush will try again.
  if (!s) log(LogLevel::kWarn, "qcow2", "{}: {}", prefix_, s.error().message());
  else log_->clear();
  co_return Status{};
}

// Counts first: nothing may be given out that the log names.
Task<Status> Qcow2Image::replay_tables(const std::unordered_map<uint64_t, TableLog::Record>& last) {
  for (auto& [where, r] : last) {
    const uint64_t host = r.entry & kOffsetMask;
    if ((where & TableLog::kL1Record) == 0) {
      if ((r.entry & kCompressed) == 0 && host != 0 && !header_.external_data())
        SPILLWAY_CO_CHECK(co_await count_once(host >> cluster_bits_));
      continue;
    }
    const uint64_t index = where & ~TableLog::kL1Record, old = l1_.load()->get(index);
    if (index >= header_.l1_size || host == 0 || !is_aligned(host, cluster_size_) ||
        host + cluster_size_ > align_up(file_.size(), cluster_size_))
      co_return fail(ErrorKind::kCorrupt, fmt::format("the log's L2 table {} at {} does not fit the image", index, host));
    if (old == r.entry) continue;
    SPILLWAY_CO_CHECK(claim_metadata("the log's L2 table", host, cluster_size_));
    SPILLWAY_CO_CHECK(co_await count_once(host >> cluster_bits_));
    l1_.load()->entries[index].store(r.entry, std::memory_order_release);
    dirty_l1_.insert(index / 64);
    unstable_.fetch_add(1, std::memory_order_release);
    if ((old & kOffsetMask) != 0) {
      drop_metadata(old & kOffsetMask, cluster_size_);
      defer_free(old & kOffsetMask, cluster_size_);
    }
  }
  co_return Status{};
}

Task<Status> Qcow2Image::replay_entries(const std::unordered_map<uint64_t, TableLog::Record>& last) {
  TableLog::Room in_log;  // they are in it already
  for (auto& [where, r] : last) {
    if ((where & TableLog::kL1Record) != 0) continue;
    std::string why;
    if (l1_index(where) >= header_.l1_size || check_entry(r.entry, r.bitmap, where << cluster_bits_, &why) == kBadEntry)
      co_return fail(ErrorKind::kCorrupt, "the log does not fit the image: " + why);
    SPILLWAY_CO_TRY(SlicePin slice, co_await l2_->get(metadata(IoContext{}), slice_of(where)));
    uint64_t entry = 0, bitmap = 0;
    read_entry(slice.get(), where, &entry, &bitmap);
    if (entry == r.entry && bitmap == r.bitmap) continue;
    if (entry == kBadEntry) co_return bad_entry(where << cluster_bits_);
    write_entry(slice.get(), where, r.entry, r.bitmap, in_log);
    const bool kept = ((entry ^ r.entry) & (kOffsetMask | kCompressed)) == 0 && (entry & kCompressed) == 0;
    if (!kept) release_entry(entry);
    l2_->mark_dirty(slice);
  }
  co_return Status{};
}

Task<Status> Qcow2Image::count_once(uint64_t cluster) {
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  const uint64_t block = cluster / header_.refblock_entries();
  if (block >= reftable_.size())
    co_return fail(ErrorKind::kCorrupt, fmt::format("the log's cluster at {} has no refcount", cluster << cluster_bits_));
  // The block was made, but no cycle has named it: nothing but the log names what it counts. It has one place only.
  if (reftable_[block] == 0) SPILLWAY_CO_CHECK(co_await add_refblock(IoContext{}, block));
  SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(IoContext{}, cluster));
  if (get_refcount(pin->bytes(), cluster % per_slice, header_.refcount_order) != 0) co_return Status{};
  set_refcount(pin->bytes(), cluster % per_slice, header_.refcount_order, 1);
  refcounts_->mark_dirty(pin);
  co_return Status{};
}

Task<Result<VolumePtr>> Qcow2Image::open(std::string name, VolumePtr file, Qcow2Options options) {
  if (!options.snapshot.empty()) options.read_only = true;
  const MemberIo io(file);
  SPILLWAY_CO_TRY(Header h, co_await read_header(name, io));
  const bool read_only = options.read_only;
  if (!read_only && file->geometry().read_only)
    co_return fail(ErrorKind::kReadOnly, fmt::format("qcow2 {}: its file {} is read-only", name, file->name()));
  if (!read_only && (h.incompatible & kCorrupt) != 0)
    co_return fail(ErrorKind::kCorrupt,
                   fmt::format("qcow2 {}: is marked corrupt; it can be read, or repaired with image check", name));
  // Without a backing file or data file at hand nothing must be written that depends on it.
  VolumePtr backing, data = file;
  if (h.external_data()) {
    data = options.data_file;
    if (data == nullptr && h.data_file.empty())
      co_return fail(ErrorKind::kInvalid, fmt::format("qcow2 {}: has an external data file, but no name for it", name));
    if (data == nullptr && !options.resolver)
      co_return fail(ErrorKind::kPermission, fmt::format("qcow2 {}: external data file not allowed here", name));
    if (data == nullptr) {
      ImageReference ref{ImageReference::Role::kDataFile, h.data_file, "raw", !read_only};
      Result<VolumePtr> r = co_await options.resolver(std::move(ref));
      if (!r) co_return fail(std::move(r).error().with_context(fmt::format("qcow2 {}: data file", name)));
      data = std::move(*r);
    }
    if (!read_only && data->geometry().read_only)
      co_return fail(ErrorKind::kReadOnly, fmt::format("qcow2 {}: its data file {} is read-only", name, data->name()));
  }
  if (!h.backing_file.empty() && !options.ignore_backing) {
    backing = options.backing;
    if (backing == nullptr && !options.resolver)
      co_return fail(ErrorKind::kPermission, fmt::format("qcow2 {}: backing file not allowed here", name));
    if (backing == nullptr) {
      ImageReference ref{ImageReference::Role::kBacking, h.backing_file, h.backing_format, false};
      Result<VolumePtr> r = co_await options.resolver(std::move(ref));
      if (!r) co_return fail(std::move(r).error().with_context(fmt::format("qcow2 {}: backing file", name)));
      backing = std::move(*r);
    }
  }
  if (!read_only && (h.incompatible & kDirty) != 0) {
    // The refcounts are behind: rebuilt from the tables before anything is allocated.
    Result<Qcow2CheckReport> report = co_await check_qcow2(file, Qcow2Repair::kAllOrNothing);
    if (!report) co_return fail(std::move(report).error());
    if (report->errors > 0)
      co_return fail(ErrorKind::kCorrupt, fmt::format("qcow2 {}: dirty, and {} errors could not be repaired: {}", name,
                                                      report->errors, report->lines.empty() ? "" : report->lines[0]));
    log(LogLevel::kWarn, "qcow2", "{}: was not closed; refcounts rebuilt ({} corrected, {} leaks)", name,
        report->errors_fixed, report->leaks_fixed);
    SPILLWAY_CO_TRY(h, co_await read_header(name, io));
  }
  const Geometry g = geometry_for(h, *file, read_only);
  const uint64_t size = align_down(h.size, 512);
  std::shared_ptr<Qcow2Image> image(new Qcow2Image(name, size, g, std::move(h), file, options));
  image->data_ = image->header_.external_data() ? MemberIo(std::move(data)) : image->file_;
  if (backing != nullptr) image->backing_ = MemberIo(std::move(backing));
  Status s = co_await image->load(options);
  if (!s) co_return fail(std::move(s).error().with_context("qcow2 " + name));
  VolumePtr out = std::move(image);
  co_return out;
}

}  // namespace spillway::qcow2

namespace spillway {

Task<Result<VolumePtr>> open_qcow2(std::string name, VolumePtr file, Qcow2Options options) {
  return qcow2::Qcow2Image::open(std::move(name), std::move(file), std::move(options));
}

}  // namespace spillway
