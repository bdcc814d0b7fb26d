#include "src/export/fuse/file.h"

#include <fmt/core.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "src/base/log.h"

namespace spillway {

namespace {

constexpr uint8_t kHeatMax = 6;
constexpr uint64_t kEvictRunMax = 64 * kMiB;  // one round of write back, page out, drop
constexpr int kEvictRounds = 3;
constexpr long kCachestat = 451;              // the number is the same on every architecture

struct CachestatRange {
  uint64_t off, len;
};
struct Cachestat {
  uint64_t cache, dirty, writeback, evicted, recently_evicted;
};

int64_t now_ns() {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * 1'000'000'000 + ts.tv_nsec;
}

bool all_zero(const std::byte* p, size_t n) {
  // The first words decide for nearly all pages; then a compare of the page with itself, one word further.
  uint64_t first;
  std::memcpy(&first, p, sizeof first);
  return first == 0 && std::memcmp(p, p + sizeof first, n - sizeof first) == 0;
}

}  // namespace

PmemFile::PmemFile(PmemFileOptions options, uint64_t node)
    : options_(std::move(options)),
      size_(options_.volume->size()),
      node_(node),
      chunks_(align_up(options_.volume->size(), kChunk) / kChunk) {}

PmemFile::~PmemFile() = default;

// ---- served ----------------------------------------------------------------------------------------------------

IoContext PmemFile::context(IoClass io_class) const {
  IoContext ctx;
  ctx.group = options_.group;
  ctx.io_class = io_class;
  return ctx;
}

void PmemFile::note_fault(uint64_t offset, uint64_t length) {
  for (uint64_t c = offset / kChunk; c <= (offset + length - 1) / kChunk && c < chunks_.size(); ++c) {
    Chunk& chunk = chunks_[c];
    // relaxed everywhere: a lost count only makes the hand a little less clever.
    if (!chunk.taken.load(std::memory_order_relaxed) || !chunk.taken.exchange(false, std::memory_order_relaxed))
      continue;
    counters_.refaults.fetch_add(1, std::memory_order_relaxed);
    const uint8_t heat = chunk.heat.load(std::memory_order_relaxed);
    chunk.heat.store(static_cast<uint8_t>(std::min<int>(heat + 2, kHeatMax)), std::memory_order_relaxed);
  }
}

Task<Status> PmemFile::read(uint64_t offset, uint32_t length, std::span<std::byte> scratch, std::byte** at) {
  const uint32_t block = options_.volume->geometry().block_size;
  const uint64_t begin = align_down(offset, block), end = align_up(offset + length, block);
  if (length == 0 || end > size_ || end - begin > scratch.size())
    co_return fail(ErrorKind::kOutOfRange, fmt::format("pmem {}: read {} at {}", name(), length, offset));
  note_fault(offset, length);
  const iovec one{scratch.data(), static_cast<size_t>(end - begin)};
  Status s = co_await options_.volume->read(context(IoClass::kForeground), begin, Iov(&one, 1));
  if (!s) {
    fail_count();
    co_return s;
  }
  counters_.reads.fetch_add(1, std::memory_order_relaxed);
  counters_.read_bytes.fetch_add(length, std::memory_order_relaxed);
  *at = scratch.data() + (offset - begin);
  co_return Status{};
}

Task<Status> PmemFile::read_ahead(uint64_t offset, std::span<std::byte> to) {
  const iovec one{to.data(), to.size()};
  Status s = co_await options_.volume->read(context(IoClass::kReadAhead), offset, Iov(&one, 1));
  co_return s;
}

void PmemFile::served_ahead(uint64_t offset, uint64_t length) {
  note_fault(offset, length);
  counters_.reads.fetch_add(1, std::memory_order_relaxed);
  counters_.read_bytes.fetch_add(length, std::memory_order_relaxed);
  counters_.ahead_bytes.fetch_add(length, std::memory_order_relaxed);
}

Task<Status> PmemFile::write_plain(uint64_t offset, const std::byte* data, uint64_t length) {
  const iovec one{const_cast<std::byte*>(data), static_cast<size_t>(length)};
  Status s = co_await options_.volume->write(context(IoClass::kWriteback), offset, Iov(&one, 1));
  co_return s;
}

// Cuts runs of zero pages out and punches them, where the volume can give space back.
Task<Status> PmemFile::write_aligned(uint64_t offset, std::span<const std::byte> data) {
  const Geometry& g = options_.volume->geometry();
  const uint64_t grain = std::max<uint64_t>(g.discard_granularity, kPageSize);
  const bool may_punch = options_.punch_min_bytes != 0 && g.discard_granularity != 0;
  const uint64_t punch_min = std::max(options_.punch_min_bytes, grain);
  uint64_t written = 0, at = 0;  // [0, written) of data is done; [written, at) is to be written
  while (may_punch && at + punch_min <= data.size()) {
    // A run that is worth punching covers a multiple of punch_min: probing there first keeps the scan cheap.
    uint64_t run = at;
    while (run + kPageSize <= data.size() && all_zero(data.data() + run, kPageSize)) run += kPageSize;
    const uint64_t first = align_up(offset + at, grain), last = align_down(offset + run, grain);
    if (last < first + punch_min) {
      at = run + kPageSize;
      continue;
    }
    if (first - offset > written) {
      Status s = co_await write_plain(offset + written, data.data() + written, first - offset - written);
      if (!s) co_return s;
    }
    Status s = co_await options_.volume->write_zeroes(context(IoClass::kWriteback), first, last - first, true);
    if (!s) co_return s;
    counters_.punches.fetch_add(1, std::memory_order_relaxed);
    counters_.punched_bytes.fetch_add(last - first, std::memory_order_relaxed);
    written = last - offset;
    at = std::max(run, written);
  }
  if (written < data.size()) {
    Status s = co_await write_plain(offset + written, data.data() + written, data.size() - written);
    if (!s) co_return s;
  }
  co_return Status{};
}

Task<Status> PmemFile::write(uint64_t offset, std::span<const std::byte> data, std::span<std::byte> scratch) {
  const uint32_t block = options_.volume->geometry().block_size;
  const uint64_t begin = align_down(offset, block), end = align_up(offset + data.size(), block);
  if (data.empty() || end > size_ || end - begin > scratch.size())
    co_return fail(ErrorKind::kOutOfRange, fmt::format("pmem {}: write {} at {}", name(), data.size(), offset));
  Status s;
  if (begin == offset && end == offset + data.size()) {
    s = co_await write_aligned(offset, data);
  } else {
    co_await unaligned_.lock();
    const iovec one{scratch.data(), static_cast<size_t>(end - begin)};
    s = co_await options_.volume->read(context(IoClass::kForeground), begin, Iov(&one, 1));
    if (s) {
      std::memcpy(scratch.data() + (offset - begin), data.data(), data.size());
      s = co_await write_plain(begin, scratch.data(), end - begin);
    }
    unaligned_.unlock();
  }
  if (!s) {
    fail_count();
    co_return s;
  }
  counters_.writes.fetch_add(1, std::memory_order_relaxed);
  counters_.write_bytes.fetch_add(data.size(), std::memory_order_relaxed);
  co_return Status{};
}

Task<Status> PmemFile::flush() {
  Status s = co_await options_.volume->flush(context(IoClass::kForeground));
  if (!s) fail_count();
  counters_.flushes.fetch_add(1, std::memory_order_relaxed);
  co_return s;
}

Task<Status> PmemFile::punch(uint64_t offset, uint64_t length) {
  const uint32_t block = options_.volume->geometry().block_size;
  if (length == 0 || offset >= size_) co_return Status{};  // beyond the end: nothing to do, as on any file
  length = std::min(length, size_ - offset);
  if (!is_aligned(offset, block) || !is_aligned(length, block))
    co_return fail(ErrorKind::kInvalid, fmt::format("pmem {}: punch {} at {}: not whole blocks", name(), length, offset));
  Status s = co_await options_.volume->write_zeroes(context(IoClass::kForeground), offset, length, true);
  if (!s) fail_count();
  else counters_.punched_bytes.fetch_add(length, std::memory_order_relaxed);
  co_return s;
}

void PmemFile::request_held(bool held) {
  if (held) {
    int64_t none = 0;
    held_since_ns_.compare_exchange_strong(none, now_ns());
    held_.fetch_add(1);
  } else if (held_.fetch_sub(1) == 1) {
    held_since_ns_.store(0);
  }
}

std::chrono::nanoseconds PmemFile::stalled() const {
  const int64_t since = held_since_ns_.load();
  return std::chrono::nanoseconds(since == 0 ? 0 : std::max<int64_t>(1, now_ns() - since));
}

// ---- used ------------------------------------------------------------------------------------------------------

Status PmemFile::sync() {
  if (options_.read_only) return {};
  if (!sync_agent_) return fail(ErrorKind::kCanceled, fmt::format("pmem {}: sync: stopped", name()));
  auto r = sync_agent_->call(fuse::Agent::Op::kSync, 0, 0);
  if (!r) return fail(std::move(r).error().with_context(fmt::format("pmem {}: sync", name())));
  return {};
}

void PmemFile::attach(Fd fd, int channel) {
  fd_ = std::move(fd);
  sync_agent_ = std::make_unique<fuse::Agent>(fd_.get(), -1);
  evict_agent_ = std::make_unique<fuse::Agent>(fd_.get(), options_.read_only ? channel : -1);
}

void PmemFile::detach() {
  if (sync_agent_) sync_agent_->close();
  if (evict_agent_) evict_agent_->close();
  fd_.reset();
}

Status PmemFile::punch_hole(uint64_t offset, uint64_t length) {
  if (options_.read_only) return fail(ErrorKind::kReadOnly, fmt::format("pmem {}: punch", name()));
  if (!evict_agent_) return fail(ErrorKind::kCanceled, fmt::format("pmem {}: punch: stopped", name()));
  auto r = evict_agent_->call(fuse::Agent::Op::kPunch, offset, length);
  if (!r) return fail(std::move(r).error().with_context(fmt::format("pmem {}: punch", name())));
  return {};
}

Result<PmemFile::Residency> PmemFile::residency(uint64_t offset, uint64_t length) const {
  CachestatRange range{offset, length};
  Cachestat out{};
  if (::syscall(kCachestat, fd_.get(), &range, &out, 0) != 0)
    return fail_errno(errno, fmt::format("pmem {}: cachestat", name()));
  Residency r;
  r.cached = out.cache * kPageSize;
  r.dirty = out.dirty * kPageSize;
  r.writeback = out.writeback * kPageSize;
  return r;
}

void PmemFile::add_mapper(pid_t pid) {
  if (pid <= 0) return;
  std::lock_guard lock(mutex_);
  mappers_.insert(pid);
}

void PmemFile::remove_mapper(pid_t pid) {
  std::lock_guard lock(mutex_);
  if (auto it = mappers_.find(pid); it != mappers_.end()) mappers_.erase(it);
}

bool PmemFile::add_opener(pid_t pid) {
  if (pid <= 0) return false;
  std::lock_guard lock(mutex_);
  std::erase_if(openers_, [](pid_t p) { return ::kill(p, 0) != 0 && errno == ESRCH; });
  return openers_.insert(pid).second;
}

std::vector<pid_t> PmemFile::openers() const {
  std::lock_guard lock(mutex_);
  return {openers_.begin(), openers_.end()};
}

std::vector<pid_t> PmemFile::mappers() const {
  std::lock_guard lock(mutex_);
  std::set<pid_t> all(openers_);
  all.insert(mappers_.begin(), mappers_.end());
  return {all.begin(), all.end()};
}

// The VMM's own addresses of the file's range, from its /proc/PID/maps ("from-to perms offset major:minor inode").
static std::vector<iovec> mapped_ranges(pid_t pid, const struct stat& st, uint64_t offset, uint64_t length) {
  std::vector<iovec> out;
  std::ifstream maps(fmt::format("/proc/{}/maps", pid));
  std::string line;
  while (std::getline(maps, line)) {
    unsigned long from = 0, to = 0, file_offset = 0, inode = 0;
    unsigned dev_major = 0, dev_minor = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx %*s %lx %x:%x %lu", &from, &to, &file_offset, &dev_major, &dev_minor,
                    &inode) != 6)
      continue;
    if (inode != st.st_ino || dev_major != major(st.st_dev) || dev_minor != minor(st.st_dev)) continue;
    const uint64_t begin = std::max<uint64_t>(offset, file_offset);
    const uint64_t end = std::min<uint64_t>(offset + length, file_offset + (to - from));
    if (begin < end) out.push_back({reinterpret_cast<void*>(from + (begin - file_offset)), end - begin});
  }
  return out;
}

bool PmemFile::page_out(pid_t pid, uint64_t offset, uint64_t length) {
  struct stat st{};
  if (::fstat(fd_.get(), &st) != 0) return true;
  const std::vector<iovec> all = mapped_ranges(pid, st, offset, length);
  for (size_t i = 0; i < all.size(); i += fuse::Agent::kMaxRanges) {
    const std::span<const iovec> some(all.data() + i, std::min(fuse::Agent::kMaxRanges, all.size() - i));
    const auto r = evict_agent_->call(fuse::Agent::Op::kPageOut, 0, 0, pid, some);
    if (!r && r.error().to_errno() != ESRCH) return false;
  }
  return true;
}

Result<PmemFile::Evicted> PmemFile::evict(uint64_t offset, uint64_t length) {
  if (length == 0 || offset >= size_ || !is_aligned(offset | length, kPageSize))
    return fail(ErrorKind::kInvalid, fmt::format("pmem {}: evict {} at {}", name(), length, offset));
  length = std::min(length, size_ - offset);
  counters_.evict_calls.fetch_add(1, std::memory_order_relaxed);
  SPILLWAY_TRY(const Residency before, residency(offset, length));
  Evicted e;
  e.before = before.cached;
  if (before.cached == 0) return e;
  if (!evict_agent_) return fail(ErrorKind::kCanceled, fmt::format("pmem {}: evict: stopped", name()));
  if (!options_.read_only && before.dirty + before.writeback != 0) {
    // Large sequential writes first; PAGEOUT alone would leave dirty pages, an invalidation writes them one by one.
    auto r = evict_agent_->call(fuse::Agent::Op::kWriteBack, offset, length);
    if (!r) return fail(std::move(r).error().with_context(fmt::format("pmem {}: write back", name())));
    e.written = before.dirty;
  }
  Residency after = before;
  for (int round = 0; round < kEvictRounds && after.cached != 0; ++round) {
    if (options_.read_only) {
      // Nothing is dirty and nothing can be a DMA target; PAGEOUT would skip pages that several guests map.
      auto r = evict_agent_->call(fuse::Agent::Op::kInvalidate, offset, length, static_cast<int64_t>(node_));
      if (!r) return std::unexpected(std::move(r).error());
    } else {
      // The last pages that another processor faulted in (up to 31) are in that processor's batch and on no LRU list yet:
      // page-out cannot isolate them, so they stay mapped, and the drop fails on them. But that failure makes the kernel
      // drain the batches of all processors, and the next round takes them.
      for (pid_t pid : mappers()) e.remote_refused |= !page_out(pid, offset, length);
      (void)evict_agent_->call(fuse::Agent::Op::kDrop, offset, length);
    }
    SPILLWAY_TRY(after, residency(offset, length));
    if (e.remote_refused) break;
  }
  e.freed = before.cached - std::min(after.cached, before.cached);
  counters_.evicted_bytes.fetch_add(e.freed, std::memory_order_relaxed);
  counters_.evict_written_bytes.fetch_add(e.written, std::memory_order_relaxed);
  if (e.remote_refused) counters_.evict_refused.fetch_add(1, std::memory_order_relaxed);
  return e;
}

PmemFile::Turn PmemFile::evict_cold(uint64_t want, uint64_t chunks, bool ignore_heat) {
  Turn turn;
  std::unique_lock lock(hand_mutex_, std::try_to_lock);
  if (!lock) return turn;
  chunks = std::min<uint64_t>(chunks, chunks_.size());
  uint64_t run_begin = 0, run_end = 0;  // chunks to evict in one go
  auto take_run = [&] {
    if (run_begin == run_end) return;
    for (uint64_t c = run_begin; c < run_end; ++c) chunks_[c].taken.store(true, std::memory_order_relaxed);
    const uint64_t begin = run_begin * kChunk, end = std::min(run_end * kChunk, size_);
    run_begin = run_end = 0;
    auto e = evict(begin, end - begin);
    if (!e) {
      LOG_LIMITED(LogLevel::kWarn, "pmem", "{}", e.error().message());
      return;
    }
    turn.freed += e->freed;
    turn.written += e->written;
    turn.refused |= e->remote_refused;
  };
  uint64_t planned = 0;
  while (turn.chunks < chunks && turn.freed + planned < want) {
    const uint64_t c = hand_;
    hand_ = (hand_ + 1) % chunks_.size();
    ++turn.chunks;
    Chunk& chunk = chunks_[c];
    const auto here = residency(c * kChunk, kChunk);
    const bool resident = here && here->cached != 0;
    const uint8_t heat = chunk.heat.load(std::memory_order_relaxed);
    if (resident && heat != 0 && !ignore_heat) {
      chunk.heat.store(heat - 1, std::memory_order_relaxed);
      ++turn.warm;
    } else if (resident) {
      if (run_end != c || run_begin == run_end || (run_end - run_begin) * kChunk >= kEvictRunMax) {
        take_run();
        planned = 0;
        run_begin = c;
      }
      run_end = c + 1;
      planned += here->cached;
      continue;
    }
    if (!resident) chunk.taken.store(false, std::memory_order_relaxed);  // not touched for a whole turn
  }
  take_run();
  return turn;
}

std::string PmemFile::to_text() const {
  const auto& c = counters_;
  auto v = [](const std::atomic<uint64_t>& a) { return a.load(std::memory_order_relaxed); };
  std::string text = fmt::format("file: {} node {} {}{}\n", name(), node_, format_size(size_),
                                 options_.read_only ? " read-only" : "");
  if (auto r = fd_ ? residency() : fail(ErrorKind::kNotFound); r)
    text += fmt::format("resident: {} dirty {} writeback {}\n", format_size(r->cached), format_size(r->dirty),
                        format_size(r->writeback));
  text += fmt::format("served: reads {} ({}, {} of it read ahead) writes {} ({}) flushes {} punched {} errors {} held {}\n", v(c.reads),
                      format_size(v(c.read_bytes)), format_size(v(c.ahead_bytes)), v(c.writes), format_size(v(c.write_bytes)), v(c.flushes),
                      format_size(v(c.punched_bytes)), v(c.errors), held_.load());
  text += fmt::format("evicted: {} in {} calls, {} written first, {} chunks came back\n",
                      format_size(v(c.evicted_bytes)), v(c.evict_calls), format_size(v(c.evict_written_bytes)),
                      v(c.refaults));
  if (v(c.evict_refused) != 0)
    text += "warning: no permission to page out the VMM's mapping (process_madvise needs CAP_SYS_NICE and ptrace "
            "access): mapped pages stay\n";
  return text;
}

}  // namespace spillway
