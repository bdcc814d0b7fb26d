// Reading: the lock-free lookup, and what follows from it.
#include <sched.h>

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/image/compress.h"
#include "src/image/qcow2_image.h"

namespace spillway::qcow2 {

bool all_zero(const void* b, uint64_t n) {
  const char* p = static_cast<const char*>(b);
  if (n < 16) return std::all_of(p, p + n, [](char c) { return c == 0; });
  uint64_t a, z;
  std::memcpy(&a, p, 8);
  std::memcpy(&z, p + 8, 8);
  return (a | z) == 0 && std::memcmp(p, p + 16, n - 16) == 0;
}

// What one standard entry says of the bytes from `in_cluster` to the end of its cluster.
Qcow2Image::Run Qcow2Image::classify(uint64_t entry, uint64_t in_cluster) const {
  Run r;
  r.length = cluster_size_ - in_cluster;
  if (entry == kBadEntry) {
    r.kind = Kind::kBad;
  } else if ((entry & kCompressed) != 0) {
    r.kind = Kind::kPacked;
    r.host = entry;
  } else {
    const uint64_t host = entry & kOffsetMask;
    // In an external data file offset 0 is a place like any other; the copied flag tells it from "not allocated".
    r.has_host = host != 0 || (header_.external_data() && (entry & kCopied) != 0);
    r.host = host + in_cluster;
    r.in_place = r.has_host && (entry & kCopied) != 0 && !read_only_;
    if (!extended_ && (entry & kZeroFlag) != 0) r.kind = Kind::kZero;
    else r.kind = r.has_host ? Kind::kData : Kind::kUnallocated;
  }
  return r;
}

static bool continues(const Qcow2Image::Run& r, const Qcow2Image::Run& next) {
  using Kind = Qcow2Image::Kind;
  if (next.kind != r.kind || r.kind == Kind::kPacked || r.kind == Kind::kBad) return false;
  // Also for parts that are not in use: `map` tells where their place is.
  if (r.kind != Kind::kData && !r.has_host) return !next.has_host;
  return next.has_host == r.has_host && next.in_place == r.in_place && next.host == r.host + r.length;
}

Qcow2Image::Run Qcow2Image::lookup_standard(Slice* s, uint64_t offset, uint64_t length) const {
  const uint64_t cluster = offset >> cluster_bits_;
  uint32_t i = static_cast<uint32_t>(cluster % slice_entries_);
  Run r = classify(s->load(i), offset & (cluster_size_ - 1));
  while (r.length < length && ++i < slice_entries_) {
    const Run next = classify(s->load(i), 0);
    if (!continues(r, next)) break;
    r.length += next.length;
  }
  r.length = std::min(r.length, length);
  return r;
}

// Subclusters: the low half of the second word says "allocated", the high half "zero".
Qcow2Image::Run Qcow2Image::lookup_extended(Slice* s, uint64_t offset, uint64_t length) const {
  Run r;
  r.length = 0;
  uint64_t at = offset;
  bool first = true;
  while (r.length < length && (at >> cluster_bits_) / slice_entries_ == s->index) {
    const uint32_t i = static_cast<uint32_t>((at >> cluster_bits_) % slice_entries_) * 2;
    // Pairs with write_entry: an odd or changed sequence means that the words belong to different entries.
    uint64_t entry = 0, bitmap = 0;
    for (uint32_t tries = 0;; ++tries) {
      const uint32_t before = s->sequence.load(std::memory_order_acquire);
      entry = s->load(i);
      bitmap = s->load(i + 1);
      std::atomic_thread_fence(std::memory_order_acquire);
      if ((before & 1) == 0 && s->sequence.load(std::memory_order_relaxed) == before) break;
      if (tries < 64) __builtin_ia32_pause();
      else sched_yield();  // the owner was preempted between two words
    }
    const Run whole = classify(entry, at & (cluster_size_ - 1));
    if (whole.kind == Kind::kPacked || whole.kind == Kind::kBad) {
      if (first) r = whole;
      break;
    }
    const uint64_t cluster_end = align_down(at, cluster_size_) + cluster_size_;
    bool stop = false;
    while (at < cluster_end && r.length < length) {
      const uint32_t sub = static_cast<uint32_t>((at & (cluster_size_ - 1)) / subcluster_size_);
      Run one = whole;
      one.length = subcluster_size_ - (at & (subcluster_size_ - 1));
      one.host = (entry & kOffsetMask) + (at & (cluster_size_ - 1));
      if ((bitmap >> (sub + 32) & 1) != 0) one.kind = Kind::kZero;
      else one.kind = whole.has_host && (bitmap >> sub & 1) != 0 ? Kind::kData : Kind::kUnallocated;
      if (first) {
        r = one;
        first = false;
      } else if (continues(r, one)) {
        r.length += one.length;
      } else {
        stop = true;
        break;
      }
      at += one.length;
    }
    if (stop) break;
  }
  r.length = std::min(r.length, length);
  return r;
}

Qcow2Image::Run Qcow2Image::lookup(uint64_t offset, uint64_t length) const {
  const uint64_t cluster = offset >> cluster_bits_;
  reclaim::RcuGuard guard;
  Slice* s = l2_->find(slice_of(cluster));
  if (s == nullptr) {
    Run r;
    if ((l1_.load()->get(l1_index(cluster)) & kOffsetMask) != 0) return r;  // kMiss
    // No L2 table: all it would map is unallocated.
    r.kind = Kind::kUnallocated;
    const uint64_t end = (l1_index(cluster) + 1) * (l2_entries_ << cluster_bits_);
    r.length = std::min(length, end - offset);
    return r;
  }
  // Written only when it changes: the line is shared by all readers.
  if (!s->referenced.load(std::memory_order_relaxed)) s->referenced.store(true, std::memory_order_relaxed);
  return extended_ ? lookup_extended(s, offset, length) : lookup_standard(s, offset, length);
}

Status Qcow2Image::bad_entry(uint64_t offset) const {
  return fail(ErrorKind::kCorrupt, fmt::format("{}: the L2 entry for offset {} is damaged", prefix_,
                                               align_down(offset, cluster_size_)));
}

static void expect_in(const MemberIo& member, IoContext ctx, uint64_t offset, uint64_t length, bool write) {
  const uint64_t have = member.size();
  if (offset < have && length <= have - offset) member.volume().expect(ctx, offset, length, write);
}

// No coroutine for what is in memory.
Task<Result<Qcow2Image::Run>> Qcow2Image::map_run(uint64_t offset, uint64_t length) {
  const Run r = lookup(offset, length);
  if (r.kind == Kind::kMiss) return map_run_slow(offset, length);
  if (r.kind == Kind::kBad) return Task<Result<Run>>::ready(std::unexpected(std::move(bad_entry(offset)).error()));
  return Task<Result<Run>>::ready(r);
}

Task<Result<Qcow2Image::Run>> Qcow2Image::map_run_slow(uint64_t offset, uint64_t length) {
  Entered in(in_flight_);
  const IoContext ctx = metadata(IoContext{});
  SPILLWAY_CO_TRY(SlicePin pin, co_await l2_->get(ctx, slice_of(offset >> cluster_bits_)));
  // Pinned: the lookup finds it.
  const Run r = lookup(offset, length);
  if (r.kind == Kind::kBad) {
    Status s = bad_entry(offset);
    co_return std::unexpected(std::move(s).error());
  }
  co_return r;
}

Task<Status> Qcow2Image::finish(Task<Status> io, InFlight::Ticket ticket) {
  Status s = co_await io;
  in_flight_.leave(ticket);
  co_return s;
}

Task<Status> Qcow2Image::do_read(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov);
  const InFlight::Ticket ticket = in_flight_.enter();
  const Run r = lookup(offset, length);
  if (r.length == length) {
    switch (r.kind) {
      case Kind::kData: {
        Task<Status> io = data_.read(ctx, r.host, iov);
        if (!io.is_ready()) return finish(std::move(io), ticket);
        in_flight_.leave(ticket);
        return io;
      }
      case Kind::kZero:
        in_flight_.leave(ticket);
        zero_iov(iov, 0, length);
        return Task<Status>::ready({});
      case Kind::kUnallocated:
        in_flight_.leave(ticket);
        return read_backing(ctx, offset, iov);
      default: break;
    }
  }
  in_flight_.leave(ticket);
  return read_slow(ctx, offset, iov, length);
}

// Where the range begins is fetched, in the member that has it. Brings the mapping into this CPU's caches on the way. What
// was looked up may be out of date by the time it is used; that costs a miss.
void Qcow2Image::expect(IoContext ctx, uint64_t offset, uint64_t length, bool write) {
  const Run r = lookup(offset, length);
  if (r.kind == Kind::kData) {
    if (!write || r.in_place) expect_in(data_, ctx, r.host, r.length, write);
  } else if (r.kind == Kind::kUnallocated && !write && backing_) {
    expect_in(backing_, ctx, offset, r.length, false);
  }
}

Task<Status> Qcow2Image::read_backing(IoContext ctx, uint64_t offset, Iov iov) {
  if (backing_) return backing_.read(ctx, offset, iov);  // zeros beyond its end
  zero_iov(iov, 0, iov_length(iov));
  return Task<Status>::ready({});
}

Task<Status> Qcow2Image::read_part(IoContext ctx, Run run, uint64_t offset, Iov iov, uint64_t skip) {
  IovSlice part(iov, skip, run.length);
  switch (run.kind) {
    case Kind::kData: co_return co_await data_.read(ctx, run.host, part.iov());
    case Kind::kUnallocated: co_return co_await read_backing(ctx, offset, part.iov());
    case Kind::kPacked:
      co_return co_await read_compressed(ctx, run.host, offset & (cluster_size_ - 1), part.iov());
    case Kind::kBad: co_return bad_entry(offset);
    default: zero_iov(part.iov(), 0, run.length); co_return Status{};
  }
}

// Several runs: up to 16 at once.
Task<Status> Qcow2Image::read_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) {
  Entered in(in_flight_);
  const IoContext meta = metadata(ctx);
  uint64_t done = 0;
  while (done < length) {
    std::vector<Task<Status>> parts;
    while (done < length && parts.size() < 16) {
      const Run r = lookup(offset + done, length - done);
      if (r.kind == Kind::kMiss) {
        // The pin is dropped at once: should the slice be evicted before the next lookup, we come here again.
        auto pin = co_await l2_->get(meta, slice_of((offset + done) >> cluster_bits_));
        if (!pin) {
          if (!parts.empty()) (void)co_await all_of(std::move(parts));
          co_return std::unexpected(std::move(pin).error());
        }
        continue;
      }
      parts.push_back(read_part(ctx, r, offset + done, iov, done));
      done += r.length;
    }
    Status s = co_await all_of(std::move(parts));
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> Qcow2Image::read_bytes(IoContext ctx, uint64_t offset, std::byte* to, uint64_t length) {
  const uint64_t have = offset >= size() ? 0 : std::min(length, size() - offset);
  std::memset(to + have, 0, length - have);
  if (have == 0) co_return Status{};
  const iovec v{to, have};
  co_return co_await read_slow(ctx, offset, Iov(&v, 1), have);
}

Task<Status> Qcow2Image::read_compressed(IoContext ctx, uint64_t entry, uint64_t in_cluster, Iov iov) {
  std::shared_ptr<const AlignedBuffer> cluster = decompressed_find(entry);
  if (cluster == nullptr) {
    const CompressedSpan span = compressed_span(entry, cluster_bits_);
    const uint64_t length = std::min(span.length, file_.size() - std::min(file_.size(), span.offset));
    AlignedBuffer in(std::max<uint64_t>(length, 1));
    auto out = std::make_shared<AlignedBuffer>(cluster_size_);
    if (!in || !*out) co_return fail(ErrorKind::kNoMemory, prefix_ + ": no memory to decompress");
    SPILLWAY_CO_CHECK(co_await file_.read(ctx, span.offset, in.data(), length));
    Status s = decompress(static_cast<Qcow2Compression>(header_.compression), std::span(in.data(), length),
                          std::span(out->data(), cluster_size_));
    if (!s)
      co_return fail(std::move(s).error().with_context(
          fmt::format("{}: compressed cluster at {}", prefix_, span.offset)));
    stat_decompressed_.fetch_add(1, std::memory_order_relaxed);
    cluster = out;
    decompressed_put(entry, cluster);
  } else {
    stat_decompressed_hits_.fetch_add(1, std::memory_order_relaxed);
  }
  copy_to_iov(iov, 0, cluster->data() + in_cluster, iov_length(iov));
  co_return Status{};
}

std::shared_ptr<const AlignedBuffer> Qcow2Image::decompressed_find(uint64_t entry) {
  std::lock_guard lock(decompressed_mutex_);
  auto it = decompressed_index_.find(entry);
  if (it == decompressed_index_.end()) return nullptr;
  decompressed_.splice(decompressed_.begin(), decompressed_, it->second);
  return it->second->data;
}

void Qcow2Image::decompressed_put(uint64_t entry, std::shared_ptr<const AlignedBuffer> data) {
  {
    std::lock_guard lock(decompressed_mutex_);
    if (decompressed_limit_ < cluster_size_ || decompressed_index_.contains(entry)) return;
    while ((decompressed_.size() + 1) * cluster_size_ > decompressed_limit_) {
      decompressed_index_.erase(decompressed_.back().entry);
      decompressed_.pop_back();
    }
    decompressed_.push_front({entry, std::move(data)});
    decompressed_index_[entry] = decompressed_.begin();
  }
  if (decompressed_shrinker_) decompressed_shrinker_.set_bit();
}

void Qcow2Image::decompressed_drop(uint64_t entry) {
  std::lock_guard lock(decompressed_mutex_);
  auto it = decompressed_index_.find(entry);
  if (it == decompressed_index_.end()) return;
  decompressed_.erase(it->second);
  decompressed_index_.erase(it);
}

Task<Result<bool>> Qcow2Image::counts_more_than(uint64_t allocated_bytes) {
  const uint64_t real = allocated_bytes >> cluster_bits_, threshold = std::max(real * 10 / 9, real + 2);
  const uint64_t per_block = header_.refblock_entries();
  const uint64_t per_slice = (uint64_t{refcounts_->slice_bytes()} * 8) >> header_.refcount_order;
  const uint64_t end = align_up(file_.size(), cluster_size_) >> cluster_bits_;
  uint64_t counted = 0;
  auto guard = co_await owner_.guard();
  for (uint64_t c = 0; c < end && counted < threshold; c = align_down(c, per_slice) + per_slice) {
    if (c / per_block >= reftable_.size()) break;
    if (reftable_[c / per_block] == 0) continue;
    SPILLWAY_CO_TRY(SlicePin pin, co_await refcounts_->get(metadata(IoContext{}), c / per_slice));
    for (uint64_t i = 0; i < per_slice && c + i < end; ++i)
      counted += get_refcount(pin->bytes(), i, header_.refcount_order) != 0;
  }
  co_return counted >= threshold;
}

Task<Result<std::vector<Extent>>> Qcow2Image::do_block_status(uint64_t offset, uint64_t length) {
  std::vector<Extent> all;
  auto add = [&](uint64_t at, uint64_t n, Extent::Kind kind) {
    if (!all.empty() && all.back().kind == kind) all.back().length += n;
    else all.push_back({at, n, kind});
  };
  const uint64_t end = offset + length;
  for (uint64_t at = offset; at < end;) {
    SPILLWAY_CO_TRY(const Run r, co_await map_run(at, end - at));
    if (r.kind == Kind::kZero) {
      add(at, r.length, Extent::Kind::kZero);
    } else if (r.kind != Kind::kUnallocated) {
      add(at, r.length, Extent::Kind::kData);
    } else {
      const uint64_t below = backing_ && at < backing_.size() ? std::min(r.length, backing_.size() - at) : 0;
      const uint32_t block = backing_ ? backing_.volume().geometry().block_size : 512;
      if (below > 0 && is_aligned(at, block) && is_aligned(below, block)) {
        SPILLWAY_CO_TRY(std::vector<Extent> under, co_await backing_.volume().block_status(at, below));
        for (const Extent& e : under) add(e.offset, e.length, e.kind);
      } else if (below > 0) {
        add(at, below, Extent::Kind::kData);
      }
      if (below < r.length) add(at + below, r.length - below, Extent::Kind::kHole);
    }
    at += r.length;
  }
  co_return all;
}

}  // namespace spillway::qcow2
