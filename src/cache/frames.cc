#include "src/cache/frames.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include <fmt/core.h>

#include "src/base/log.h"

namespace spillway::cache {
namespace {

constexpr uint64_t kMagic = 0x3145484341435053;  // "SPCACHE1"
constexpr uint64_t kNodeBytes = 256, kTenantBytes = 256;

struct Header {
  uint64_t magic;
  uint32_t version, page_size, numa, frames;
};
struct DirectoryEntry {
  std::atomic<uint32_t> length;  // 0: unused; stored last (release)
  char text[kNodeBytes - 4];
};
static_assert(sizeof(DirectoryEntry) == kNodeBytes && kNodeBytes == kTenantBytes);

constexpr uint64_t kNodeDirectory = 4096;
constexpr uint64_t kTenantDirectory = kNodeDirectory + FrameStore::kMaxNodes * kNodeBytes;
constexpr uint64_t kEntries = kTenantDirectory + FrameStore::kMaxTenants * kTenantBytes;
static_assert(kEntries % 4096 == 0);

DirectoryEntry* directory(std::byte* table, uint64_t at) { return reinterpret_cast<DirectoryEntry*>(table + at); }

Result<Fd> make_memfd(const char* name, uint64_t bytes) {
  Fd fd(::memfd_create(name, MFD_CLOEXEC));
  if (!fd) return fail_errno(errno, fmt::format("cache: memfd {}", name));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    return fail_errno(errno, fmt::format("cache: memfd {}: {} bytes", name, bytes));
  return fd;
}

void bind_to(void* at, uint64_t bytes, int numa) {
  unsigned long mask[16] = {};
  mask[static_cast<unsigned>(numa) / 64] = 1ul << (static_cast<unsigned>(numa) % 64);
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: a full node spills over, it does not fail
  if (::syscall(__NR_mbind, at, bytes, kPreferred, mask, 1024ul, 0ul) != 0)
    log(LogLevel::kWarn, "cache", "frames of NUMA node {}: mbind: {}", numa, std::strerror(errno));
}

}  // namespace

Result<std::unique_ptr<FrameStore>> FrameStore::open(FdStore* store, int numa_nodes, uint64_t frames) {
  if (numa_nodes < 1 || numa_nodes > 64 || frames == 0 || frames >= kNoFrame)
    return fail(ErrorKind::kInvalid, fmt::format("cache: {} frames on {} NUMA nodes", frames, numa_nodes));
  std::unique_ptr<FrameStore> s(new FrameStore);
  s->numa_ = numa_nodes;
  const auto n = static_cast<uint64_t>(numa_nodes);
  frames = align_up(frames, n);
  if (store != nullptr) {
    auto held = store->get("cache/table");
    if (held && held->fds.size() == 1) {
      s->table_fd_ = std::move(held->fds[0]);
      for (int i = 0; i < numa_nodes; ++i) {
        auto f = store->get(fmt::format("cache/frames{}", i));
        if (!f || f->fds.size() != 1)
          return fail(ErrorKind::kCorrupt, fmt::format("cache: the store has a frame table but no frames{}", i));
        s->fds_.push_back(std::move(f->fds[0]));
      }
      s->adopted_ = true;
    } else if (!held && held.error().kind() != ErrorKind::kNotFound) {
      return fail(std::move(held).error());
    }
  }
  if (s->adopted_) {
    Header h{};
    if (::pread(s->table_fd_.get(), &h, sizeof h, 0) != sizeof h || h.magic != kMagic || h.version != 1 ||
        h.page_size != kPageSize || h.frames == 0)
      return fail(ErrorKind::kCorrupt, "cache: the frame table that the holder keeps is not one");
    if (h.numa != n)
      return fail(ErrorKind::kInvalid, fmt::format("cache: frames are held for {} NUMA nodes, asked for {}",
                                                   h.numa, n));
    frames = std::max<uint64_t>(frames, h.frames);  // grows by extending; frame numbers stay
  } else {
    auto table = make_memfd("spillway-cache-table", kEntries);
    if (!table) return fail(std::move(table).error());
    s->table_fd_ = std::move(*table);
    for (int i = 0; i < numa_nodes; ++i) {
      auto fd = make_memfd("spillway-cache-frames", kPageSize);
      if (!fd) return fail(std::move(fd).error());
      s->fds_.push_back(std::move(*fd));
    }
  }
  if (s->adopted_) {
    // The table is written from its start; where its last block ends, nothing was used.
    const int fd = s->table_fd_.get();
    off_t end = static_cast<off_t>(kEntries);
    for (off_t at = ::lseek(fd, end, SEEK_DATA); at >= 0; at = ::lseek(fd, end, SEEK_DATA))
      end = ::lseek(fd, at, SEEK_HOLE);
    s->scan_end_ = static_cast<FrameId>((static_cast<uint64_t>(end) - kEntries) / sizeof(TableEntry));
  }
  SPILLWAY_CHECK(s->map(frames));
  if (!s->adopted_ && store != nullptr) {
    for (int i = 0; i < numa_nodes; ++i) {
      const int fd = s->fds_[static_cast<size_t>(i)].get();
      SPILLWAY_CHECK(store->put(fmt::format("cache/frames{}", i), {&fd, 1}, {}));
    }
    // The table last: where it is, the frames are.
    const int fd = s->table_fd_.get();
    SPILLWAY_CHECK(store->put("cache/table", {&fd, 1}, {}));
  }
  return s;
}

Result<void> FrameStore::map(uint64_t frames) {
  frames_ = static_cast<FrameId>(frames);
  const uint64_t per_node = frames / static_cast<uint64_t>(numa_) * kPageSize;
  const uint64_t table_bytes = kEntries + frames * sizeof(TableEntry);
  if (::ftruncate(table_fd_.get(), static_cast<off_t>(table_bytes)) != 0)
    return fail_errno(errno, "cache: size of the frame table");
  void* t = ::mmap(nullptr, table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, table_fd_.get(), 0);
  if (t == MAP_FAILED) return fail_errno(errno, "cache: mapping the frame table");
  table_ = static_cast<std::byte*>(t);
  entries_ = reinterpret_cast<TableEntry*>(table_ + kEntries);
  for (int i = 0; i < numa_; ++i) {
    const int fd = fds_[static_cast<size_t>(i)].get();
    if (::ftruncate(fd, static_cast<off_t>(per_node)) != 0) return fail_errno(errno, "cache: size of the frames");
    void* p = ::mmap(nullptr, per_node, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED) return fail_errno(errno, "cache: mapping the frames");
    base_.push_back(static_cast<std::byte*>(p));
    if (numa_ > 1) bind_to(p, per_node, i);
  }
  void* f = ::mmap(nullptr, frames * sizeof(Frame), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (f == MAP_FAILED) return fail_errno(errno, "cache: frame descriptors");
  frame_ = static_cast<Frame*>(f);  // all-zero is a free frame
  Header h{kMagic, 1, kPageSize, static_cast<uint32_t>(numa_), frames_};
  std::memcpy(table_, &h, sizeof h);
  free_ = std::make_unique<FreeList[]>(static_cast<size_t>(numa_));
  for (int i = 0; i < numa_; ++i) free_[static_cast<size_t>(i)].limit = frames_ / static_cast<FrameId>(numa_);
  return {};
}

FrameStore::~FrameStore() {
  const uint64_t per_node = uint64_t{frames_} / static_cast<uint64_t>(numa_) * kPageSize;
  for (std::byte* b : base_) ::munmap(b, per_node);
  if (frame_ != nullptr) ::munmap(frame_, uint64_t{frames_} * sizeof(Frame));
  if (table_ != nullptr) ::munmap(table_, kEntries + uint64_t{frames_} * sizeof(TableEntry));
}

FrameId FrameStore::alloc(int numa) {
  FreeList& l = free_[static_cast<size_t>(numa)];
  std::lock_guard guard(l.lock);
  FrameId f = kNoFrame;
  if (!l.warm.empty()) {
    f = l.warm.front();
    l.warm.pop_front();
    l.warm_size.store(l.warm.size(), std::memory_order_relaxed);
  } else if (!l.cold.empty()) {
    f = l.cold.back();
    l.cold.pop_back();
  } else if (l.next < l.limit) {
    f = l.next++ * static_cast<FrameId>(numa_) + static_cast<FrameId>(numa);
  }
  if (f != kNoFrame) used_.fetch_add(1, std::memory_order_relaxed);
  return f;
}

void FrameStore::free(FrameId f) {
  FreeList& l = free_[f % static_cast<FrameId>(numa_)];
  std::lock_guard guard(l.lock);
  l.warm.push_back(f);
  l.warm_size.store(l.warm.size(), std::memory_order_relaxed);
  used_.fetch_sub(1, std::memory_order_relaxed);
}

bool FrameStore::wants_refill(uint64_t low) const {
  for (int i = 0; i < numa_; ++i)
    if (free_[static_cast<size_t>(i)].warm_size.load(std::memory_order_relaxed) < low) return true;
  return false;
}

void FrameStore::refill(uint64_t target) {
  for (int i = 0; i < numa_; ++i) {
    FreeList& l = free_[static_cast<size_t>(i)];
    std::vector<FrameId> batch;
    {
      std::lock_guard guard(l.lock);
      while (l.warm.size() + batch.size() < target) {
        if (!l.cold.empty()) {
          batch.push_back(l.cold.back());
          l.cold.pop_back();
        } else if (l.next < l.limit) {
          batch.push_back(l.next++ * static_cast<FrameId>(numa_) + static_cast<FrameId>(i));
        } else {
          break;
        }
      }
    }
    for (FrameId f : batch) {
      *reinterpret_cast<volatile std::byte*>(data(f)) = std::byte{0};  // it is nobody's
      frame_[f].refs.store(0, std::memory_order_relaxed);
      clear(f);
    }
    std::lock_guard guard(l.lock);
    l.warm.insert(l.warm.end(), batch.begin(), batch.end());
    l.warm_size.store(l.warm.size(), std::memory_order_relaxed);
  }
}

uint64_t FrameStore::warm() const {
  uint64_t n = 0;
  for (int i = 0; i < numa_; ++i) {
    FreeList& l = free_[static_cast<size_t>(i)];
    std::lock_guard guard(l.lock);
    n += l.warm.size();
  }
  return n;
}

uint64_t FrameStore::punch(uint64_t keep) {
  constexpr size_t kBatch = 4096;
  uint64_t freed = 0;
  for (int i = 0; i < numa_; ++i) {
    FreeList& l = free_[static_cast<size_t>(i)];
    for (;;) {
      std::vector<FrameId> batch;
      {
        std::lock_guard guard(l.lock);
        if (l.warm.size() <= keep) break;
        const size_t n = std::min(kBatch, l.warm.size() - static_cast<size_t>(keep));
        batch.assign(l.warm.begin(), l.warm.begin() + static_cast<ptrdiff_t>(n));  // longest free first
        l.warm.erase(l.warm.begin(), l.warm.begin() + static_cast<ptrdiff_t>(n));
        l.warm_size.store(l.warm.size(), std::memory_order_relaxed);
      }
      std::sort(batch.begin(), batch.end());
      const auto nodes = static_cast<FrameId>(numa_);
      for (size_t a = 0; a < batch.size();) {
        size_t b = a + 1;
        while (b < batch.size() && batch[b] == batch[b - 1] + nodes) ++b;
        const auto at = static_cast<off_t>(uint64_t{batch[a] / nodes} * kPageSize);
        if (::fallocate(fds_[static_cast<size_t>(i)].get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at,
                        static_cast<off_t>((b - a) * kPageSize)) == 0)
          freed += (b - a) * kPageSize;
        else
          LOG_LIMITED(LogLevel::kWarn, "cache", "giving frames back: {}", std::strerror(errno));
        a = b;
      }
      std::lock_guard guard(l.lock);
      l.cold.insert(l.cold.end(), batch.begin(), batch.end());
    }
  }
  punched_.fetch_add(freed, std::memory_order_relaxed);
  return freed;
}

uint64_t FrameStore::backed_bytes() const {
  uint64_t n = 0;
  for (auto& fd : fds_) {
    struct stat st {};
    if (::fstat(fd.get(), &st) == 0) n += static_cast<uint64_t>(st.st_blocks) * 512;
  }
  return n;
}

void FrameStore::publish(FrameId f, bool dirty) {
  Frame& fr = frame_[f];
  TableEntry& e = entries_[f];
  e.generation.store(generation_.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  // release: the data, the generation and the views are there before the word says so.
  e.word.store(TableEntry::kValid | (dirty ? TableEntry::kDirty : 0) |
                   (uint64_t{fr.node} << TableEntry::kNodeShift) | fr.page,
               std::memory_order_release);
}

void FrameStore::clear(FrameId f) {
  entries_[f].word.store(0, std::memory_order_release);
  entries_[f].views.store(0, std::memory_order_release);
}

void FrameStore::set_dirty(FrameId f, bool dirty) {
  auto& w = entries_[f].word;
  const uint64_t old = w.load(std::memory_order_relaxed);
  const uint64_t now = dirty ? old | TableEntry::kDirty : old & ~TableEntry::kDirty;
  if (old == now) return;
  w.store(now, std::memory_order_release);
  // The mark must not pass the bytes written after it: a release store orders what came before only.
  if (dirty) std::atomic_thread_fence(std::memory_order_seq_cst);
}

void FrameStore::add_view(FrameId f, uint32_t bit) {
  if (bit < kMaxTenants) entries_[f].views.fetch_or(uint64_t{1} << bit, std::memory_order_relaxed);
}
void FrameStore::drop_view(FrameId f, uint32_t bit) {
  if (bit < kMaxTenants) entries_[f].views.fetch_and(~(uint64_t{1} << bit), std::memory_order_relaxed);
}

static std::string text_of(const DirectoryEntry& e) {
  const uint32_t n = e.length.load(std::memory_order_acquire);
  return n == 0 || n > FrameStore::kMaxKey ? std::string() : std::string(e.text, n);
}

static uint32_t find_or_make(DirectoryEntry* d, uint32_t count, const std::string& text) {
  uint32_t free = count;
  for (uint32_t i = 0; i < count; ++i) {
    const std::string have = text_of(d[i]);
    if (have == text) return i;
    if (have.empty() && free == count) free = i;
  }
  if (free == count) return count;
  std::memcpy(d[free].text, text.data(), text.size());
  d[free].length.store(static_cast<uint32_t>(text.size()), std::memory_order_release);
  return free;
}

Result<uint32_t> FrameStore::node_slot(const std::string& key) {
  if (key.empty() || key.size() > kMaxKey)
    return fail(ErrorKind::kInvalid, fmt::format("cache: node key of {} bytes (1..{})", key.size(), kMaxKey));
  std::lock_guard guard(directory_lock_);
  const uint32_t i = find_or_make(directory(table_, kNodeDirectory), kMaxNodes, key);
  if (i == kMaxNodes) return fail(ErrorKind::kNoSpace, fmt::format("cache: more than {} data nodes", kMaxNodes));
  return i;
}

std::string FrameStore::node_key(uint32_t slot) const {
  return slot < kMaxNodes ? text_of(directory(table_, kNodeDirectory)[slot]) : std::string();
}

void FrameStore::free_node_slot(uint32_t slot) {
  std::lock_guard guard(directory_lock_);
  directory(table_, kNodeDirectory)[slot].length.store(0, std::memory_order_release);
}

uint32_t FrameStore::tenant_bit(const std::string& name) {
  if (name.empty() || name.size() > kMaxKey) return kNoTenant;
  std::lock_guard guard(directory_lock_);
  const uint32_t i = find_or_make(directory(table_, kTenantDirectory), kMaxTenants, name);
  return i == kMaxTenants ? kNoTenant : i;
}

bool FrameStore::knows_tenant(const std::string& name) const {
  const DirectoryEntry* d = directory(table_, kTenantDirectory);
  return !name.empty() && std::any_of(d, d + kMaxTenants, [&](auto& e) { return text_of(e) == name; });
}

void FrameStore::finish_adoption() {
  if (!adopted_) return;
  uint64_t newest = 0;
  const auto nodes = static_cast<FrameId>(numa_);
  for (FrameId f = 0; f < scan_end_; ++f) {
    newest = std::max(newest, entries_[f].generation.load(std::memory_order_relaxed));
    const bool taken = frame_[f].refs.load(std::memory_order_relaxed) != 0;
    if (taken) {
      used_.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    clear(f);
    // May be backed or not; as `warm` it is given back by the next punch at the latest.
    free_[f % nodes].warm.push_back(f);
  }
  for (FrameId i = 0; i < nodes; ++i) free_[i].warm_size.store(free_[i].warm.size(), std::memory_order_relaxed);
  for (FrameId i = 0; i < nodes; ++i) free_[i].next = (scan_end_ + nodes - 1 - i) / nodes;
  generation_.store(newest + 1, std::memory_order_relaxed);
}

}  // namespace spillway::cache
