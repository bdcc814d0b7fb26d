// Checking and repairing an image that nobody has open. Counts every reference from header, tables and snapshots and
// compares with the refcounts on disk.
//
// Repair never patches refcounts: it writes a whole new refcount structure behind the last cluster in use and switches
// with one write of the header's first sector. Until then nothing that the image refers to has changed.
#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include <fmt/core.h>

#include "src/image/member_io.h"
#include "src/image/qcow2.h"
#include "src/image/qcow2_format.h"

namespace spillway {
namespace qcow2 {
namespace {

// Counts by cluster; memory only where there is something.
class Counts {
 public:
  uint64_t get(uint64_t cluster) const {
    auto it = pages_.find(cluster / kPage);
    return it == pages_.end() ? 0 : (*it->second)[cluster % kPage];
  }
  void add(uint64_t cluster, int64_t n) {
    auto& page = pages_[cluster / kPage];
    if (page == nullptr) page = std::make_unique<std::array<uint32_t, kPage>>();
    (*page)[cluster % kPage] += static_cast<uint32_t>(n);
    if (n > 0) end_ = std::max(end_, cluster + 1);
  }
  template <class Fn>
  void each(Fn fn) const {
    for (auto& [page, counts] : pages_)
      for (uint64_t i = 0; i < kPage; ++i)
        if ((*counts)[i] != 0) fn(page * kPage + i, (*counts)[i]);
  }
  uint64_t end() const { return end_; }  // one past the highest that was ever counted
  bool any(uint64_t first, uint64_t n) const {
    for (uint64_t c = first; c < first + n && c < end_; ++c)
      if (get(c) != 0) return true;
    return false;
  }

 private:
  static constexpr uint64_t kPage = 4096;
  std::unordered_map<uint64_t, std::unique_ptr<std::array<uint32_t, kPage>>> pages_;
  uint64_t end_ = 0;
};

class Checker {
 public:
  explicit Checker(VolumePtr file) : io_(std::move(file)) { ctx_.io_class = IoClass::kMetadata; }

  Task<Status> open();
  // Counts, and compares; fills the report.
  Task<Status> run();
  // Writes what run() has found to be true.
  Task<Status> repair();
  bool dirty() const { return (h_.incompatible & kDirty) != 0; }
  bool corrupt() const { return (h_.incompatible & kCorrupt) != 0; }
  Qcow2CheckReport report;
  // Errors that a new refcount structure and right flags do not cure.
  uint64_t structural = 0;
  uint64_t mismatched = 0, wrong_flags = 0;

 private:
  void note(std::string line) {
    if (report.lines.size() < 100) report.lines.push_back(std::move(line));
  }
  void error(std::string line) {
    ++structural;
    note("ERROR " + std::move(line));
  }
  uint64_t end() const { return align_up(io_.size(), h_.cluster_size()); }
  bool count(const std::string& what, uint64_t offset, uint64_t length, bool aligned);
  Task<Status> count_l1(std::string who, uint64_t offset, uint64_t entries);
  Task<Status> count_l2(const std::string& who, uint64_t index, uint64_t table);
  void check_l2_entry(const std::string& who, uint64_t entry, uint64_t bitmap, uint64_t guest);
  Task<Status> write_entry(uint64_t at, uint64_t value);
  Task<Status> count_refcounts();
  Task<Status> compare();
  void judge_overlaps();
  Task<Status> judge_flags(bool repair);
  Task<Status> judge_flag(uint64_t entry, uint64_t at, bool repair);
  Task<Status> write_refcounts();

  MemberIo io_;
  IoContext ctx_;
  Header h_;
  Counts counts_;
  std::vector<uint64_t> reftable_;
  std::vector<std::pair<std::string, uint64_t>> alone_;  // tables whose clusters nothing else may refer to
  Counts l2_tables_;  // snapshots may share these, with each other and with nothing else
  uint64_t last_host_ = 0;
};

Task<Status> Checker::open() {
  std::vector<std::byte> bytes(4096);
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, 0, bytes.data(), bytes.size()));
  const uint64_t need = header_bytes_needed(bytes);
  if (need > bytes.size()) {
    bytes.resize(need);
    SPILLWAY_CO_CHECK(co_await io_.read(ctx_, 0, bytes.data(), bytes.size()));
  }
  Result<Header> h = parse_header(bytes, align_up(io_.size(), need == 0 ? 512 : need));
  if (!h) co_return fail(std::move(h).error().with_context("qcow2 " + io_.volume().name()));
  h_ = std::move(*h);
  co_return Status{};
}

// False: not counted, since it makes no sense.
bool Checker::count(const std::string& what, uint64_t offset, uint64_t length, bool aligned) {
  if (aligned && !is_aligned(offset, h_.cluster_size())) {
    error(fmt::format("{} at {:#x}: not on a cluster boundary", what, offset));
    return false;
  }
  if (offset >= end() || align_up(length, aligned ? h_.cluster_size() : 1) > end() - offset) {
    error(fmt::format("{} at {:#x}: beyond the end of the file", what, offset));
    return false;
  }
  for (uint64_t c = offset >> h_.cluster_bits; c << h_.cluster_bits < offset + length; ++c) counts_.add(c, 1);
  return true;
}

void Checker::check_l2_entry(const std::string& who, uint64_t entry, uint64_t bitmap, uint64_t guest) {
  const std::string what = fmt::format("{}L2 entry for offset {:#x}", who, guest);
  if ((entry & kCompressed) != 0) {
    const CompressedSpan span = compressed_span(entry, h_.cluster_bits);
    if ((entry & kCopied) != 0) error(fmt::format("{}: compressed and marked as copied", what));
    const uint64_t begin = align_down(span.offset, 512);
    if (count(what, begin, std::min(span.offset + span.length - begin, end() - std::min(end(), begin)), false)) {
      if (who.empty()) ++report.clusters_compressed;
      if (who.empty()) ++report.clusters_allocated;
    }
    return;
  }
  const uint64_t reserved = kL2Reserved | (h_.extended_l2() || h_.version < 3 ? kZeroFlag : 0);
  if ((entry & reserved) != 0) error(fmt::format("{} ({:#x}): reserved bits are set", what, entry));
  if (h_.extended_l2() && (bitmap & (bitmap >> 32) & 0xffffffff) != 0)
    error(fmt::format("{}: subclusters both allocated and zero", what));
  const uint64_t host = entry & kOffsetMask;
  if (h_.external_data()) {
    if ((host != 0 || (entry & kCopied) != 0) && host != guest) error(fmt::format("{}: external data elsewhere", what));
    if (who.empty() && (entry & kCopied) != 0) ++report.clusters_allocated;
    return;
  }
  if (host == 0) {
    if (h_.extended_l2() && (bitmap & 0xffffffff) != 0) error(fmt::format("{}: subclusters without a cluster", what));
    return;
  }
  if (!count(what, host, h_.cluster_size(), true)) return;
  if (!who.empty()) return;  // a snapshot's: the figures are of the active state
  ++report.clusters_allocated;
  if (last_host_ != 0 && host != last_host_ + h_.cluster_size()) ++report.clusters_fragmented;
  last_host_ = host;
}

Task<Status> Checker::count_l2(const std::string& who, uint64_t index, uint64_t table) {
  std::vector<std::byte> raw(h_.cluster_size());
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, table, raw.data(), raw.size()));
  const uint64_t size = h_.l2_entry_size();
  for (uint64_t i = 0; i < h_.l2_entries(); ++i) {
    const uint64_t entry = load64(&raw[i * size]), bitmap = h_.extended_l2() ? load64(&raw[i * size + 8]) : 0;
    if (entry == 0 && bitmap == 0) continue;
    check_l2_entry(who, entry, bitmap, (index * h_.l2_entries() + i) << h_.cluster_bits);
  }
  co_return Status{};
}

Task<Status> Checker::count_l1(std::string who, uint64_t offset, uint64_t entries) {
  if (entries == 0) co_return Status{};
  if (!count(who + "L1 table", offset, entries * 8, true)) co_return Status{};
  for (uint64_t c = offset; c < offset + entries * 8; c += h_.cluster_size())
    alone_.emplace_back(who + "L1 table", c >> h_.cluster_bits);
  std::vector<std::byte> raw(entries * 8);
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, offset, raw.data(), raw.size()));
  std::unordered_set<uint64_t> seen;
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t e = load64(&raw[i * 8]), table = e & kOffsetMask;
    if ((e & kL1Reserved) != 0) error(fmt::format("{}L1 entry {} ({:#x}): reserved bits are set", who, i, e));
    if (table == 0) continue;
    const std::string what = fmt::format("{}L2 table {}", who, i);
    if (!seen.insert(table).second) {
      error(fmt::format("{} at {:#x} is used twice", what, table));
      continue;
    }
    if (!count(what, table, h_.cluster_size(), true)) continue;
    l2_tables_.add(table >> h_.cluster_bits, 1);
    SPILLWAY_CO_CHECK(co_await count_l2(who, i, table));
  }
  co_return Status{};
}

Task<Status> Checker::count_refcounts() {
  count("refcount table", h_.reftable_offset, uint64_t{h_.reftable_clusters} << h_.cluster_bits, true);
  std::vector<std::byte> raw(h_.reftable_entries() * 8);
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, h_.reftable_offset, raw.data(), raw.size()));
  reftable_.assign(h_.reftable_entries(), 0);
  std::unordered_set<uint64_t> seen;
  for (uint64_t i = 0; i < reftable_.size(); ++i) {
    const uint64_t at = load64(&raw[i * 8]);
    if (at == 0) continue;
    // A block that can not be read counts nothing: a new structure cures that.
    if ((at & kRefTableReserved) != 0 || !is_aligned(at, h_.cluster_size()) || at >= end() || !seen.insert(at).second) {
      ++mismatched;
      note(fmt::format("ERROR refcount block {} at {:#x} is unusable", i, at));
      continue;
    }
    counts_.add(at >> h_.cluster_bits, 1);
    reftable_[i] = at;
  }
  co_return Status{};
}

Task<Status> Checker::compare() {
  const uint64_t per_block = h_.refblock_entries();
  const uint64_t clusters = end() >> h_.cluster_bits;
  auto one = [&](uint64_t c, uint64_t have) {
    const uint64_t want = counts_.get(c);
    if (have == want) return;
    if (have < want) {
      ++mismatched;
      note(fmt::format("ERROR cluster {} refcount={} reference={}", c, have, want));
    } else {
      ++report.leaks;
      note(fmt::format("Leaked cluster {} refcount={} reference={}", c, have, want));
    }
  };
  std::vector<std::byte> raw(h_.cluster_size());
  for (uint64_t b = 0; b < reftable_.size(); ++b) {
    const uint64_t first = b * per_block;
    if (reftable_[b] == 0) {
      if (first < counts_.end() && counts_.any(first, per_block))
        for (uint64_t c = first; c < first + per_block && c < counts_.end(); ++c) one(c, 0);
      continue;
    }
    SPILLWAY_CO_CHECK(co_await io_.read(ctx_, reftable_[b], raw.data(), raw.size()));
    for (uint64_t i = 0; i < per_block; ++i) one(first + i, get_refcount(raw.data(), i, h_.refcount_order));
  }
  for (uint64_t c = reftable_.size() * per_block; c < counts_.end(); ++c) one(c, 0);
  report.clusters_total = (h_.size + h_.cluster_size() - 1) >> h_.cluster_bits;
  report.image_end = std::min(counts_.end(), clusters) << h_.cluster_bits;
  co_return Status{};
}

// What a table shares with data or another table can not be told by counts: two owners are counted as two. Overlaps of
// the refcount structure itself are counts that differ; a new structure cures them.
void Checker::judge_overlaps() {
  for (auto& [what, cluster] : alone_)
    if (counts_.get(cluster) > 1)
      error(fmt::format("{} at {:#x} overlaps something else", what, cluster << h_.cluster_bits));
  l2_tables_.each([&](uint64_t cluster, uint64_t n) {
    if (counts_.get(cluster) != n)
      error(fmt::format("L2 table at {:#x} overlaps something else", cluster << h_.cluster_bits));
  });
}

// "Copied" must stand exactly where the count is one, in the active state. A second reading: remembering every entry
// would take three times the memory of the tables.
Task<Status> Checker::judge_flags(bool repair) {
  std::vector<std::byte> l1(uint64_t{h_.l1_size} * 8), l2(h_.cluster_size());
  if (l1.empty()) co_return Status{};
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, h_.l1_offset, l1.data(), l1.size()));
  for (uint64_t i = 0; i < h_.l1_size; ++i) {
    const uint64_t e = load64(&l1[i * 8]), table = e & kOffsetMask;
    if (l2_tables_.get(table >> h_.cluster_bits) == 0 || table == 0) continue;  // none, or none that makes sense
    SPILLWAY_CO_CHECK(co_await judge_flag(e, h_.l1_offset + i * 8, repair));
    if (h_.external_data()) continue;
    SPILLWAY_CO_CHECK(co_await io_.read(ctx_, table, l2.data(), l2.size()));
    for (uint64_t k = 0; k < h_.l2_entries(); ++k) {
      const uint64_t entry = load64(&l2[k * h_.l2_entry_size()]);
      if ((entry & kCompressed) == 0) SPILLWAY_CO_CHECK(co_await judge_flag(entry, table + k * h_.l2_entry_size(), repair));
    }
  }
  if (repair && wrong_flags > 0) SPILLWAY_CO_CHECK(co_await io_.volume().flush(ctx_));
  co_return Status{};
}

Task<Status> Checker::judge_flag(uint64_t entry, uint64_t at, bool repair) {
  const uint64_t host = entry & kOffsetMask, n = counts_.get(host >> h_.cluster_bits);
  // Places that make no sense are errors of their own.
  const bool wrong = host != 0 && is_aligned(host, h_.cluster_size()) && host < end() && ((entry & kCopied) != 0) != (n == 1);
  if (!wrong) return Task<Status>::ready({});
  if (!repair) {
    ++wrong_flags;
    note(fmt::format("ERROR OFLAG_COPIED of the entry {:#x} at {:#x}: refcount is {}", entry, at, n));
    return Task<Status>::ready({});
  }
  return write_entry(at, entry ^ kCopied);
}

Task<Status> Checker::write_entry(uint64_t at, uint64_t value) {
  std::byte b[8];
  store64(b, value);
  co_return co_await io_.write(ctx_, at, b, 8);
}

Task<Status> Checker::run() {
  counts_.add(0, 1);
  alone_.emplace_back("header", 0);
  SPILLWAY_CO_CHECK(co_await count_l1("", h_.l1_offset, h_.l1_size));
  if (h_.snapshots > 0) {
    const uint64_t have = end() - std::min(end(), h_.snapshots_offset);
    std::vector<std::byte> raw(std::min(have, kMaxSnapshotBytes));
    SPILLWAY_CO_CHECK(co_await io_.read(ctx_, h_.snapshots_offset, raw.data(), raw.size()));
    uint64_t used = 0;
    Result<std::vector<Snapshot>> list = parse_snapshots(raw, h_, &used);
    if (!list) co_return std::unexpected(std::move(list).error());
    if (count("snapshot table", h_.snapshots_offset, used, true))
      for (uint64_t at = 0; at < used; at += h_.cluster_size())
        alone_.emplace_back("snapshot table", (h_.snapshots_offset + at) >> h_.cluster_bits);
    for (const Snapshot& s : *list)
      SPILLWAY_CO_CHECK(co_await count_l1(fmt::format("snapshot {}: ", s.id), s.l1_offset, s.l1_size));
  }
  judge_overlaps();
  SPILLWAY_CO_CHECK(co_await judge_flags(false));
  SPILLWAY_CO_CHECK(co_await count_refcounts());
  SPILLWAY_CO_CHECK(co_await compare());
  report.errors = structural + mismatched + wrong_flags;
  co_return Status{};
}

Task<Status> Checker::write_refcounts() {
  const uint64_t cs = h_.cluster_size(), per_block = h_.refblock_entries();
  const uint64_t start = counts_.end();
  std::vector<uint64_t> used;  // blocks that count something below `start`
  for (uint64_t b = 0; b * per_block < start; ++b)
    if (counts_.any(b * per_block, per_block)) used.push_back(b);
  uint64_t table = 1, blocks = used.size();
  for (;;) {
    const uint64_t all = start + table + blocks;
    // The new clusters lie behind `start`: the blocks from there on are needed whatever they counted before.
    uint64_t want = 0;
    for (uint64_t b : used) want += b < start / per_block;
    want += (all + per_block - 1) / per_block - start / per_block;
    const uint64_t want_table = ((all + per_block - 1) / per_block * 8 + cs - 1) / cs;
    if (want <= blocks && want_table <= table) break;
    blocks = std::max(blocks, want);
    table = std::max(table, want_table);
  }
  if (table * cs > kMaxRefTableBytes) co_return fail(ErrorKind::kNoSpace, "qcow2: the refcount table would be too large");
  uint64_t all = start + table + blocks;
  for (uint64_t c = start; c < all; ++c) counts_.add(c, 1);
  // The estimate is never too small; what it has too much is taken back from the end.
  for (;;) {
    uint64_t needed = 0;
    for (uint64_t b = 0; b * per_block < all; ++b) needed += counts_.any(b * per_block, per_block);
    if (start + table + needed >= all) break;
    counts_.add(--all, -1);
  }
  const uint64_t bytes = all * cs;
  if (io_.size() < bytes)
    SPILLWAY_CO_CHECK(co_await io_.volume().resize(align_up(bytes, io_.volume().geometry().block_size)));

  const uint64_t max = h_.refcount_order == 6 ? ~uint64_t{0} : (uint64_t{1} << h_.refcount_bits()) - 1;
  std::vector<std::byte> raw_table(table * cs), raw(cs);
  uint64_t next = start + table;
  for (uint64_t b = 0; b * per_block < all; ++b) {
    if (!counts_.any(b * per_block, per_block)) continue;
    SPILLWAY_ASSERT(next < all);
    std::fill(raw.begin(), raw.end(), std::byte{0});
    for (uint64_t i = 0; i < per_block && b * per_block + i < all; ++i) {
      const uint64_t n = counts_.get(b * per_block + i);
      if (n > max)
        co_return fail(ErrorKind::kCorrupt, fmt::format("qcow2: cluster {} is used {} times, more than can be counted",
                                                        b * per_block + i, n));
      if (n > 0) set_refcount(raw.data(), i, h_.refcount_order, n);
    }
    store64(&raw_table[b * 8], next * cs);
    SPILLWAY_CO_CHECK(co_await io_.write(ctx_, next * cs, raw.data(), cs));
    ++next;
  }
  SPILLWAY_CO_CHECK(co_await io_.write(ctx_, start * cs, raw_table.data(), raw_table.size()));
  SPILLWAY_CO_CHECK(co_await io_.volume().flush(ctx_));
  std::byte sector[512];
  SPILLWAY_CO_CHECK(co_await io_.read(ctx_, 0, sector, sizeof sector));
  store64(sector + kFieldRefTable, start * cs);
  store32(sector + kFieldRefTable + 8, static_cast<uint32_t>(table));
  if (h_.version >= 3) {
    uint64_t bits = h_.incompatible & ~uint64_t{kDirty};
    if (structural == 0) bits &= ~uint64_t{kCorrupt};
    store64(sector + kFieldIncompatible, bits);
  }
  SPILLWAY_CO_CHECK(co_await io_.write(ctx_, 0, sector, sizeof sector));
  co_return co_await io_.volume().flush(ctx_);
}

Task<Status> Checker::repair() {
  // The old refcount structure is not referred to any more.
  for (uint64_t c = 0; c < h_.reftable_clusters; ++c) counts_.add((h_.reftable_offset >> h_.cluster_bits) + c, -1);
  for (uint64_t at : reftable_)
    if (at != 0) counts_.add(at >> h_.cluster_bits, -1);
  if (wrong_flags > 0) SPILLWAY_CO_CHECK(co_await judge_flags(true));
  co_return co_await write_refcounts();
}

}  // namespace
}  // namespace qcow2

Task<Result<Qcow2CheckReport>> check_qcow2(VolumePtr file, Qcow2Repair repair) {
  if (repair != Qcow2Repair::kNone && file->geometry().read_only)
    co_return fail(ErrorKind::kReadOnly, fmt::format("qcow2 {}: its file is read-only", file->name()));
  qcow2::Checker first(file);
  SPILLWAY_CO_CHECK(co_await first.open());
  SPILLWAY_CO_CHECK(co_await first.run());
  if (repair == Qcow2Repair::kAllOrNothing && first.structural > 0) co_return std::move(first.report);
  const bool wants = repair == Qcow2Repair::kAll || repair == Qcow2Repair::kAllOrNothing
                         ? first.report.errors > 0 || first.report.leaks > 0 || first.dirty() || first.corrupt()
                         : repair == Qcow2Repair::kLeaks && first.report.leaks > 0 && first.report.errors == 0;
  if (!wants) co_return std::move(first.report);
  SPILLWAY_CO_CHECK(co_await first.repair());
  qcow2::Checker again(file);
  SPILLWAY_CO_CHECK(co_await again.open());
  SPILLWAY_CO_CHECK(co_await again.run());
  again.report.errors_fixed = first.report.errors - std::min(first.report.errors, again.report.errors);
  again.report.leaks_fixed = first.report.leaks - std::min(first.report.leaks, again.report.leaks);
  for (std::string& line : first.report.lines) again.report.lines.push_back("(before) " + std::move(line));
  co_return std::move(again.report);
}

std::string check_to_text(const Qcow2CheckReport& r) {
  std::string t;
  for (const std::string& line : r.lines) t += line + "\n";
  if (r.errors_fixed + r.leaks_fixed > 0)
    t += fmt::format("Repaired: {} errors, {} leaks.\n", r.errors_fixed, r.leaks_fixed);
  if (r.errors == 0 && r.leaks == 0) t += "No errors were found on the image.\n";
  if (r.errors > 0) t += fmt::format("{} errors were found on the image.\n", r.errors);
  if (r.leaks > 0) t += fmt::format("{} leaked clusters were found on the image.\n", r.leaks);
  const double total = static_cast<double>(std::max<uint64_t>(1, r.clusters_total));
  t += fmt::format("{}/{} = {:.2f}% allocated, {:.2f}% fragmented, {:.2f}% compressed clusters\nImage end offset: {}\n",
                   r.clusters_allocated, r.clusters_total, 100.0 * static_cast<double>(r.clusters_allocated) / total,
                   100.0 * static_cast<double>(r.clusters_fragmented) /
                       static_cast<double>(std::max<uint64_t>(1, r.clusters_allocated)),
                   100.0 * static_cast<double>(r.clusters_compressed) /
                       static_cast<double>(std::max<uint64_t>(1, r.clusters_allocated)),
                   r.image_end);
  return t;
}

}  // namespace spillway
