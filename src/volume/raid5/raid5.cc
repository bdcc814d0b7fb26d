#include "src/volume/raid5/raid5.h"

#include <fmt/core.h>
#include <isa-l/raid.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "src/base/log.h"
#include "src/volume/md/layout.h"
#include "src/volume/scatter.h"

namespace spillway {
namespace {

using namespace md;

constexpr uint64_t kRowsAtOnce = 32;
constexpr uint64_t kMergedBytes = 512 * kKiB;  // of a member in one request

// to = xor of the sources; one source: a copy.
void xor_into(std::byte* to, const std::vector<const std::byte*>& from, uint64_t length) {
  if (from.size() == 1) {
    if (to != from[0]) std::memcpy(to, from[0], length);
    return;
  }
  void* array[66];
  SPILLWAY_ASSERT(from.size() < std::size(array));
  for (size_t i = 0; i < from.size(); ++i) array[i] = const_cast<std::byte*>(from[i]);
  array[from.size()] = to;
  SPILLWAY_ASSERT(::xor_gen(static_cast<int>(from.size() + 1), static_cast<int>(length), array) == 0);
}

bool xor_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }

Geometry raid5_geometry(const std::vector<MemberPtr>& slots, uint64_t chunk, bool ppl, bool read_only) {
  std::vector<VolumePtr> there;
  for (const auto& m : slots)
    if (m) there.push_back(m->volume);
  Geometry g = combine_geometry(there);
  g.min_io = static_cast<uint32_t>(chunk);
  g.opt_io = static_cast<uint32_t>(chunk * (slots.size() - 1));
  g.independent_region = 0;
  g.read_only |= read_only;
  // Whole rows are discarded as zeros, whose parity is zero. With a log every row would need an entry.
  g.discard_granularity = ppl || g.discard_granularity == 0 ? 0 : g.opt_io;
  return g;
}

class Raid5 final : public RedundantArray {
 public:
  Raid5(std::string name, uint64_t size, Geometry geometry, Raid5Init init)
      : RedundantArray(std::move(name), size, geometry, std::move(init.array)),
        chunk_(common_.chunk_bytes()),
        disks_(common_.raw.raid_disks),
        layout_(static_cast<Raid5Layout>(common_.raw.layout)),
        ppl_(init.ppl),
        ppl_offset_(init.ppl_offset),
        buffers_(chunk_, std::max<size_t>(16, std::min<size_t>(512, 64 * kMiB / chunk_))) {
    for (uint32_t i = 0; ppl_ && i < disks_; ++i) {
      PplLog::Io io;
      io.write = [this, i](uint64_t offset, Iov iov) { return write_log(i, offset, iov); };
      io.in_sync = [this] { return in_sync(); };
      io.flush_members = [this]() { return flush_members(IoContext{.io_class = IoClass::kMetadata}); };
      logs_.push_back(std::make_unique<PplLog>(ppl_signature(common_.uuid()), init.ppl_size, std::move(io)));
    }
  }
  std::string_view layer() const override { return "raid5"; }

 protected:
  bool survives(const std::vector<bool>& missing) const override {
    return std::count(missing.begin(), missing.end(), true) <= 1;
  }
  bool unsurvived_fault_is_final() const override { return true; }
  bool can_resync() const override { return !degraded(); }
  uint64_t sync_unit() const override { return chunk_; }
  std::string consistency() const override { return ppl_ ? "ppl" : RedundantArray::consistency(); }
  std::string layout_text() const override { return std::string(to_string(layout_)); }
  Task<Status> prepare_member(Member& m) override;

  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_flush(IoContext ctx) override { return flush_members(ctx); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override;
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override;
  Task<Result<uint64_t>> sync_step(Sync kind, MemberPtr target, uint64_t offset, uint64_t length) override;

 private:
  // [lo, hi) of the chunks of data disks first .. last, written whole.
  struct Rect {
    uint32_t first, last;
    uint64_t lo, hi;
  };
  using Buffers = std::vector<BufferPool::Lease>;
  struct RowWrite;

  uint64_t row_data() const { return chunk_ * (disks_ - 1); }
  uint32_t parity_of(uint64_t row) const { return parity_disk(layout_, disks_, row); }
  uint32_t disk_of(uint64_t row, uint32_t data) const { return data_disk(layout_, disks_, row, data); }
  bool usable(uint64_t row, uint32_t disk) const { return table().in_use(disk, (row + 1) * chunk_); }

  static std::vector<Rect> cut(uint64_t a, uint64_t b, uint64_t chunk);
  Task<Status> write_rows(IoContext ctx, uint64_t first, uint64_t rows, Iov iov, uint64_t skip);
  Task<Status> write_row(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip);
  Task<Status> read_row(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip);
  Task<Status> write_locked(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip);
  Task<Status> partial_parity(IoContext ctx, uint64_t row, const Rect& r, RowWrite& w);
  Task<Status> read_locked(IoContext ctx, uint64_t row, uint32_t disk, uint64_t lo, uint64_t hi, std::byte* to);
  Task<Status> reconstruct(IoContext ctx, uint64_t row, uint32_t disk, uint64_t lo, uint64_t hi, std::byte* to);
  Task<Status> read_degraded(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip);
  Task<Status> write_log(uint32_t disk, uint64_t offset, Iov iov);
  Task<Status> zero_rows(IoContext ctx, uint64_t first, uint64_t end, bool unmap);
  Task<Result<uint64_t>> sync_row(Sync kind, MemberPtr target, uint64_t row);

  const uint64_t chunk_;
  const uint32_t disks_;
  const Raid5Layout layout_;
  const bool ppl_;
  const uint64_t ppl_offset_;
  BufferPool buffers_;
  std::vector<std::unique_ptr<PplLog>> logs_;  // by slot
};

// --- reads ---

Task<Status> Raid5::do_read(IoContext ctx, uint64_t offset, Iov iov) {
  note_foreground();
  const uint64_t length = iov_length(iov);
  // Healthy: one request per member, or the member's own.
  bool healthy = true;
  {
    Scatter scatter(iov);
    std::vector<size_t> part(disks_, SIZE_MAX);
    for (uint64_t done = 0; done < length && healthy;) {
      const uint64_t at = offset + done, row = at / row_data(), in_row = at % row_data();
      const uint64_t inside = in_row % chunk_, now = std::min(length - done, chunk_ - inside);
      const uint32_t disk = disk_of(row, static_cast<uint32_t>(in_row / chunk_));
      healthy = usable(row, disk);
      if (!healthy) break;
      Member& m = *table().slots[disk];
      const uint64_t where = m.data_offset() + row * chunk_ + inside;
      if (part[disk] == SIZE_MAX || scatter.parts()[part[disk]].offset + scatter.parts()[part[disk]].length != where) {
        part[disk] = scatter.parts().size();
        scatter.add(m.volume.get(), where);
      }
      scatter.take(scatter.parts()[part[disk]], now);
      done += now;
    }
    if (healthy) {
      Status s = co_await scatter.run(Scatter::Op::kRead, ctx);
      if (s || (s.error().kind() != ErrorKind::kIo && s.error().kind() != ErrorKind::kNotFound)) co_return s;
    }
  }
  // Row by row, under the rows' locks.
  for (uint64_t done = 0; done < length;) {
    std::vector<Task<Status>> tasks;
    for (uint64_t n = 0; n < kRowsAtOnce && done < length; ++n) {
      const uint64_t at = offset + done, row = at / row_data(), in_row = at % row_data();
      const uint64_t now = std::min(length - done, row_data() - in_row);
      tasks.push_back(read_row(ctx, row, in_row, in_row + now, iov, done));
      done += now;
    }
    Status s = co_await all_of(std::move(tasks));
    s = co_await settle(std::move(s));
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> Raid5::read_row(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip) {
  co_await stripes_.of(row).lock();
  Status s = co_await read_degraded(ctx, row, a, b, iov, skip);
  stripes_.of(row).unlock();
  co_return s;
}

// Data of members that are there goes straight to the request's memory; what it already holds of the row is used for
// the missing chunk, so a whole row costs one extra read: the parity.
Task<Status> Raid5::read_degraded(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip) {
  const uint32_t d0 = static_cast<uint32_t>(a / chunk_), d1 = static_cast<uint32_t>((b - 1) / chunk_);
  std::vector<Task<Status>> tasks;
  std::vector<std::unique_ptr<IovSlice>> slices;
  uint32_t missing = UINT32_MAX;
  const auto range = [&](uint32_t d) {
    return std::pair(std::max(a, d * chunk_) - d * chunk_, std::min(b, (d + 1) * chunk_) - d * chunk_);
  };
  for (uint32_t d = d0; d <= d1; ++d) {
    const uint32_t disk = disk_of(row, d);
    if (!usable(row, disk)) {
      missing = d;
      continue;
    }
    const auto [lo, hi] = range(d);
    slices.push_back(std::make_unique<IovSlice>(iov, skip + d * chunk_ + lo - a, hi - lo));
    Member& m = *table().slots[disk];
    tasks.push_back(m.volume->read(ctx, m.data_offset() + row * chunk_ + lo, slices.back()->iov()));
  }
  Status s = co_await all_of(std::move(tasks));
  if (!s) {
    if (s.error().kind() != ErrorKind::kIo && s.error().kind() != ErrorKind::kNotFound) co_return s;
    // Somebody erred: each chunk on its own, with correction.
    for (uint32_t d = d0; d <= d1; ++d) {
      const auto [lo, hi] = range(d);
      BufferPool::Lease buffer(buffers_);
      if (!buffer) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: read", name()));
      s = co_await read_locked(ctx, row, disk_of(row, d), lo, hi, buffer.data());
      if (!s) co_return s;
      copy_to_iov(iov, skip + d * chunk_ + lo - a, buffer.data(), hi - lo);
    }
    co_return Status{};
  }
  if (missing == UINT32_MAX) co_return Status{};
  if (array_failed()) co_return failed_error();
  const auto [lo, hi] = range(missing);
  const uint64_t n = hi - lo;
  const IovSlice target(iov, skip + missing * chunk_ + lo - a, n);
  Buffers held;
  std::vector<const std::byte*> sources;
  std::vector<Task<Status>> reads;
  const auto hold = [&]() -> std::byte* {
    held.emplace_back(buffers_);
    return held.back().data();
  };
  for (uint32_t d = 0; d < disks_; ++d) {  // d == disks_ - 1: the parity
    if (d == missing) continue;
    const uint32_t disk = d == disks_ - 1 ? parity_of(row) : disk_of(row, d);
    if (d >= d0 && d <= d1 && d < disks_ - 1) {
      const auto [dlo, dhi] = range(d);
      if (dlo <= lo && dhi >= hi) {
        const IovSlice own(iov, skip + d * chunk_ + lo - a, n);
        if (own.iov().size() == 1 && xor_aligned(own.iov()[0].iov_base)) {
          sources.push_back(static_cast<const std::byte*>(own.iov()[0].iov_base));
          continue;
        }
        std::byte* copy = hold();
        if (copy == nullptr) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: read", name()));
        copy_from_iov(copy, own.iov(), 0, n);
        sources.push_back(copy);
        continue;
      }
    }
    if (!usable(row, disk)) co_return failed_error();
    std::byte* to = hold();
    if (to == nullptr) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: read", name()));
    reads.push_back(member_read(*table().slots[disk], ctx, row * chunk_ + lo, to, n));
    sources.push_back(to);
  }
  s = co_await all_of(std::move(reads));
  if (!s) co_return s;
  if (target.iov().size() == 1 && xor_aligned(target.iov()[0].iov_base)) {
    xor_into(static_cast<std::byte*>(target.iov()[0].iov_base), sources, n);
  } else {
    std::byte* out = hold();
    if (out == nullptr) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: read", name()));
    xor_into(out, sources, n);
    copy_to_iov(target.iov(), 0, out, n);
  }
  co_return Status{};
}

Task<Status> Raid5::reconstruct(IoContext ctx, uint64_t row, uint32_t disk, uint64_t lo, uint64_t hi, std::byte* to) {
  if (array_failed()) co_return failed_error();
  Buffers held;
  std::vector<const std::byte*> sources;
  std::vector<Task<Status>> reads;
  for (uint32_t q = 0; q < disks_; ++q) {
    if (q == disk) continue;
    if (!usable(row, q)) co_return failed_error();
    held.emplace_back(buffers_);
    if (!held.back()) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: reconstruct", name()));
    sources.push_back(held.back().data());
    reads.push_back(member_read(*table().slots[q], ctx, row * chunk_ + lo, held.back().data(), hi - lo));
  }
  Status s = co_await all_of(std::move(reads));
  if (!s) co_return s;
  xor_into(to, sources, hi - lo);
  co_return Status{};
}

// Under the row's lock: what `disk` holds, from itself or from the others. A read error is corrected on the spot.
Task<Status> Raid5::read_locked(IoContext ctx, uint64_t row, uint32_t disk, uint64_t lo, uint64_t hi, std::byte* to) {
  if (!usable(row, disk)) co_return co_await reconstruct(ctx, row, disk, lo, hi, to);
  MemberPtr m = table().slots[disk];
  const uint64_t at = row * chunk_ + lo;
  Status s = co_await member_read(*m, ctx, at, to, hi - lo);
  if (s || (s.error().kind() != ErrorKind::kIo && s.error().kind() != ErrorKind::kNotFound)) co_return s;
  Error why = std::move(s).error();
  if (needs_sync(at, at + hi - lo)) co_return fail(std::move(why));  // the parity is not to be trusted here
  s = co_await reconstruct(ctx, row, disk, lo, hi, to);
  if (!s && hi - lo > kPageSize) {  // bad sectors of two members in one row, at different places
    const uint64_t mid = lo + align_up((hi - lo) / 2, kPageSize);
    s = co_await read_locked(ctx, row, disk, lo, mid, to);
    if (s) s = co_await read_locked(ctx, row, disk, mid, hi, to + (mid - lo));
    co_return s;
  }
  if (!s) co_return fail(std::move(why));
  if (read_only_open()) co_return Status{};
  // Written back and read again; a member that cannot even do that is faulty.
  BufferPool::Lease check(buffers_);
  if (!check) co_return Status{};
  Status w = co_await begin_write(at, row * chunk_ + hi);
  if (!w) co_return Status{};
  w = co_await member_write(*m, ctx, at, to, hi - lo);
  if (w) w = co_await member_read(*m, ctx, at, check.data(), hi - lo);
  end_write(at, row * chunk_ + hi);
  if (w) {
    m->read_errors.fetch_add(1);
    LOG_LIMITED(LogLevel::kWarn, "volume", "volume {}: member {}: read error at {} corrected", name(), m->name, at);
  } else {
    note_fault(*m, why);
  }
  co_return Status{};
}

// --- writes ---

std::vector<Raid5::Rect> Raid5::cut(uint64_t a, uint64_t b, uint64_t chunk) {
  const uint32_t d0 = static_cast<uint32_t>(a / chunk), d1 = static_cast<uint32_t>((b - 1) / chunk);
  const uint64_t x = a - d0 * chunk, y = b - d1 * chunk;  // first byte in d0, end in d1
  if (d0 == d1) return {{d0, d0, x, y}};
  std::vector<Rect> rects;
  const auto add = [&](uint32_t first, uint32_t last, uint64_t lo, uint64_t hi) {
    if (lo >= hi || first > last) return;
    if (!rects.empty() && rects.back().first == first && rects.back().last == last && rects.back().hi == lo)
      rects.back().hi = hi;
    else
      rects.push_back({first, last, lo, hi});
  };
  if (x <= y) {
    add(d0 + 1, d1, 0, x);
    add(d0, d1, x, y);
    add(d0, d1 - 1, y, chunk);
  } else {
    add(d0 + 1, d1, 0, y);
    add(d0 + 1, d1 - 1, y, x);
    add(d0, d1 - 1, x, chunk);
  }
  return rects;
}

struct Raid5::RowWrite {
  uint32_t d0 = 0, d1 = 0;
  Buffers data;      // chunk buffers of data disks d0 .. d1: the new contents
  std::byte* parity = nullptr;
  std::byte* pp = nullptr;  // partial parity, at the same offsets
  std::byte* data_of(uint32_t d) const { return data[d - d0].data(); }
};

Task<Status> Raid5::do_write(IoContext ctx, uint64_t offset, Iov iov) {
  note_foreground();
  const uint64_t length = iov_length(iov);
  const uint64_t first = offset / row_data() * chunk_, end = ((offset + length - 1) / row_data() + 1) * chunk_;
  Status s = co_await begin_write(first, end);
  if (!s) co_return s;
  for (uint64_t done = 0; done < length && s;) {
    const uint64_t at = offset + done, row = at / row_data(), in_row = at % row_data();
    const uint64_t now = std::min(length - done, row_data() - in_row);
    if (now == length) {
      s = co_await write_row(ctx, row, in_row, in_row + now, iov, done);
      done += now;
      break;
    }
    std::vector<Task<Status>> tasks;
    for (uint64_t n = 0; n < kRowsAtOnce && done < length; ++n) {
      const uint64_t p = offset + done, r = p / row_data(), i = p % row_data();
      const uint64_t whole = i == 0 ? std::min({(length - done) / row_data(), kRowsAtOnce - n, kMergedBytes / chunk_}) : 0;
      if (whole > 1 && !ppl_) {  // (rows have their logs on different members)
        tasks.push_back(write_rows(ctx, r, whole, iov, done));
        done += whole * row_data();
        n += whole - 1;
        continue;
      }
      const uint64_t k = std::min(length - done, row_data() - i);
      tasks.push_back(write_row(ctx, r, i, i + k, iov, done));
      done += k;
    }
    s = co_await all_of(std::move(tasks));
  }
  end_write(first, end);
  co_return co_await settle(std::move(s));
}

// Whole rows: what they put on one member lies there in one piece, and is written in one.
Task<Status> Raid5::write_rows(IoContext ctx, uint64_t first, uint64_t rows, Iov iov, uint64_t skip) {
  co_await stripes_.lock_range(first, first + rows - 1);
  Status s{};
  bool healthy = !array_failed();
  for (uint32_t disk = 0; disk < disks_ && healthy; ++disk) healthy = usable(first + rows - 1, disk);
  if (!healthy) {
    for (uint64_t r = 0; r < rows && s; ++r) s = co_await write_locked(ctx, first + r, 0, row_data(), iov, skip + r * row_data());
    stripes_.unlock_range(first, first + rows - 1);
    co_return s;
  }
  Buffers held;
  held.reserve(rows * disks_);
  std::vector<std::vector<iovec>> per_disk(disks_, std::vector<iovec>(rows));
  for (uint64_t r = 0; r < rows && s; ++r) {
    std::vector<const std::byte*> sources;
    for (uint32_t d = 0; d < disks_; ++d) {  // the last one: the parity
      held.emplace_back(buffers_);
      if (!held.back()) {
        s = fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
        break;
      }
      std::byte* const to = held.back().data();
      const bool is_parity = d == disks_ - 1;
      per_disk[is_parity ? parity_of(first + r) : disk_of(first + r, d)][r] = {to, chunk_};
      if (is_parity) {
        xor_into(to, sources, chunk_);
      } else {
        copy_from_iov(to, iov, skip + r * row_data() + d * chunk_, chunk_);
        sources.push_back(to);
      }
    }
  }
  if (s && !faults_recorded()) s = co_await record_faults();
  if (s) {
    std::vector<Task<Status>> writes;
    for (uint32_t disk = 0; disk < disks_; ++disk) writes.push_back(slot_write(disk, ctx, first * chunk_, Iov(per_disk[disk])));
    s = co_await all_of(std::move(writes));
  }
  stripes_.unlock_range(first, first + rows - 1);
  co_return s;
}

Task<Status> Raid5::write_row(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip) {
  co_await stripes_.of(row).lock();
  Status s = co_await write_locked(ctx, row, a, b, iov, skip);
  stripes_.of(row).unlock();
  co_return s;
}

// Reads what the rectangle needs and leaves the partial parity in w.pp (all disks written: nothing to do).
Task<Status> Raid5::partial_parity(IoContext ctx, uint64_t row, const Rect& r, RowWrite& w) {
  const uint32_t data_disks = disks_ - 1, written = r.last - r.first + 1, others = data_disks - written;
  if (others == 0) co_return Status{};
  bool rmw = written + 1 < others;
  // Where the parity may be stale, it is made anew from the data.
  if (needs_sync(row * chunk_, (row + 1) * chunk_)) rmw = false;
  for (uint32_t d = 0; d < data_disks; ++d)
    if (!usable(row, disk_of(row, d))) rmw = d < r.first || d > r.last;
  Buffers held;
  std::vector<const std::byte*> sources;
  std::vector<Task<Status>> reads;
  for (uint32_t d = 0; d < data_disks; ++d) {
    const bool in = d >= r.first && d <= r.last;
    if (in != rmw) continue;
    held.emplace_back(buffers_);
    if (!held.back()) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
    sources.push_back(held.back().data() + r.lo);
    reads.push_back(read_locked(ctx, row, disk_of(row, d), r.lo, r.hi, held.back().data() + r.lo));
  }
  if (rmw) {
    held.emplace_back(buffers_);
    if (!held.back()) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
    sources.push_back(held.back().data() + r.lo);
    reads.push_back(read_locked(ctx, row, parity_of(row), r.lo, r.hi, held.back().data() + r.lo));
  }
  Status s = co_await all_of(std::move(reads));
  if (!s) co_return s;
  xor_into(w.pp + r.lo, sources, r.hi - r.lo);
  co_return Status{};
}

Task<Status> Raid5::write_locked(IoContext ctx, uint64_t row, uint64_t a, uint64_t b, Iov iov, uint64_t skip) {
  if (array_failed()) co_return failed_error();
  RowWrite w;
  w.d0 = static_cast<uint32_t>(a / chunk_);
  w.d1 = static_cast<uint32_t>((b - 1) / chunk_);
  w.data.reserve(w.d1 - w.d0 + 1);
  for (uint32_t d = w.d0; d <= w.d1; ++d) {
    w.data.emplace_back(buffers_);
    if (!w.data.back()) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
    const uint64_t lo = std::max(a, d * chunk_), hi = std::min(b, (d + 1) * chunk_);
    copy_from_iov(w.data_of(d) + (lo - d * chunk_), iov, skip + lo - a, hi - lo);
  }
  BufferPool::Lease parity(buffers_), pp(buffers_);
  if (!parity || !pp) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
  w.parity = parity.data();
  w.pp = pp.data();

  const uint32_t pd = parity_of(row);
  const std::vector<Rect> rects = cut(a, b, chunk_);
  const bool with_parity = usable(row, pd);
  Status s{};
  if (with_parity) {
    for (const Rect& r : rects) {
      s = co_await partial_parity(ctx, row, r, w);
      if (!s) co_return s;
      std::vector<const std::byte*> sources;
      if (r.last - r.first + 1 < disks_ - 1) sources.push_back(w.pp + r.lo);
      for (uint32_t d = r.first; d <= r.last; ++d) sources.push_back(w.data_of(d) + r.lo);
      xor_into(w.parity + r.lo, sources, r.hi - r.lo);
    }
  }
  // The reads above may have found the parity's member bad; then there is nothing to log and no parity to write.
  const bool log_it = ppl_ && usable(row, pd);
  uint64_t batch = 0;
  if (log_it) {
    std::vector<PplLog::Entry> entries;
    for (const Rect& r : rects) {
      PplLog::Entry e{};
      e.raw.data_sector = (row * row_data() + r.first * chunk_ + r.lo) / kSectorSize;
      e.raw.data_size = static_cast<uint32_t>((r.last - r.first + 1) * (r.hi - r.lo));
      e.raw.parity_disk = pd;
      if (r.last - r.first + 1 < disks_ - 1) e.partial_parity = {w.pp + r.lo, r.hi - r.lo};
      entries.push_back(e);
    }
    auto logged = co_await logs_[pd]->log(std::move(entries));
    if (!logged) {
      if (usable(row, pd)) co_return fail(std::move(logged).error());
      // The log's member went; written without it, degraded.
    } else {
      batch = *logged;
    }
  }
  // A row whose log or parity went is written only when the others say so: after a power cut the member would be
  // believed, and its log, which knows nothing of this write, would call the parity right.
  if (!faults_recorded()) {
    s = co_await record_faults();
    if (!s) {
      if (batch != 0) logs_[pd]->finish(batch);
      co_return s;
    }
  }
  std::vector<Task<Status>> writes;
  for (uint32_t d = w.d0; d <= w.d1; ++d) {
    const uint32_t disk = disk_of(row, d);
    if (!usable(row, disk)) continue;
    const uint64_t lo = std::max(a, d * chunk_) - d * chunk_, hi = std::min(b, (d + 1) * chunk_) - d * chunk_;
    writes.push_back(slot_write(disk, ctx, row * chunk_ + lo, w.data_of(d) + lo, hi - lo));
  }
  if (with_parity && usable(row, pd)) {
    // Neighbouring rectangles are one write.
    for (size_t i = 0; i < rects.size();) {
      uint64_t hi = rects[i].hi;
      size_t k = i + 1;
      while (k < rects.size() && rects[k].lo == hi) hi = rects[k++].hi;
      writes.push_back(slot_write(pd, ctx, row * chunk_ + rects[i].lo, w.parity + rects[i].lo, hi - rects[i].lo));
      i = k;
    }
  }
  s = co_await all_of(std::move(writes));
  if (batch != 0) logs_[pd]->finish(batch);
  co_return s;
}

Task<Status> Raid5::write_log(uint32_t disk, uint64_t offset, Iov iov) {
  MemberPtr m = table().slots[disk];
  if (!m || m->state.load() != MemberState::kActive) {
    // A member that is being rebuilt has a log too, once the row is below `recovered`.
    if (!m || m->state.load() != MemberState::kRebuilding) co_return failed_error();
  }
  IoContext ctx;
  ctx.io_class = IoClass::kForeground;
  ctx.fua = true;
  Status s = co_await m->volume->write(ctx, ppl_offset_ + offset, iov);
  if (!s) note_fault(*m, s.error());
  co_return s;
}

Task<Status> Raid5::prepare_member(Member& m) {
  if (!ppl_) co_return Status{};
  auto header = empty_ppl_header(ppl_signature(common_.uuid()));
  AlignedBuffer page(header.size());
  if (!page) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: log", name()));
  std::memcpy(page.data(), header.data(), header.size());
  const iovec v = page.iov();
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  ctx.fua = true;
  co_return co_await m.volume->write(ctx, ppl_offset_, Iov(&v, 1));
}

// --- zeros ---

Task<Status> Raid5::zero_rows(IoContext ctx, uint64_t first, uint64_t end, bool unmap) {
  Status s = co_await begin_write(first * chunk_, end * chunk_);
  if (!s) co_return s;
  for (uint64_t row = first; row < end && s; row += StripeLocks::kLocks) {
    const uint64_t stop = std::min(end, row + StripeLocks::kLocks);
    co_await stripes_.lock_range(row, stop - 1);
    std::vector<Task<Status>> tasks;
    auto one = [](Raid5* self, MemberPtr m, IoContext c, uint64_t at, uint64_t n, bool u) -> Task<Status> {
      Status r = co_await m->volume->write_zeroes(c, m->data_offset() + at, n, u);
      if (!r && !self->note_fault(*m, r.error())) co_return r;
      co_return Status{};
    };
    for (const auto* list : {&table().slots, &table().replacements})
      for (const auto& m : *list) {
        if (!m || m->state.load() == MemberState::kFaulty) continue;
        tasks.push_back(one(this, m, ctx, row * chunk_, (stop - row) * chunk_, unmap));
      }
    s = co_await all_of(std::move(tasks));
    stripes_.unlock_range(row, stop - 1);
  }
  end_write(first * chunk_, end * chunk_);
  co_return co_await settle(std::move(s));
}

Task<Status> Raid5::do_discard(IoContext ctx, uint64_t offset, uint64_t length) {
  const uint64_t first = (offset + row_data() - 1) / row_data(), end = (offset + length) / row_data();
  if (first >= end) return Task<Status>::ready();
  return zero_rows(ctx, first, end, true);
}

Task<Status> Raid5::do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) {
  const uint64_t first = (offset + row_data() - 1) / row_data(), end = (offset + length) / row_data();
  if (ppl_ || first >= end) co_return co_await Volume::do_write_zeroes(ctx, offset, length, unmap);
  const uint64_t head = first * row_data() - offset, tail = offset + length - end * row_data();
  if (head > 0) SPILLWAY_CO_CHECK(co_await Volume::do_write_zeroes(ctx, offset, head, unmap));
  if (tail > 0) SPILLWAY_CO_CHECK(co_await Volume::do_write_zeroes(ctx, end * row_data(), tail, unmap));
  co_return co_await zero_rows(ctx, first, end, unmap);
}

// --- resync, rebuild, scrub ---

Task<Result<uint64_t>> Raid5::sync_step(Sync kind, MemberPtr target, uint64_t offset, uint64_t length) {
  uint64_t differ = 0;
  for (uint64_t row = offset / chunk_; row * chunk_ < offset + length; ++row) {
    co_await stripes_.of(row).lock();
    auto r = co_await sync_row(kind, target, row);
    stripes_.of(row).unlock();
    if (!r) co_return r;
    differ += *r;
  }
  co_return differ;
}

Task<Result<uint64_t>> Raid5::sync_row(Sync kind, MemberPtr target, uint64_t row) {
  IoContext ctx;
  ctx.io_class = kind == Sync::kCheck || kind == Sync::kRepair ? IoClass::kScrub : IoClass::kRebuild;
  const auto no_memory = [&] { return fail(ErrorKind::kNoMemory, fmt::format("volume {}: resync", name())); };
  BufferPool::Lease computed(buffers_);
  if (!computed) co_return no_memory();
  if (kind == Sync::kRebuild) {
    // A replacement is copied from the member in use, where that can be read; a slot's own target cannot.
    const uint32_t slot = static_cast<uint32_t>(target->slot);
    Status s{};  // (no co_await inside ?: , GCC 12 evaluates both sides)
    if (table().slots[slot] == target) s = co_await reconstruct(ctx, row, slot, 0, chunk_, computed.data());
    else s = co_await read_locked(ctx, row, slot, 0, chunk_, computed.data());
    if (!s) co_return fail(std::move(s).error());
    s = co_await member_write(*target, ctx, row * chunk_, computed.data(), chunk_);
    if (!s) {
      note_fault(*target, s.error());
      co_return fail(std::move(s).error());
    }
    target->recovered.store((row + 1) * chunk_, std::memory_order_release);
    co_return 0;
  }
  const uint32_t pd = parity_of(row);
  Buffers held;
  std::vector<const std::byte*> sources;
  std::vector<Task<Status>> reads;
  for (uint32_t q = 0; q < disks_; ++q) {
    if (!usable(row, q)) co_return fail(failed_error().error());
    if (q == pd) continue;
    held.emplace_back(buffers_);
    if (!held.back()) co_return no_memory();
    sources.push_back(held.back().data());
    reads.push_back(read_locked(ctx, row, q, 0, chunk_, held.back().data()));
  }
  BufferPool::Lease parity(buffers_);
  if (!parity) co_return no_memory();
  reads.push_back(read_locked(ctx, row, pd, 0, chunk_, parity.data()));
  Status s = co_await all_of(std::move(reads));
  if (!s && kind == Sync::kResync && table().slots[pd]->in_use((row + 1) * chunk_)) {
    // The parity's own read error is no obstacle: it is written anew.
    reads.clear();
    for (uint32_t q = 0, k = 0; q < disks_; ++q)
      if (q != pd) reads.push_back(read_locked(ctx, row, q, 0, chunk_, const_cast<std::byte*>(sources[k++])));
    s = co_await all_of(std::move(reads));
    std::memset(parity.data(), 0xff, chunk_);
  }
  if (!s) co_return fail(std::move(s).error());
  xor_into(computed.data(), sources, chunk_);
  uint64_t differ = 0;
  for (uint64_t i = 0; i < chunk_; i += kSectorSize)
    differ += std::memcmp(computed.data() + i, parity.data() + i, kSectorSize) != 0;
  if (differ != 0 && kind != Sync::kCheck) {
    s = co_await slot_write(pd, ctx, row * chunk_, computed.data(), chunk_);
    if (!s) co_return fail(std::move(s).error());
  }
  co_return differ;
}

}  // namespace

Result<std::shared_ptr<md::RedundantArray>> make_raid5(std::string name, Raid5Init init) {
  const auto& sb = init.array.sb;
  const Geometry geometry = raid5_geometry(init.array.slots, sb.chunk_bytes(), init.ppl, init.array.read_only);
  if (sb.raw.raid_disks > 64)
    return fail(ErrorKind::kUnsupported, fmt::format("volume {}: raid5 of {} members", name, sb.raw.raid_disks));
  if (sb.chunk_bytes() % geometry.block_size != 0)
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: chunk {} is no multiple of the block size {}", name,
                                                 sb.chunk_bytes(), geometry.block_size));
  if (init.ppl && !init.array.read_only && init.ppl_size < kPplHeaderSize + sb.chunk_bytes())
    return fail(ErrorKind::kUnsupported, fmt::format("volume {}: partial parity log of {} bytes is too small for chunk {}",
                                                     name, init.ppl_size, sb.chunk_bytes()));
  const uint64_t component = align_down(sb.raw.size * kSectorSize, sb.chunk_bytes());
  const uint64_t size = component * (sb.raw.raid_disks - 1);
  return std::make_shared<Raid5>(std::move(name), size, geometry, std::move(init));
}

static Task<Result<PplReplay>> replay_member(const Raid5Init& init, uint32_t slot) {
  const ArrayInit& a = init.array;
  const MemberPtr log_member = a.slots[slot];
  const uint64_t chunk = a.sb.chunk_bytes(), disks = a.sb.raw.raid_disks, rows = a.sb.raw.size * kSectorSize / chunk;
  const auto layout = static_cast<Raid5Layout>(a.sb.raw.layout);
  AlignedBuffer area(align_down(init.ppl_size, kSectorSize));
  if (!area) co_return fail(ErrorKind::kNoMemory, "partial parity log");
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  const iovec v = area.iov();
  Status s = co_await log_member->volume->read(ctx, init.ppl_offset, Iov(&v, 1));
  if (!s) co_return fail(std::move(s).error());
  PplReplay done;
  uint64_t unit = kSectorSize;
  for (const MemberPtr& m : a.slots)
    if (m) unit = std::max<uint64_t>(unit, m->volume->geometry().block_size);
  AlignedBuffer parity_page(kPageSize), block_page(kPageSize);
  if (!parity_page || !block_page) co_return fail(ErrorKind::kNoMemory, "partial parity log");
  std::byte *const parity = parity_page.data(), *const block = block_page.data();
  const auto entries = parse_ppl({area.data(), area.size()}, ppl_signature(a.sb.uuid()));
  if (!entries) {
    ++done.mismatches;
    co_return done;
  }
  for (const PplEntry& e : *entries) {
    if (!e.valid) {  // torn: its data was never written
      ++done.mismatches;
      continue;
    }
    // Modified range, as the kernel reads an entry: per chunk `strip` bytes from the same offset, up to `last`.
    const uint64_t first = e.raw.data_sector * kSectorSize, pp = e.raw.pp_size, data = e.raw.data_size;
    uint64_t strip, last;
    if (pp < chunk) {
      const uint64_t n = pp > 0 ? data / pp : disks - 1;
      strip = pp > 0 ? pp : data / (disks - 1);
      last = first + (std::max<uint64_t>(n, 1) - 1) * chunk + strip;
    } else {
      strip = chunk;
      last = first + data;
    }
    const uint64_t row_bytes = chunk * (disks - 1);
    if (strip == 0 || strip > chunk || pp % unit != 0 || strip % unit != 0 || first % unit != 0 || data == 0 ||
        first / row_bytes >= rows || last > rows * row_bytes || (pp > 0 && e.partial_parity.size() < strip))
      co_return fail(ErrorKind::kCorrupt, fmt::format("member {}: partial parity log: entry at {} of {} bytes",
                                                      log_member->name, first, data));
    for (uint64_t i = 0; i < strip; i += unit) {
      std::memset(parity, 0, unit);
      bool update = false, lost = false;
      for (uint64_t d = 0; d < disks - 1 && !lost; ++d) {
        const uint64_t at = first + i + d * chunk;
        if (at >= last) break;
        const uint64_t row = at / row_bytes, in_row = at % row_bytes;
        const uint32_t disk = data_disk(layout, static_cast<uint32_t>(disks), row, static_cast<uint32_t>(in_row / chunk));
        const MemberPtr& m = a.slots[disk];
        if (!m || !m->in_use((row + 1) * chunk)) {
          lost = true;  // in flight on a member that is gone: neither old nor new can be promised
          break;
        }
        const iovec b{block, unit};
        s = co_await m->volume->read(ctx, m->data_offset() + row * chunk + in_row % chunk, Iov(&b, 1));
        if (!s) co_return fail(std::move(s).error());
        for (size_t k = 0; k < unit; ++k) parity[k] ^= block[k];
        update = true;
      }
      if (lost || !update) continue;
      if (pp > 0)
        for (size_t k = 0; k < unit; ++k) parity[k] ^= e.partial_parity[i + k];
      const uint64_t row = (first + i) / row_bytes;
      if (parity_disk(layout, static_cast<uint32_t>(disks), row) != slot)
        co_return fail(ErrorKind::kCorrupt, fmt::format("member {}: partial parity log: entry at {} belongs to another member",
                                                        log_member->name, first));
      const iovec p{parity, unit};
      s = co_await log_member->volume->write(ctx, log_member->data_offset() + row * chunk + (first + i) % chunk, Iov(&p, 1));
      if (!s) co_return fail(std::move(s).error());
    }
    ++done.entries;
  }
  co_return done;
}

Task<Result<PplReplay>> replay_ppl(const Raid5Init& init) {
  PplReplay all;
  for (uint32_t slot = 0; slot < init.array.slots.size(); ++slot) {
    const MemberPtr& m = init.array.slots[slot];
    if (!m || m->state.load() == MemberState::kFaulty) continue;
    auto r = co_await replay_member(init, slot);
    if (!r) co_return r;
    all.entries += r->entries;
    all.mismatches += r->mismatches;
  }
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  for (const MemberPtr& m : init.array.slots) {
    if (!m) continue;
    Status s = co_await m->volume->flush(ctx);
    if (!s) co_return fail(std::move(s).error());
  }
  co_return all;
}

Task<Status> reset_ppl(const Raid5Init& init) {
  auto header = empty_ppl_header(ppl_signature(init.array.sb.uuid()));
  AlignedBuffer page(align_down(init.ppl_size, kSectorSize));
  if (!page) co_return fail(ErrorKind::kNoMemory, "partial parity log");
  std::memset(page.data(), 0, page.size());
  std::memcpy(page.data(), header.data(), header.size());
  IoContext ctx;
  ctx.io_class = IoClass::kMetadata;
  ctx.fua = true;
  for (const auto* list : {&init.array.slots, &init.array.replacements, &init.array.spares})
    for (const MemberPtr& m : *list) {
      if (!m) continue;
      const iovec v = page.iov();
      SPILLWAY_CO_CHECK(co_await m->volume->write(ctx, init.ppl_offset, Iov(&v, 1)));
    }
  co_return Status{};
}

}  // namespace spillway
