#include "src/image/table_log.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace spillway::qcow2 {
namespace {

constexpr uint64_t kMagic = 0x31676f6c32716c73;  // "slq2log1"

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
  log->full_ = m.halves[m.active.load()].count.load() == kRecords;
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

bool TableLog::append(const Record& r) {
  Half& h = memory_->halves[memory_->active.load(std::memory_order_relaxed)];
  const uint64_t n = h.count.load(std::memory_order_relaxed);
  if (n == kRecords) {
    full_.store(true, std::memory_order_relaxed);
    return false;
  }
  h.records[n] = r;
  h.count.store(n + 1, std::memory_order_release);
  return true;
}

// After a cycle that failed the other half is in use still: both go with this one.
void TableLog::begin_cycle() {
  const uint32_t other = memory_->active.load(std::memory_order_relaxed) ^ 1;
  if (memory_->halves[other].count.load(std::memory_order_relaxed) != 0) return;
  memory_->active.store(other, std::memory_order_release);
  full_.store(false, std::memory_order_relaxed);
}

// What the cycle has written lies in the half that is not active; what else it has written can stay.
void TableLog::end_cycle() {
  memory_->halves[memory_->active.load(std::memory_order_relaxed) ^ 1].count.store(0, std::memory_order_release);
}

// The older half first: a newer one alone is a suffix of what happened, an older one alone is not.
void TableLog::clear() {
  const uint32_t active = memory_->active.load(std::memory_order_relaxed);
  memory_->halves[active ^ 1].count.store(0, std::memory_order_release);
  memory_->halves[active].count.store(0, std::memory_order_release);
  full_.store(false, std::memory_order_relaxed);
}

}  // namespace spillway::qcow2
