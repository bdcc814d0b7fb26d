// Host clusters: refcounts, the search for free ones, growth of the file and of the refcount structure.
// Everything here runs under `owner_`.
//
// A refcount goes up in memory when a cluster is given out and reaches the disk (stage 1 of the flush cycle) before
// the table entry that names the cluster (stage 2). It goes down only after the entry that named it is gone from the
// disk, and after the cluster was punched. So after a crash clusters may be counted and unused, never the reverse.
#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/image/qcow2_image.h"

namespace spillway::qcow2 {

void Qcow2Image::add_metadata(uint64_t offset, uint64_t length) {
  std::lock_guard lock(metadata_mutex_);
  for (uint64_t c = offset >> cluster_bits_; c << cluster_bits_ < offset + length; ++c) metadata_.insert(c);
}

void Qcow2Image::drop_metadata(uint64_t offset, uint64_t length) {
  std::lock_guard lock(metadata_mutex_);
  for (uint64_t c = offset >> cluster_bits_; c << cluster_bits_ < offset + length; ++c) metadata_.erase(c);
}

bool Qcow2Image::is_metadata(uint64_t offset, uint64_t length) {
  std::lock_guard lock(metadata_mutex_);
  for (uint64_t c = offset >> cluster_bits_; c << cluster_bits_ < offset + length; ++c)
    if (metadata_.contains(c)) return true;
  return false;
}

// Grows in steps, so that not every allocation costs a system call; the rest of the step is a hole.
Task<Status> Qcow2Image::ensure_file(uint64_t end) {
  const uint64_t now = file_.size();
  if (end <= now) co_return Status{};
  const uint64_t block = file_.volume().geometry().block_size;
  const uint64_t step = std::max<uint64_t>(cluster_size_, std::clamp<uint64_t>(now / 8, 64 * kKiB, 64 * kMiB));
  const uint64_t exact = align_up(end, std::max(cluster_size_, block));
  const uint64_t want = is_aligned(now, cluster_size_) ? align_up(std::max(exact, now + step), std::max(cluster_size_, block)) : exact;
  Status s = co_await file_.volume().resize(want);
  if (!s && want > exact) s = co_await file_.volume().resize(exact);
  if (!s) co_return fail(std::move(s).error().with_context(prefix_ + ": the file cannot grow"));
  co_return Status{};
}

// Before the first change to any table: with lazy refcounts the dirty bit must be on disk. With a log they are not made
// use of: repairing a dirty image would take what only the log names for free.
Task<Status> Qcow2Image::begin_changes(IoContext) {
  if (log_ != nullptr || (header_.compatible & kLazyRefcounts) == 0 || marked_dirty_ || header_.version < 3) co_return Status{};
  SPILLWAY_CO_CHECK(co_await update_incompatible(kDirty, 0));
  marked_dirty_ = true;
  co_return Status{};
}

Task<Result<SlicePin>> Qcow2Image::refcount_slice(IoContext ctx, uint64_t cluster) {
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  return refcounts_->get(metadata(ctx), cluster / per_slice);
}

Task<Status> Qcow2Image::change_refcount(IoContext ctx, uint64_t cluster, int64_t delta) {
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  const uint64_t block = cluster / header_.refblock_entries();
  if (block >= reftable_.size() || reftable_[block] == 0)
    co_return co_await corruption(fmt::format("cluster at {} is in use, but has no refcount", cluster << cluster_bits_));
  SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(ctx, cluster));
  const uint32_t order = header_.refcount_order;
  const uint64_t old = get_refcount(pin->bytes(), cluster % per_slice, order);
  const uint64_t max = order == 6 ? ~uint64_t{0} : (uint64_t{1} << (1u << order)) - 1;
  if ((delta < 0 && old < static_cast<uint64_t>(-delta)) || (delta > 0 && old > max - static_cast<uint64_t>(delta)))
    co_return co_await corruption(
        fmt::format("refcount {} of the cluster at {} cannot change by {}", old, cluster << cluster_bits_, delta));
  set_refcount(pin->bytes(), cluster % per_slice, order, old + static_cast<uint64_t>(delta));
  refcounts_->mark_dirty(pin);
  if (old + static_cast<uint64_t>(delta) == 0) free_hint_ = std::min(free_hint_, cluster);
  co_return Status{};
}

// The cluster is being used: does it read as zeros? Allocation goes upwards, so one frontier says it for the part of
// the file that was never used; what it skips is taken for used.
bool Qcow2Image::take_zero(uint64_t cluster) {
  if (cluster << cluster_bits_ >= zero_frontier_) {
    zero_frontier_ = (cluster + 1) << cluster_bits_;
    return true;
  }
  return punched_.erase(cluster) != 0;
}

// Up to `want` adjacent clusters, at the first free place.
Task<Result<Qcow2Image::Allocation>> Qcow2Image::allocate(IoContext ctx, uint64_t want) {
  const uint32_t order = header_.refcount_order;
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> order;
  const uint64_t cluster_limit = (uint64_t{1} << 56) >> cluster_bits_;
  for (;;) {
    if (free_hint_ >= cluster_limit) co_return fail(ErrorKind::kNoSpace, prefix_ + ": no host cluster left");
    const uint64_t block = free_hint_ / header_.refblock_entries();
    if (block >= reftable_.size()) {
      SPILLWAY_CO_CHECK(co_await grow_reftable(ctx, block));
      continue;
    }
    if (reftable_[block] == 0) {
      SPILLWAY_CO_CHECK(co_await add_refblock(ctx, block));
      continue;
    }
    SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(ctx, free_hint_));
    const uint64_t base = align_down(free_hint_, per_slice);
    uint64_t i = free_hint_ - base;
    while (i < per_slice && get_refcount(pin->bytes(), i, order) != 0) ++i;
    free_hint_ = base + i;
    if (i == per_slice) continue;
    uint64_t n = 1;
    while (n < want && i + n < per_slice && get_refcount(pin->bytes(), i + n, order) == 0) ++n;
    Allocation a;
    a.host = free_hint_ << cluster_bits_;
    if (is_metadata(a.host, n << cluster_bits_)) {
      Status s = co_await corruption(fmt::format("a table at or after {} has refcount zero", a.host));
      co_return std::unexpected(std::move(s).error());
    }
    Status grown = co_await ensure_file(a.host + (n << cluster_bits_));
    if (!grown) {
      // A device of fixed size: what is left of it.
      if (a.host + cluster_size_ > file_.size()) co_return std::unexpected(std::move(grown).error());
      n = (file_.size() - a.host) >> cluster_bits_;
    }
    a.clusters = n;
    a.zero = true;
    for (uint64_t k = 0; k < n; ++k) {
      set_refcount(pin->bytes(), i + k, order, 1);
      if (!take_zero(free_hint_ + k)) a.zero = false;
    }
    refcounts_->mark_dirty(pin);
    free_hint_ += n;
    stat_allocated_.fetch_add(n, std::memory_order_relaxed);
    co_return a;
  }
}

// For tables that must lie in one piece. Takes the first gap behind everything that is counted.
Task<Result<uint64_t>> Qcow2Image::allocate_contiguous(IoContext ctx, uint64_t clusters) {
  const uint32_t order = header_.refcount_order;
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> order;
  // A refcount block takes the first of the clusters it counts: no longer gap can come into being behind the end.
  if (clusters >= header_.refblock_entries())
    co_return fail(ErrorKind::kUnsupported, fmt::format("{}: a table of {} clusters in one piece: its refcount blocks count {} "
                                                        "clusters each", prefix_, clusters, header_.refblock_entries()));
  uint64_t first = free_hint_, found = 0;
  while (found < clusters) {
    const uint64_t c = first + found, block = c / header_.refblock_entries();
    if (block >= reftable_.size()) {
      SPILLWAY_CO_CHECK(co_await grow_reftable(ctx, block));
      first = c;
      found = 0;
      continue;
    }
    if (reftable_[block] == 0) {
      SPILLWAY_CO_CHECK(co_await add_refblock(ctx, block));  // takes the first cluster of the block
      continue;
    }
    SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(ctx, c));
    if (get_refcount(pin->bytes(), c % per_slice, order) == 0) {
      ++found;
    } else {
      first = c + 1;
      found = 0;
    }
  }
  const uint64_t host = first << cluster_bits_;
  if (is_metadata(host, clusters << cluster_bits_)) {
    Status s = co_await corruption(fmt::format("a table at or after {} has refcount zero", host));
    co_return std::unexpected(std::move(s).error());
  }
  SPILLWAY_CO_CHECK(co_await ensure_file(host + (clusters << cluster_bits_)));
  for (uint64_t c = first; c < first + clusters; ++c) {
    SPILLWAY_CO_CHECK(co_await change_refcount(ctx, c, 1));
    take_zero(c);
  }
  co_return host;
}

// A refcount block for clusters that have none: it counts itself, as the first of them. The next flush cycle makes it
// stable before it writes the reftable's entry: a flush here would stop all allocation for as long as everything that
// is dirty below takes.
Task<Status> Qcow2Image::add_refblock(IoContext ctx, uint64_t block) {
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  const uint64_t cluster = block * header_.refblock_entries();
  const uint64_t host = cluster << cluster_bits_;
  if (is_metadata(host, cluster_size_)) co_return co_await corruption(fmt::format("the table at {} has no refcount", host));
  SPILLWAY_CO_CHECK(co_await ensure_file(host + cluster_size_));
  std::vector<std::byte> table(cluster_size_);
  set_refcount(table.data(), 0, header_.refcount_order, 1);
  SPILLWAY_CO_CHECK(co_await file_.write(metadata(ctx), host, table.data(), table.size()));
  reftable_[block] = host;
  dirty_reftable_.insert(block);
  add_metadata(host, cluster_size_);
  take_zero(cluster);
  unstable_.fetch_add(1, std::memory_order_release);
  co_return Status{};
}

// A larger refcount table at the beginning of the clusters that the old one could not count, with the refcount blocks
// that count it. The header names the new one in a single sector write.
Task<Status> Qcow2Image::grow_reftable(IoContext ctx, uint64_t block) {
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  const uint64_t per_block = header_.refblock_entries(), per_cluster = cluster_size_ / 8;
  const uint64_t first = reftable_.size() * per_block;  // first cluster not covered
  uint64_t table_clusters = 0, blocks = 0;
  for (uint64_t want = std::max<uint64_t>(block + 1, reftable_.size() * 3 / 2) + 1;; ++want) {
    table_clusters = align_up(want, per_cluster) / per_cluster;
    blocks = (table_clusters + per_block - 1) / per_block;
    while (blocks * per_block < table_clusters + blocks) ++blocks;
    if (reftable_.size() + blocks <= table_clusters * per_cluster) break;
  }
  if (table_clusters << cluster_bits_ > kMaxRefTableBytes)
    co_return fail(ErrorKind::kNoSpace, prefix_ + ": the refcount table cannot grow any more");
  const uint64_t host = first << cluster_bits_;
  const uint64_t table_at = host + (blocks << cluster_bits_), used = blocks + table_clusters;
  if (is_metadata(host, used << cluster_bits_))
    co_return co_await corruption(fmt::format("a table at or after {} has no refcount", host));
  SPILLWAY_CO_CHECK(co_await ensure_file(host + (used << cluster_bits_)));
  std::vector<uint64_t> table = reftable_;
  table.resize(table_clusters * per_cluster);
  std::vector<std::byte> raw(cluster_size_);
  for (uint64_t b = 0; b < blocks; ++b) {
    std::fill(raw.begin(), raw.end(), std::byte{0});
    for (uint64_t i = 0; i < per_block && b * per_block + i < used; ++i)
      set_refcount(raw.data(), i, header_.refcount_order, 1);
    table[reftable_.size() + b] = host + (b << cluster_bits_);
    SPILLWAY_CO_CHECK(co_await file_.write(metadata(ctx), host + (b << cluster_bits_), raw.data(), raw.size()));
  }
  raw.resize(table.size() * 8);
  for (uint64_t i = 0; i < table.size(); ++i) store64(&raw[i * 8], table[i]);
  SPILLWAY_CO_CHECK(co_await file_.write(metadata(ctx), table_at, raw.data(), raw.size()));
  SPILLWAY_CO_CHECK(co_await file_.volume().flush(metadata(ctx)));
  std::byte field[12];
  store64(field, table_at);
  store32(field + 8, static_cast<uint32_t>(table_clusters));
  SPILLWAY_CO_CHECK(co_await write_field(kFieldRefTable, field, 12));
  SPILLWAY_CO_CHECK(co_await file_.volume().flush(metadata(ctx)));

  const uint64_t old_at = header_.reftable_offset, old_bytes = uint64_t{header_.reftable_clusters} << cluster_bits_;
  header_.reftable_offset = table_at;
  header_.reftable_clusters = static_cast<uint32_t>(table_clusters);
  reftable_ = std::move(table);
  dirty_reftable_.clear();  // the new table has them all, and is stable
  refcounts_->grow(reftable_.size() * (cluster_size_ / refcounts_->slice_bytes()));
  drop_metadata(old_at, old_bytes);
  add_metadata(host, used << cluster_bits_);
  for (uint64_t c = first; c < first + used; ++c) take_zero(c);
  defer_free(old_at, old_bytes);
  co_return Status{};
}

void Qcow2Image::defer_free(uint64_t host, uint64_t length, uint64_t compressed) {
  pending_free_.push_back({host, length, compressed});
  unstable_.fetch_add(1, std::memory_order_release);
}

}  // namespace spillway::qcow2
