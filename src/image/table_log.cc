#include "src/image/table_log.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "src/base/units.h"

namespace spillway::qcow2 {
namespace {

constexpr uint64_t kMagic = 0x32676f6c32716c73;  // "slq2log2"

}  // namespace

Result<std::unique_ptr<TableLog>> TableLog::open(int memory) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free);
  struct stat st {};
  if (::fstat(memory, &st) != 0) return fail_errno(errno, "image log");
  if (st.st_size != 0 && st.st_size != sizeof(Memory)) return fail(ErrorKind::kInvalid, "image log: of another size");
  if (st.st_size == 0 && ::ftruncate(memory, sizeof(Memory)) != 0) return fail_errno(errno, "image log");
  void* p = ::mmap(nullptr, sizeof(Memory), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (p == MAP_FAILED) return fail_errno(errno, "image log");
  std::unique_ptr<TableLog> log(new TableLog(static_cast<Memory*>(p)));
  Memory& m = *log->memory_;
  if (m.magic == 0) m.magic = kMagic;
  if (m.magic != kMagic || m.active.load() > 1 || m.halves[0].count.load() > kRecords || m.halves[1].count.load() > kRecords)
    return fail(ErrorKind::kInvalid, "image log: not one of ours");
  return log;
}

TableLog::~TableLog() { ::munmap(memory_, sizeof(Memory)); }

std::vector<TableLog::Record> TableLog::records() const {
  std::vector<Record> all;
  const uint32_t active = memory_->active.load();
  for (const Half* h : {&memory_->halves[active ^ 1], &memory_->halves[active]})
    all.insert(all.end(), h->records, h->records + h->count.load());
  return all;
}

bool TableLog::reserve(uint64_t n, Room& room) {
  if (n > kRecords - active().count.load(std::memory_order_relaxed) - reserved_.load(std::memory_order_relaxed)) return false;
  reserved_.fetch_add(n, std::memory_order_relaxed);
  room.give_back();
  room.log_ = this;
  room.left_ = n;
  return true;
}

// The count grows before the reservation goes: never more than there is room for.
void TableLog::append(const Record& r) {
  Half& h = memory_->halves[memory_->active.load(std::memory_order_relaxed)];
  const uint64_t n = h.count.load(std::memory_order_relaxed);
  SPILLWAY_ASSERT(n < kRecords);
  h.records[n] = r;
  h.count.store(n + 1, std::memory_order_release);
  reserved_.fetch_sub(1, std::memory_order_relaxed);
}

bool TableLog::half_full() const { return active().count.load(std::memory_order_relaxed) > kRecords / 2; }

// What many records took goes back to the host; the count first, nothing looks at them then.
void TableLog::empty(Half& h) {
  const uint64_t used = h.count.load(std::memory_order_relaxed) * sizeof(Record);
  h.count.store(0, std::memory_order_release);
  if (used > 64 * kKiB) (void)::madvise(h.records, align_up(used, 4096), MADV_REMOVE);
}

// After a cycle that failed the other half is in use still: both go with this one.
void TableLog::begin_cycle() {
  const uint32_t other = memory_->active.load(std::memory_order_relaxed) ^ 1;
  if (memory_->halves[other].count.load(std::memory_order_relaxed) != 0) return;
  memory_->active.store(other, std::memory_order_release);
}

// What the cycle has written lies in the half that is not active; what else it has written can stay.
void TableLog::end_cycle() {
  empty(memory_->halves[memory_->active.load(std::memory_order_relaxed) ^ 1]);
}

// The older half first: a newer one alone is a suffix of what happened, an older one alone is not.
void TableLog::clear() {
  const uint32_t active = memory_->active.load(std::memory_order_relaxed);
  empty(memory_->halves[active ^ 1]);
  empty(memory_->halves[active]);
}

}  // namespace spillway::qcow2
