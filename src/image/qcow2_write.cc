// Writing. In place without a lock where the cluster is ours alone; else through a plan:
//
//   owner_ { look again; table; host clusters; flight }  ->  data and what is copied around it  ->  owner_ { entries }
//
// A flight keeps others off the guest clusters in between; they wait and look again. So the data I/O of any number of
// allocating writes overlaps, and only bookkeeping is serial.
#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/image/compress.h"
#include "src/image/qcow2_image.h"

namespace spillway::qcow2 {

Status Qcow2Image::refuse_writes() const {
  return fail(ErrorKind::kCorrupt, prefix_ + ": is corrupt; writes are refused");
}

Task<Status> Qcow2Image::do_write(IoContext ctx, uint64_t offset, Iov iov) {
  if (corrupt_.load(std::memory_order_acquire)) return Task<Status>::ready(refuse_writes());
  const uint64_t length = iov_length(iov);
  {
    const InFlight::Ticket ticket = in_flight_.enter();
    const Run r = lookup(offset, length);
    // fua is passed on only where the mapping is stable already. Asked after the lookup: who publishes an entry says
    // "unstable" first (write_entry).
    const bool stable = !ctx.fua || (!header_.external_data() && !tables_dirty());
    if (r.length == length && r.kind == Kind::kData && r.in_place && stable) {
      Task<Status> io = data_.write(ctx, r.host, iov);
      if (!io.is_ready()) return finish(std::move(io), ticket);
      in_flight_.leave(ticket);
      return io;
    }
    in_flight_.leave(ticket);
  }
  return write_slow(ctx, offset, iov, length);
}

Task<Status> Qcow2Image::write_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) {
  const bool fua = ctx.fua;
  ctx.fua = false;
  uint64_t done = 0;
  while (done < length) {
    if (corrupt_.load(std::memory_order_acquire)) co_return refuse_writes();
    const uint64_t at = offset + done;
    bool allocate = false;
    {
      Entered in(in_flight_);
      const Run r = lookup(at, length - done);
      if (r.kind == Kind::kBad) co_return bad_entry(at);
      if (r.kind == Kind::kMiss) {
        SPILLWAY_CO_TRY(SlicePin pin, co_await l2_->get(metadata(ctx), slice_of(at >> cluster_bits_)));
      } else if (r.kind == Kind::kData && r.in_place) {
        IovSlice part(iov, done, r.length);
        SPILLWAY_CO_CHECK(co_await data_.write(ctx, r.host, part.iov()));
        done += r.length;
      } else {
        allocate = true;
      }
    }
    if (allocate) {
      SPILLWAY_CO_TRY(const uint64_t n, co_await write_new(ctx, at, iov, done, length - done));
      done += n;
    }
  }
  if (fua) co_return co_await do_flush(ctx);
  co_return Status{};
}

void Qcow2Image::read_entry(Slice* s, uint64_t cluster, uint64_t* entry, uint64_t* bitmap) const {
  const uint32_t i = static_cast<uint32_t>(cluster % slice_entries_) * entry_words_;
  *entry = s->load(i);
  *bitmap = extended_ ? s->load(i + 1) : 0;
}

// Owner only. Before anybody can see the entry, and so acknowledge a write to where it leads, the change is in the log
// (whose room was reserved) and flushes know of it. The sequence pairs with lookup_extended.
void Qcow2Image::write_entry(Slice* s, uint64_t cluster, uint64_t entry, uint64_t bitmap,
                             TableLog::Room& room) {
  room.append({cluster, entry, bitmap});
  unstable_.fetch_add(1, std::memory_order_release);
  const uint32_t i = static_cast<uint32_t>(cluster % slice_entries_) * entry_words_;
  if (!extended_) {
    s->store(i, entry);
    return;
  }
  const uint32_t n = s->sequence.load(std::memory_order_relaxed);
  s->sequence.store(n + 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  s->store(i, entry);
  s->store(i + 1, bitmap);
  s->sequence.store(n + 2, std::memory_order_release);
}

// What the old entry named is not referred to any more (by it).
void Qcow2Image::release_entry(uint64_t entry) {
  if (header_.external_data()) return;
  if ((entry & kCompressed) != 0) {
    const CompressedSpan span = compressed_span(entry, cluster_bits_);
    defer_free(span.offset, span.length, entry);
  } else if ((entry & kOffsetMask) != 0) {
    defer_free(entry & kOffsetMask, cluster_size_);
  }
}

// A new L2 table: zeros, or a copy of one that a snapshot shares. On disk (not yet stable) before the L1 array names it
// in memory; stable by stage 1 of a flush cycle, whose stage 2 writes the L1 entry.
Task<Status> Qcow2Image::new_l2_table(IoContext ctx, uint64_t index, uint64_t old, TableLog::Room& room) {
  SPILLWAY_CO_TRY(const Allocation a, co_await allocate(ctx, 1));
  if ((old & kOffsetMask) != 0) {
    std::vector<std::byte> table(cluster_size_);
    SPILLWAY_CO_CHECK(co_await file_.read(metadata(ctx), old & kOffsetMask, table.data(), table.size()));
    SPILLWAY_CO_CHECK(co_await file_.write(metadata(ctx), a.host, table.data(), table.size()));
  } else if (!a.zero) {
    SPILLWAY_CO_CHECK(co_await file_.write_zeroes(metadata(ctx), a.host, cluster_size_, false));
  }
  add_metadata(a.host, cluster_size_);
  room.append({TableLog::kL1Record | index, a.host | kCopied, 0});
  unstable_.fetch_add(1, std::memory_order_release);
  l1_.load()->entries[index].store(a.host | kCopied, std::memory_order_release);
  dirty_l1_.insert(index / 64);
  if ((old & kOffsetMask) != 0) {
    drop_metadata(old & kOffsetMask, cluster_size_);
    defer_free(old & kOffsetMask, cluster_size_);
  }
  co_return Status{};
}

// For `clusters` entries that are about to change, and for the L1 entry, should their table have to be made first.
bool Qcow2Image::reserve(uint64_t clusters, TableLog::Room& room) {
  return log_ == nullptr || log_->reserve(clusters + 1, room);
}

// The slice with the entry of `cluster`, in a table that is this image's alone.
Task<Result<SlicePin>> Qcow2Image::writable_slice(IoContext ctx, uint64_t cluster, TableLog::Room& room) {
  const uint64_t index = l1_index(cluster);
  const uint64_t e = l1_.load()->get(index);
  if ((e & kOffsetMask) == 0 || (e & kCopied) == 0) SPILLWAY_CO_CHECK(co_await new_l2_table(ctx, index, e, room));
  co_return co_await l2_->get(metadata(ctx), slice_of(cluster));
}

bool Qcow2Image::needs_new(uint64_t entry) const {
  if ((entry & kCompressed) != 0) return true;
  return (entry & kCopied) == 0 || ((entry & kOffsetMask) == 0 && !header_.external_data());
}

Task<Status> Qcow2Image::make_plan(IoContext ctx, uint64_t offset, uint64_t length, Plan& plan) {
  const uint64_t cluster = offset >> cluster_bits_;
  if (auto it = flights_.find(cluster); it != flights_.end()) {
    plan.wait = it->second;
    co_return Status{};
  }
  if (corrupt_.load(std::memory_order_acquire)) co_return refuse_writes();
  const uint64_t last = std::min((offset + length - 1) >> cluster_bits_, cluster + slice_entries_ - 1);
  if (!reserve(last - cluster + 1, plan.room)) {
    plan.log_full = true;
    co_return Status{};
  }
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  SPILLWAY_CO_TRY(SlicePin slice, co_await writable_slice(ctx, cluster, plan.room));
  uint64_t entry = 0, bitmap = 0;
  read_entry(slice.get(), cluster, &entry, &bitmap);
  if (entry == kBadEntry) co_return bad_entry(offset);
  plan.first = cluster;
  if (!needs_new(entry)) {
    SPILLWAY_CO_CHECK(plan_in_owned(plan, entry, bitmap, offset, length));
    if (plan.retry) co_return Status{};
  } else {
    uint64_t n = 1;
    while (cluster + n <= last && slice_of(cluster + n) == slice_of(cluster) && !flights_.contains(cluster + n)) {
      uint64_t e = 0, b = 0;
      read_entry(slice.get(), cluster + n, &e, &b);
      if (e == kBadEntry || !needs_new(e)) break;
      ++n;
    }
    if (header_.external_data()) {
      plan.host = cluster << cluster_bits_;
      plan.clusters = n;
    } else {
      SPILLWAY_CO_TRY(const Allocation a, co_await allocate(ctx, n));
      plan.host = a.host;
      plan.clusters = a.clusters;
      plan.known_zero = a.zero;
    }
    plan.fresh = true;
    plan.begin = offset;
    plan.end = std::min(offset + length, (cluster + plan.clusters) << cluster_bits_);
    // Subclusters that the request does not touch stay where they are, unless "there" is a cluster that goes away.
    uint64_t head_unit = subcluster_size_, tail_unit = subcluster_size_;
    if (extended_) {
      uint64_t e = 0, b = 0;
      read_entry(slice.get(), (plan.end - 1) >> cluster_bits_, &e, &b);
      if ((entry & kOffsetMask) != 0 || (entry & kCompressed) != 0) head_unit = cluster_size_;
      if ((e & kOffsetMask) != 0 || (e & kCompressed) != 0) tail_unit = cluster_size_;
      // In one cluster both ends belong to it.
      if ((plan.end - 1) >> cluster_bits_ == cluster) tail_unit = head_unit;
    }
    plan.cow_begin = align_down(plan.begin, head_unit);
    plan.cow_end = align_up(plan.end, tail_unit);
  }
  plan.mine = std::make_shared<Flight>();
  for (uint64_t i = 0; i < plan.clusters; ++i) flights_[plan.first + i] = plan.mine;
  co_return Status{};
}

// The cluster has its host cluster, but this part of it is not in use: a zero cluster that kept its place, or
// subclusters never written.
Status Qcow2Image::plan_in_owned(Plan& plan, uint64_t entry, uint64_t bitmap, uint64_t offset, uint64_t length) {
  const uint64_t base = plan.first << cluster_bits_;
  plan.clusters = 1;
  plan.host = entry & kOffsetMask;
  plan.begin = offset;
  plan.end = std::min(offset + length, base + cluster_size_);
  if (!extended_) {
    plan.retry = (entry & kZeroFlag) == 0;
    plan.cow_begin = base;
    plan.cow_end = base + cluster_size_;
    return {};
  }
  // Subclusters in use are written in place by anybody: they must not be copied over, so the part ends before one.
  auto used = [&](uint64_t at) {
    const uint64_t sub = (at - base) / subcluster_size_;
    return (bitmap >> sub & 1) != 0;
  };
  if (used(offset)) {
    plan.retry = true;
    return {};
  }
  plan.cow_begin = align_down(offset, subcluster_size_);
  uint64_t end = plan.cow_begin;
  while (end < plan.end && !used(end)) end += subcluster_size_;
  plan.end = std::min(plan.end, end);
  plan.cow_end = align_up(plan.end, subcluster_size_);
  return {};
}

// Writes [cow_begin, cow_end): the request's bytes and, around them, what the guest sees there now. Where the place reads as
// zeros and the guest sees zeros, nothing need be read, held or written.
Task<Status> Qcow2Image::fill(IoContext ctx, const Plan& plan, Iov iov, uint64_t skip) {
  const uint64_t base = plan.first << cluster_bits_;
  uint64_t head = plan.begin - plan.cow_begin, tail = plan.cow_end - plan.end;
  if (plan.known_zero && is_zero_now(plan.cow_begin, head)) head = 0;
  // Beyond the virtual end are zeros too.
  if (plan.known_zero && is_zero_now(plan.end, std::min(tail, size() - std::min(size(), plan.end)))) tail = 0;
  AlignedBuffer around;
  if (head + tail > 0) {
    around = AlignedBuffer(head + tail);
    if (!around) co_return fail(ErrorKind::kNoMemory, prefix_ + ": no memory to copy a cluster");
    SPILLWAY_CO_CHECK(co_await read_bytes(ctx, plan.begin - head, around.data(), head));
    SPILLWAY_CO_CHECK(co_await read_bytes(ctx, plan.end, around.data() + head, tail));
    stat_cow_bytes_.fetch_add(head + tail, std::memory_order_relaxed);
  }
  const bool with_head = head > 0 && !(plan.known_zero && all_zero(around.data(), head));
  const bool with_tail = tail > 0 && !(plan.known_zero && all_zero(around.data() + head, tail));
  IovSlice middle(iov, skip, plan.end - plan.begin);
  std::vector<iovec> all;
  if (with_head) all.push_back({around.data(), head});
  all.insert(all.end(), middle.iov().begin(), middle.iov().end());
  if (with_tail) all.push_back({around.data() + head, tail});
  const uint64_t from = with_head ? plan.cow_begin : plan.begin;
  co_return co_await data_.write(ctx, plan.host + (from - base), all);
}

// Publishes the new entries.
Task<Status> Qcow2Image::commit(IoContext ctx, Plan& plan) {
  SPILLWAY_CO_TRY(SlicePin slice, co_await l2_->get(metadata(ctx), slice_of(plan.first)));
  for (uint64_t i = 0; i < plan.clusters; ++i) {
    uint64_t entry = 0, bitmap = 0;
    read_entry(slice.get(), plan.first + i, &entry, &bitmap);
    const uint64_t host = plan.host + (i << cluster_bits_);
    uint64_t fresh_bitmap = 0;
    if (extended_) {
      const uint64_t base = (plan.first + i) << cluster_bits_;
      const uint64_t from = std::max(plan.cow_begin, base) - base;
      const uint64_t to = std::min(plan.cow_end, base + cluster_size_) - base;
      const uint64_t first = from / subcluster_size_, n = to / subcluster_size_ - first;
      const uint64_t bits = ((uint64_t{1} << n) - 1) << first;
      fresh_bitmap = (bitmap & ~(bits << 32)) | bits;
    }
    write_entry(slice.get(), plan.first + i, host | kCopied, fresh_bitmap, plan.room);
    if (plan.fresh) release_entry(entry);
  }
  l2_->mark_dirty(slice);
  co_return Status{};
}

void Qcow2Image::end_flight(const Plan& plan) {
  for (uint64_t i = 0; i < plan.clusters; ++i) flights_.erase(plan.first + i);
}

// Writes a first part of the range that has no place yet; how many bytes, 0 = look again.
Task<Result<uint64_t>> Qcow2Image::write_new(IoContext ctx, uint64_t offset, Iov iov, uint64_t skip, uint64_t length) {
  Plan plan;
  co_await owner_.lock();
  Status s = co_await make_plan(ctx, offset, length, plan);
  owner_.unlock();
  if (!s) co_return std::unexpected(std::move(s).error());
  if (plan.wait != nullptr) {
    co_await plan.wait->over.wait();
    co_return 0;
  }
  if (plan.log_full) {
    SPILLWAY_CO_CHECK(co_await flush_cycle(ctx));
    co_return 0;
  }
  if (plan.retry) co_return 0;

  s = co_await fill(ctx, plan, iov, skip);

  co_await owner_.lock();
  if (s) s = co_await commit(ctx, plan);
  if (!s && plan.fresh && !header_.external_data()) {
    // Nothing names these clusters. What was counted is counted back; at worst it leaks.
    for (uint64_t i = 0; i < plan.clusters; ++i)
      (void)co_await change_refcount(ctx, (plan.host >> cluster_bits_) + i, -1);
  }
  end_flight(plan);
  const FlushNeed need = flush_need();
  owner_.unlock();
  plan.room.give_back();
  plan.mine->over.set();
  if (!s) co_return std::unexpected(std::move(s).error());
  if (need != FlushNeed::kNone) SPILLWAY_CO_CHECK(co_await relieve(ctx, need));
  co_return plan.end - plan.begin;
}

// Under owner_. What is remembered until a flush has a bound. From half of it on one request a cycle does the flush, so that
// the others need not wait for it (should it fail, the guest's own flush will say so); at the bound all do.
Qcow2Image::FlushNeed Qcow2Image::flush_need() {
  const auto share = [](const TableCache& c) { return c.dirty() * c.slice_bytes() * 4 / c.limit(); };
  const uint64_t quarters = std::max({pending_free_.size() * 4 / kMaxPendingFree, share(*l2_), share(*refcounts_)});
  if (quarters >= 4) return FlushNeed::kMust;
  if (quarters < 2 && (log_ == nullptr || !log_->half_full())) return FlushNeed::kNone;
  return std::exchange(cycle_wanted_, true) ? FlushNeed::kNone : FlushNeed::kSoon;
}

Task<Status> Qcow2Image::relieve(IoContext ctx, FlushNeed need) {
  if (need == FlushNeed::kNone) co_return Status{};
  Status s = co_await flush_cycle(ctx);
  if (need == FlushNeed::kMust) co_return s;
  co_return Status{};
}

// ---- discard, zeros ----

Task<Status> Qcow2Image::do_discard(IoContext ctx, uint64_t offset, uint64_t length) {
  if (corrupt_.load(std::memory_order_acquire)) co_return refuse_writes();
  const bool to_end = offset + length == size();
  const uint64_t first = align_up(offset, cluster_size_) >> cluster_bits_;
  const uint64_t last = to_end ? align_up(offset + length, cluster_size_) >> cluster_bits_
                               : (offset + length) >> cluster_bits_;
  if (first >= last) co_return Status{};  // less than a cluster: as before
  if (header_.external_data()) {
    // The mapping stays; the space goes.
    Entered in(in_flight_);
    const uint64_t end = std::min(last << cluster_bits_, data_.size());
    co_return co_await data_.write_zeroes(ctx, first << cluster_bits_, end - (first << cluster_bits_), true);
  }
  // v2 has no zero clusters: over a backing file a freed cluster would show what is below.
  if (header_.version < 3 && backing_) co_return Status{};
  co_return co_await change_clusters(ctx, first, last - first, Change::kDiscard);
}

Task<Status> Qcow2Image::do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) {
  if (corrupt_.load(std::memory_order_acquire)) co_return refuse_writes();
  const bool fua = ctx.fua;
  ctx.fua = false;
  const uint64_t end = offset + length;
  const bool to_end = end == size();
  const bool by_entry = !header_.external_data() && (header_.version >= 3 || (!backing_ && may_unmap));
  const uint64_t first = align_up(offset, cluster_size_);
  const uint64_t last = to_end ? align_up(end, cluster_size_) : align_down(end, cluster_size_);
  if (!by_entry || first >= last) {
    SPILLWAY_CO_CHECK(co_await write_zero_bytes(ctx, offset, length));
  } else {
    if (first > offset) SPILLWAY_CO_CHECK(co_await write_zero_bytes(ctx, offset, first - offset));
    SPILLWAY_CO_CHECK(co_await change_clusters(ctx, first >> cluster_bits_, (last - first) >> cluster_bits_,
                                               may_unmap ? Change::kZeroUnmap : Change::kZeroKeep));
    if (end > last) SPILLWAY_CO_CHECK(co_await write_zero_bytes(ctx, last, end - last));
  }
  if (fua) co_return co_await do_flush(ctx);
  co_return Status{};
}

// Reads as zeros without looking at data.
bool Qcow2Image::is_zero_now(uint64_t offset, uint64_t length) const {
  while (length > 0) {
    const Run r = lookup(offset, length);
    const bool nothing_below = !backing_ || offset >= backing_.size();
    if (r.kind != Kind::kZero && !(r.kind == Kind::kUnallocated && nothing_below)) return false;
    offset += r.length;
    length -= r.length;
  }
  return true;
}

Task<Status> Qcow2Image::write_zero_bytes(IoContext ctx, uint64_t offset, uint64_t length) {
  constexpr uint64_t kPiece = 64 * kKiB;
  AlignedBuffer zeros(std::min(length, kPiece));
  if (!zeros) co_return fail(ErrorKind::kNoMemory, prefix_ + ": no memory for zeros");
  std::memset(zeros.data(), 0, zeros.size());
  while (length > 0) {
    const uint64_t n = std::min({length, kPiece, cluster_size_ - (offset & (cluster_size_ - 1))});
    SPILLWAY_CO_TRY(const Run r, co_await map_run(offset, n));  // so that is_zero_now finds the slice
    (void)r;
    if (!is_zero_now(offset, n)) {
      const iovec v{zeros.data(), n};
      SPILLWAY_CO_CHECK(co_await write_slow(ctx, offset, Iov(&v, 1), n));
    }
    offset += n;
    length -= n;
  }
  co_return Status{};
}

// Whole clusters.
Task<Status> Qcow2Image::change_clusters(IoContext ctx, uint64_t first, uint64_t count, Change how) {
  while (count > 0) {
    std::shared_ptr<Flight> wait;
    TableLog::Room room;
    co_await owner_.lock();
    const bool log_full = !reserve(std::min(count, slice_entries_), room);
    Result<uint64_t> n = 0;
    if (!log_full) n = co_await change_slice(ctx, first, count, how, &wait, room);
    const FlushNeed need = log_full ? FlushNeed::kMust : flush_need();
    owner_.unlock();
    room.give_back();
    if (!n) co_return std::unexpected(std::move(n).error());
    if (wait != nullptr) co_await wait->over.wait();
    if (need != FlushNeed::kNone) SPILLWAY_CO_CHECK(co_await relieve(ctx, need));
    first += *n;
    count -= *n;
  }
  co_return Status{};
}

// Changes what lies in one slice, up to a flight; how many clusters.
Task<Result<uint64_t>> Qcow2Image::change_slice(IoContext ctx, uint64_t first, uint64_t count, Change how,
                                                std::shared_ptr<Flight>* wait, TableLog::Room& room) {
  if (corrupt_.load(std::memory_order_acquire)) {
    Status s = refuse_writes();
    co_return std::unexpected(std::move(s).error());
  }
  const uint64_t in_slice = std::min(count, slice_entries_ - first % slice_entries_);
  const bool below = how != Change::kForget && backing_ && first << cluster_bits_ < backing_.size();
  if ((l1_.load()->get(l1_index(first)) & kOffsetMask) == 0 && !below) {
    // Nothing is mapped here, and there is nothing to hide. A flight would have made the table.
    co_return in_slice;
  }
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  SPILLWAY_CO_TRY(SlicePin slice, co_await writable_slice(ctx, first, room));
  uint64_t n = 0;
  bool changed = false;
  for (; n < in_slice; ++n) {
    if (auto it = flights_.find(first + n); it != flights_.end()) {
      *wait = it->second;
      break;
    }
    changed |= change_entry(slice.get(), first + n, how, room);
  }
  if (changed) l2_->mark_dirty(slice);
  co_return n;
}

bool Qcow2Image::change_entry(Slice* s, uint64_t cluster, Change how, TableLog::Room& room) {
  uint64_t entry = 0, bitmap = 0;
  read_entry(s, cluster, &entry, &bitmap);
  if (entry == kBadEntry) return false;
  const bool below = backing_ && cluster << cluster_bits_ < backing_.size();
  const uint64_t host = entry & kOffsetMask;
  const bool compressed = (entry & kCompressed) != 0;
  const uint64_t all_zero_bits = uint64_t{0xffffffff} << 32;
  uint64_t next = 0, next_bitmap = 0;
  if (how == Change::kZeroKeep && !compressed && host != 0 && (entry & kCopied) != 0) {
    next = extended_ ? host | kCopied : host | kCopied | kZeroFlag;
    next_bitmap = all_zero_bits;
  } else if (how == Change::kZeroKeep && !compressed && host != 0 && (entry & kZeroFlag) != 0 && !extended_) {
    return false;  // zero already, shared place
  } else if (how != Change::kForget && header_.version >= 3 && (below || entry != 0 || bitmap != 0)) {
    next = extended_ ? 0 : kZeroFlag;
    next_bitmap = all_zero_bits;
  }
  if (!extended_) next_bitmap = 0;
  if (next == entry && next_bitmap == bitmap) return false;
  write_entry(s, cluster, next, next_bitmap, room);
  if (compressed || (host != 0 && (next & kOffsetMask) == 0)) release_entry(entry);
  return true;
}

// ---- compressed, for convert ----

Task<Status> Qcow2Image::write_compressed(IoContext ctx, uint64_t offset, std::span<const std::byte> cluster) {
  SPILLWAY_ASSERT(is_aligned(offset, cluster_size_) && cluster.size() == cluster_size_);
  SPILLWAY_CO_TRY(std::vector<std::byte> packed,
                  compress(static_cast<Qcow2Compression>(header_.compression), cluster));
  const uint64_t here = std::min(cluster_size_, size() - offset);
  if (packed.empty() || header_.external_data()) {
    const iovec v{const_cast<std::byte*>(cluster.data()), here};
    co_return co_await do_write(ctx, offset, Iov(&v, 1));
  }
  SPILLWAY_ASSERT(log_ == nullptr);  // convert is not the daemon's
  co_await owner_.lock();
  Status s = co_await put_compressed(ctx, offset >> cluster_bits_, packed);
  const FlushNeed need = flush_need();
  owner_.unlock();
  if (s) s = co_await relieve(ctx, need);
  co_return s;
}

// Compressed clusters share host clusters: packed one after the other, each counting in every cluster it touches.
Task<Status> Qcow2Image::put_compressed(IoContext ctx, uint64_t cluster, std::span<const std::byte> packed) {
  SPILLWAY_CO_CHECK(co_await begin_changes(ctx));
  TableLog::Room none;
  SPILLWAY_CO_TRY(SlicePin slice, co_await writable_slice(ctx, cluster, none));
  uint64_t at = compressed_end_;
  const uint64_t room = align_up(at, cluster_size_) - at;
  const uint64_t max_count = header_.refcount_order == 6 ? ~uint64_t{0} : (uint64_t{1} << header_.refcount_bits()) - 1;
  bool shared = room > 0;
  if (shared) {
    const uint64_t c = at >> cluster_bits_;
    const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
    SPILLWAY_CO_TRY(SlicePin pin, co_await refcount_slice(ctx, c));
    shared = get_refcount(pin->bytes(), c % per_slice, header_.refcount_order) < max_count;
  }
  if (!shared || packed.size() > room) {
    SPILLWAY_CO_TRY(const Allocation a, co_await allocate(ctx, 1));
    if (shared && a.host == align_up(at, cluster_size_)) {
      // Goes on right behind: the tail of the old cluster is used as well.
      SPILLWAY_CO_CHECK(co_await change_refcount(ctx, at >> cluster_bits_, 1));
    } else {
      at = a.host;
    }
  } else {
    SPILLWAY_CO_CHECK(co_await change_refcount(ctx, at >> cluster_bits_, 1));
  }
  SPILLWAY_CO_CHECK(co_await file_.write(ctx, at, packed.data(), packed.size()));
  const uint32_t shift = 62 - (cluster_bits_ - 8);
  const uint64_t sectors = (align_up(at + packed.size(), 512) - align_down(at, 512)) / 512;
  uint64_t entry = 0, bitmap = 0;
  read_entry(slice.get(), cluster, &entry, &bitmap);
  write_entry(slice.get(), cluster, kCompressed | at | (sectors - 1) << shift, 0, none);
  release_entry(entry);
  l2_->mark_dirty(slice);
  compressed_end_ = at + packed.size();
  co_return Status{};
}

}  // namespace spillway::qcow2
