// The flush cycle: the only writer of refcount slices, L2 slices and L1 entries. Stages, each stable before the next:
//
//   0  only when there is a new refcount block, which was written before                flush
//   1  refcounts, reftable entries (and data, new tables that were written before)      then flush
//   2  L2 slices and L1 entries, as they were when stage 1 began                       then flush
//   3  clusters that nothing names any more on disk: wait for requests that may use them, punch, count down (in memory;
//      on disk with the next cycle)
//
// So what an L2 entry on disk names is counted and complete on disk. A crash in between leaves clusters that are
// counted and unused. With lazy refcounts stage 1 leaves the refcounts out: the dirty bit says so.
//
// Flushes that arrive while a cycle runs share the next one.
#include <algorithm>
#include <cstring>
#include <map>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/image/qcow2_image.h"

namespace spillway::qcow2 {

// Copies of what stage 1 and 2 write, made at one moment under owner_.
struct Qcow2Image::Cycle {
  std::vector<SlicePin> refcounts, l2;
  std::vector<Piece> stage1, stage2;
  std::unordered_set<uint64_t> l1, reftable;
  std::vector<Free> frees;
  uint64_t unstable = 0;
};

bool Qcow2Image::tables_dirty() const { return unstable_.load(std::memory_order_acquire) != 0; }

Task<Status> Qcow2Image::flush_data(IoContext ctx) {
  ctx.fua = false;
  if (header_.external_data()) SPILLWAY_CO_CHECK(co_await data_.volume().flush(ctx));
  co_return co_await file_.volume().flush(ctx);
}

Task<Status> Qcow2Image::do_flush(IoContext ctx) {
  if (read_only_) return Task<Status>::ready({});
  // Everything that was acknowledged before we were called is in unstable_ if it touched a table.
  if (!tables_dirty()) {
    if (!header_.external_data()) return file_.volume().flush(ctx);
    return flush_data(ctx);
  }
  return flush_cycle(ctx);
}

Task<Status> Qcow2Image::flush_cycle(IoContext ctx) {
  const uint64_t me = flush_arrivals_.fetch_add(1, std::memory_order_acq_rel) + 1;
  co_await flush_mutex_.lock();
  if (flush_covered_ >= me) {
    // A cycle began after we came and has ended.
    Status s = flush_status_;
    flush_mutex_.unlock();
    co_return s;
  }
  const uint64_t covers = flush_arrivals_.load(std::memory_order_acquire);
  stat_cycles_.fetch_add(1, std::memory_order_relaxed);
  Cycle c;
  co_await owner_.lock();
  Status s = co_await collect(ctx, c);
  owner_.unlock();
  if (s) s = co_await write_tables(ctx, c);
  if (!s) {
    co_await owner_.lock();
    restore(c);
    owner_.unlock();
  } else {
    s = co_await release_frees(ctx, std::move(c.frees));
    unstable_.fetch_sub(c.unstable, std::memory_order_release);
  }
  c.refcounts.clear();
  c.l2.clear();
  flush_covered_ = covers;
  flush_status_ = s;
  flush_mutex_.unlock();
  co_return s;
}

Task<Status> Qcow2Image::collect(IoContext, Cycle& c) {
  c.unstable = unstable_.load(std::memory_order_acquire);
  cycle_wanted_ = false;
  const bool lazy = marked_dirty_ && !closed_.load(std::memory_order_relaxed) &&
                    refcounts_->dirty() * refcounts_->slice_bytes() <= refcounts_->limit() / 2;
  auto copy = [](uint64_t at, const std::byte* from, uint64_t n) {
    Piece p{at, std::make_unique<std::byte[]>(n), n};
    std::memcpy(p.bytes.get(), from, n);
    return p;
  };
  if (!lazy) {
    const uint64_t bytes = refcounts_->slice_bytes(), per_block = cluster_size_ / bytes;
    c.refcounts = refcounts_->take_dirty();
    for (const SlicePin& s : c.refcounts)
      c.stage1.push_back(copy(reftable_[s->index / per_block] + s->index % per_block * bytes, s->bytes(), bytes));
  }
  c.reftable = std::move(dirty_reftable_);
  dirty_reftable_.clear();
  for (uint64_t block : c.reftable) {
    std::byte entry[8];
    store64(entry, reftable_[block]);
    c.stage1.push_back(copy(header_.reftable_offset + block * 8, entry, 8));
  }
  c.l2 = l2_->take_dirty();
  const uint64_t bytes = l2_->slice_bytes(), per_table = cluster_size_ / bytes;
  const L1Table* l1 = l1_.load();
  for (const SlicePin& s : c.l2) {
    const uint64_t table = l1->get(s->index / per_table) & kOffsetMask;
    SPILLWAY_ASSERT(table != 0);
    c.stage2.push_back(copy(table + s->index % per_table * bytes, s->bytes(), bytes));
  }
  // L1 entries in whole sectors. In memory is what may be on disk: every table named there has been written.
  c.l1 = std::move(dirty_l1_);
  dirty_l1_.clear();
  for (uint64_t piece : c.l1) {
    std::byte sector[512] = {};
    const uint64_t n = std::min<uint64_t>(64, header_.l1_size - piece * 64);
    for (uint64_t i = 0; i < n; ++i) store64(sector + i * 8, l1->get(piece * 64 + i));
    c.stage2.push_back(copy(header_.l1_offset + piece * 512, sector, n * 8));
  }
  c.frees = std::move(pending_free_);
  pending_free_.clear();
  if (log_ != nullptr) log_->begin_cycle();
  auto by_place = [](const Piece& a, const Piece& b) { return a.at < b.at; };
  std::sort(c.stage1.begin(), c.stage1.end(), by_place);
  std::sort(c.stage2.begin(), c.stage2.end(), by_place);
  co_return Status{};
}

// Neighbouring pieces go down in one request; a bounded number of requests at once.
Task<Status> Qcow2Image::write_pieces(IoContext ctx, const std::vector<Piece>& pieces) {
  for (size_t i = 0; i < pieces.size();) {
    std::vector<std::vector<iovec>> runs;
    std::vector<uint64_t> at;
    while (i < pieces.size() && runs.size() < 32) {
      std::vector<iovec> run;
      const uint64_t begin = pieces[i].at;
      for (uint64_t end = begin; i < pieces.size() && pieces[i].at == end && run.size() < 256; ++i) {
        run.push_back({pieces[i].bytes.get(), pieces[i].length});
        end += pieces[i].length;
      }
      runs.push_back(std::move(run));
      at.push_back(begin);
    }
    std::vector<Task<Status>> writes;
    for (size_t k = 0; k < runs.size(); ++k) writes.push_back(file_.write(metadata(ctx), at[k], Iov(runs[k])));
    Status s = co_await all_of(std::move(writes));
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> Qcow2Image::write_tables(IoContext ctx, Cycle& c) {
  ctx.fua = false;
  if (!c.reftable.empty()) SPILLWAY_CO_CHECK(co_await file_.volume().flush(ctx));
  SPILLWAY_CO_CHECK(co_await write_pieces(ctx, c.stage1));
  SPILLWAY_CO_CHECK(co_await flush_data(ctx));
  if (!c.stage2.empty()) {
    SPILLWAY_CO_CHECK(co_await write_pieces(ctx, c.stage2));
    SPILLWAY_CO_CHECK(co_await file_.volume().flush(ctx));
  }
  if (log_ != nullptr) log_->end_cycle();
  co_return Status{};
}

// A stage failed: everything is dirty again and goes with the next cycle.
void Qcow2Image::restore(Cycle& c) {
  for (const SlicePin& s : c.refcounts) refcounts_->mark_dirty(s);
  for (const SlicePin& s : c.l2) l2_->mark_dirty(s);
  dirty_l1_.insert(c.l1.begin(), c.l1.end());
  dirty_reftable_.insert(c.reftable.begin(), c.reftable.end());
  pending_free_.insert(pending_free_.begin(), c.frees.begin(), c.frees.end());
}

// The references are gone from the disk and, after the drain, from every request. Clusters that nobody else refers to
// are punched; only then are they counted down, and only then can they be given out again.
Task<Status> Qcow2Image::release_frees(IoContext ctx, std::vector<Free> frees) {
  if (frees.empty()) co_return Status{};
  co_await in_flight_.drain();
  co_await owner_.lock();
  Result<std::vector<uint64_t>> last = co_await last_references(ctx, frees);
  owner_.unlock();
  if (!last) co_return std::unexpected(std::move(last).error());
  // Not under owner_: they are counted still, so nobody takes them.
  const std::vector<uint64_t> zero = co_await punch(ctx, *last);
  co_await owner_.lock();
  Status first{};
  for (uint64_t c : zero)
    if (punched_.size() < kMaxPunched) punched_.insert(c);
  for (const Free& f : frees) {
    if (f.compressed != 0) decompressed_drop(f.compressed);
    const uint64_t end = align_up(f.host + f.length, cluster_size_) >> cluster_bits_;
    for (uint64_t c = f.host >> cluster_bits_; c < end; ++c) {
      Status s = co_await change_refcount(ctx, c, -1);
      if (!s && first) first = std::move(s);
      stat_freed_.fetch_add(1, std::memory_order_relaxed);
    }
  }
  unstable_.fetch_add(1, std::memory_order_release);  // the refcounts, for the next cycle
  owner_.unlock();
  co_return first;
}

// Clusters that are counted no more often than `frees` will count them down; in order.
Task<Result<std::vector<uint64_t>>> Qcow2Image::last_references(IoContext ctx, const std::vector<Free>& frees) {
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  std::map<uint64_t, uint64_t> down;
  for (const Free& f : frees) {
    const uint64_t end = align_up(f.host + f.length, cluster_size_) >> cluster_bits_;
    for (uint64_t c = f.host >> cluster_bits_; c < end; ++c) ++down[c];
  }
  std::vector<uint64_t> last;
  for (auto [c, n] : down) {
    const uint64_t block = c / header_.refblock_entries();
    if (block >= reftable_.size() || reftable_[block] == 0) continue;  // change_refcount says so
    SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(ctx, c));
    if (get_refcount(pin->bytes(), c % per_slice, header_.refcount_order) == n) last.push_back(c);
  }
  co_return last;
}

// Which of them (sorted) read as zeros afterwards, so that their next owner need not write zeros. What cannot be
// punched costs space, nothing else.
Task<std::vector<uint64_t>> Qcow2Image::punch(IoContext ctx, const std::vector<uint64_t>& clusters) {
  std::vector<uint64_t> zero;
  if (file_.volume().geometry().discard_granularity == 0) co_return zero;
  for (size_t i = 0; i < clusters.size();) {
    size_t n = 1;
    while (i + n < clusters.size() && clusters[i + n] == clusters[i] + n) ++n;
    const uint64_t at = clusters[i] << cluster_bits_, length = n << cluster_bits_;
    if (at + length <= file_.size()) {
      Status s = co_await file_.write_zeroes(metadata(ctx), at, length, true);
      if (s) zero.insert(zero.end(), clusters.begin() + static_cast<long>(i), clusters.begin() + static_cast<long>(i + n));
    }
    i += n;
  }
  co_return zero;
}

// ---- the header ----

Task<Status> Qcow2Image::write_field(uint64_t at, const void* value, uint64_t length) {
  co_return co_await file_.write(metadata(IoContext{}), at, value, length);
}

Task<Status> Qcow2Image::update_incompatible(uint64_t set, uint64_t clear) {
  auto guard = co_await header_mutex_.guard();
  const uint64_t bits = (header_.incompatible | set) & ~clear;
  std::byte b[8];
  store64(b, bits);
  SPILLWAY_CO_CHECK(co_await write_field(kFieldIncompatible, b, 8));
  SPILLWAY_CO_CHECK(co_await file_.volume().flush(metadata(IoContext{})));
  header_.incompatible = bits;
  co_return Status{};
}

// Says so on disk too (v3), once; the caller's request fails, and all writes from now on.
Task<Status> Qcow2Image::corruption(std::string what) {
  LOG_LIMITED(LogLevel::kError, "qcow2", "{}: {}{}", prefix_, what, read_only_ ? "" : "; marked corrupt");
  if (!read_only_ && !corrupt_.exchange(true, std::memory_order_acq_rel) && header_.version >= 3) {
    Status s = co_await update_incompatible(kCorrupt, 0);
    if (!s) log(LogLevel::kError, "qcow2", "{}: the corrupt bit could not be set: {}", prefix_, s.error().message());
  }
  co_return fail(ErrorKind::kCorrupt, fmt::format("{}: {}", prefix_, what));
}

// ---- size ----

Task<Status> Qcow2Image::grow_l1(uint64_t entries) {
  const uint64_t bytes = entries * 8, old_bytes = uint64_t{header_.l1_size} * 8;
  if (bytes > kMaxL1Bytes)
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: {} bytes are too large for its clusters of {}", prefix_,
                                                    entries * header_.bytes_per_l2(), cluster_size_));
  const IoContext ctx;
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  SPILLWAY_CO_TRY(const uint64_t host, co_await allocate_contiguous(ctx, align_up(bytes, cluster_size_) >> cluster_bits_));
  std::vector<std::byte> raw(align_up(bytes, cluster_size_));
  auto table = std::make_unique<L1Table>(entries);
  L1Table* old = l1_.load();
  for (uint64_t i = 0; i < entries; ++i) {
    table->entries[i].store(old->get(i), std::memory_order_relaxed);
    store64(&raw[i * 8], old->get(i));
  }
  SPILLWAY_CO_CHECK(co_await file_.write(metadata(ctx), host, raw.data(), raw.size()));
  Cycle c;  // the refcounts of the new table must be there first
  SPILLWAY_CO_CHECK(co_await collect(ctx, c));
  Status s = co_await write_tables(ctx, c);
  if (!s) {
    restore(c);
    co_return s;
  }
  pending_free_.insert(pending_free_.end(), c.frees.begin(), c.frees.end());
  std::byte field[12];
  store32(field, static_cast<uint32_t>(entries));
  store64(field + 4, host);
  SPILLWAY_CO_CHECK(co_await write_field(kFieldL1Size, field, 12));
  SPILLWAY_CO_CHECK(co_await file_.volume().flush(metadata(ctx)));
  if (old_bytes > 0) {
    drop_metadata(header_.l1_offset, align_up(old_bytes, cluster_size_));
    defer_free(header_.l1_offset, align_up(old_bytes, cluster_size_));
  }
  header_.l1_offset = host;
  header_.l1_size = static_cast<uint32_t>(entries);
  add_metadata(host, raw.size());
  l2_->grow(entries * l2_entries_ / slice_entries_);
  l1_.store(table.release());
  old->retire(sizeof(L1Table) + old_bytes);
  co_return Status{};
}

Status Qcow2Image::may_resize(uint64_t new_size) const {
  if (read_only_) return fail(ErrorKind::kReadOnly, prefix_ + ": is read-only");
  if (corrupt_.load(std::memory_order_acquire)) return refuse_writes();
  if (new_size > uint64_t{1} << 62) return fail(ErrorKind::kInvalid, fmt::format("{}: size {} is too large", prefix_, new_size));
  if (std::any_of(snapshots_.begin(), snapshots_.end(), [](auto& s) { return !s.has_virtual_size; }))
    return fail(ErrorKind::kUnsupported, prefix_ + ": has a snapshot that does not know its size; not resized");
  return {};
}

// After everything that the new size relies on is stable; stable itself when it returns.
Task<Status> Qcow2Image::write_size(uint64_t new_size) {
  SPILLWAY_CO_CHECK(co_await flush_cycle(IoContext{}));
  std::byte b[8];
  store64(b, new_size);
  SPILLWAY_CO_CHECK(co_await write_field(kFieldSize, b, 8));
  SPILLWAY_CO_CHECK(co_await file_.volume().flush(IoContext{}));
  header_.size = new_size;
  co_return Status{};
}

// Grows. What the backing file has beyond the old end must not appear: it is hidden by zeros before the size is
// published.
Task<Status> Qcow2Image::do_resize(uint64_t new_size) {
  SPILLWAY_CO_CHECK(may_resize(new_size));
  const uint64_t old_size = size();
  if (new_size == old_size) co_return Status{};
  const uint64_t need = (new_size + header_.bytes_per_l2() - 1) / header_.bytes_per_l2();
  if (need > header_.l1_size) {
    co_await flush_mutex_.lock();
    co_await owner_.lock();
    Status s = co_await grow_l1(need);
    owner_.unlock();
    flush_mutex_.unlock();
    if (!s) co_return s;
  }
  if (header_.external_data()) {
    const uint64_t want = align_up(new_size, std::max<uint64_t>(cluster_size_, data_.volume().geometry().block_size));
    if (data_.size() < want) SPILLWAY_CO_CHECK(co_await data_.volume().resize(want));
  }
  uint64_t hide = std::min(new_size, align_up(old_size, cluster_size_));
  if (backing_) hide = std::max(hide, std::min(new_size, backing_.size()));
  hide = align_up(hide, 512);
  if (hide > old_size) {
    // Behind the old end nobody reads or writes yet; copies around these writes see zeros there.
    const uint64_t edge = std::min(hide, align_up(old_size, cluster_size_));
    Status s{};
    if (edge > old_size) s = co_await write_zero_bytes(IoContext{}, old_size, edge - old_size);
    if (s && hide > edge) s = co_await do_write_zeroes(IoContext{}, edge, hide - edge, true);
    if (!s) co_return s;
  }
  SPILLWAY_CO_CHECK(co_await write_size(new_size));
  set_size(new_size);
  co_return Status{};
}

// The size goes last: with the old one the end reads as zeros or what is below, with the new one nothing of it is left that a
// later growth could bring back.
Task<Status> Qcow2Image::shrink(uint64_t new_size) {
  SPILLWAY_CO_CHECK(may_resize(new_size));
  if (new_size >= size() || !is_aligned(new_size, 512))
    co_return fail(ErrorKind::kInvalid, fmt::format("{}: shrink from {} to {}: a smaller multiple of 512", prefix_, size(), new_size));
  const uint64_t first = align_up(new_size, cluster_size_), end = align_up(size(), cluster_size_);
  if (header_.external_data() && first < data_.size())
    SPILLWAY_CO_CHECK(co_await data_.write_zeroes(IoContext{}, first, std::min(end, data_.size()) - first, true));
  else if (!header_.external_data() && first < end)
    SPILLWAY_CO_CHECK(co_await change_clusters(IoContext{}, first >> cluster_bits_, (end - first) >> cluster_bits_,
                                               Change::kForget));
  co_return co_await write_size(new_size);
}

Task<Status> Qcow2Image::close() {
  if (read_only_ || closed_.exchange(true)) co_return Status{};
  Status s{};
  // Twice: the first frees clusters, the second writes that down.
  for (int i = 0; i < 3 && s && (tables_dirty() || refcounts_->dirty() > 0); ++i) s = co_await flush_cycle(IoContext{});
  if (s) s = co_await flush_data(IoContext{});
  if (s && marked_dirty_) {
    // Refcounts written while the image was lazy had no order; all of them are stable now.
    s = co_await update_incompatible(0, kDirty);
    if (s) marked_dirty_ = false;
  }
  if (s && log_ != nullptr) log_->clear();
  Status below = co_await file_.volume().close();
  if (s && !below) s = std::move(below);
  if (header_.external_data()) {
    below = co_await data_.volume().close();
    if (s && !below) s = std::move(below);
  }
  co_return s;
}

Qcow2Stats Qcow2Image::stats() const {
  Qcow2Stats s;
  s.l2_loads = l2_->stats().loads.load(std::memory_order_relaxed);
  s.l2_evictions = l2_->stats().evictions.load(std::memory_order_relaxed);
  s.l2_bytes = l2_->bytes();
  s.l2_dirty = l2_->dirty();
  s.refcount_loads = refcounts_->stats().loads.load(std::memory_order_relaxed);
  s.refcount_bytes = refcounts_->bytes();
  s.clusters_allocated = stat_allocated_.load(std::memory_order_relaxed);
  s.clusters_freed = stat_freed_.load(std::memory_order_relaxed);
  s.cow_bytes = stat_cow_bytes_.load(std::memory_order_relaxed);
  s.flush_cycles = stat_cycles_.load(std::memory_order_relaxed);
  s.decompressed = stat_decompressed_.load(std::memory_order_relaxed);
  s.decompressed_hits = stat_decompressed_hits_.load(std::memory_order_relaxed);
  return s;
}

std::string Qcow2Image::to_text() const {
  const Qcow2Stats s = stats();
  return fmt::format(
      "format: qcow2 v{}, clusters {}{}{}\nstate: {}\nl2 cache: {} of {} bytes, {} dirty slices, {} loads, {} evictions\n"
      "refcount cache: {} bytes, {} loads\nclusters: {} allocated, {} freed; {} bytes copied; {} flush cycles\n"
      "decompressed: {} clusters, {} from memory\n",
      header_.version, cluster_size_, extended_ ? ", subclusters" : "",
      header_.external_data() ? ", external data file" : "",
      corrupt_.load(std::memory_order_relaxed) ? "corrupt" : read_only_ ? "read-only" : "ok", s.l2_bytes, l2_->limit(),
      s.l2_dirty, s.l2_loads, s.l2_evictions, s.refcount_bytes, s.refcount_loads, s.clusters_allocated,
      s.clusters_freed, s.cow_bytes, s.flush_cycles, s.decompressed, s.decompressed_hits);
}

}  // namespace spillway::qcow2

namespace spillway {

Task<Status> shrink_qcow2(VolumePtr image, uint64_t new_size) {
  auto* q = dynamic_cast<qcow2::Qcow2Image*>(image.get());
  if (q == nullptr) co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: not a qcow2 image", image->name()));
  co_return co_await q->shrink(new_size);
}

Result<Qcow2Stats> qcow2_stats(const Volume& image) {
  const auto* q = dynamic_cast<const qcow2::Qcow2Image*>(&image);
  if (q == nullptr) return fail(ErrorKind::kInvalid, fmt::format("volume {}: not a qcow2 image", image.name()));
  return q->stats();
}

}  // namespace spillway
