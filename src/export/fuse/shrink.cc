#include "src/export/fuse/shrink.h"

#include <algorithm>

namespace spillway {

using namespace reclaim;

std::unique_ptr<PmemShrinker> PmemShrinker::create(Registry& registry) {
  std::unique_ptr<PmemShrinker> s(new PmemShrinker(registry));
  s->shrinker_ = registry.alloc(ShrinkerFlags::kGroupAware, "pmem");
  if (!s->shrinker_) return nullptr;
  PmemShrinker* self = s.get();
  s->shrinker_.set_count([self](const ScanRequest& r) { return self->count(r); });
  s->shrinker_.set_scan([self](const ScanRequest& r) { return self->scan(r); });
  // A chunk at a time, and time for its write back on a slow disk.
  s->shrinker_.set_batch(PmemFile::kChunk / kPageSize);
  s->shrinker_.set_time_budget(std::chrono::seconds(2));
  if (s->shrinker_.register_() != Errc::kOk) return nullptr;
  return s;
}

void PmemShrinker::add(std::shared_ptr<PmemFile> file) {
  const auto id = static_cast<uint32_t>(file->options().group);
  {
    std::lock_guard lock(mutex_);
    for (auto& e : entries_)
      if (e.file == file) return;
    entries_.push_back({std::move(file)});
  }
  // Set once and for good: whether the kernel has pages for the file changes without an upcall.
  if (GroupRef group = registry_.find_group(id)) shrinker_.set_bit(*group);
}

std::vector<std::shared_ptr<PmemFile>> PmemShrinker::files_of(uint32_t group) const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<PmemFile>> all;
  for (auto& e : entries_)
    if (static_cast<uint32_t>(e.file->options().group) == group && e.file->fd_ready()) all.push_back(e.file);
  return all;
}

CountReport PmemShrinker::count(const ScanRequest& r) {
  CountReport total;
  for (auto& file : files_of(r.group->id())) {
    const auto begin = std::chrono::steady_clock::now();
    {
      std::lock_guard lock(mutex_);
      auto e = std::find_if(entries_.begin(), entries_.end(), [&](auto& x) { return x.file == file; });
      if (e->valid_until > begin) {
        total.bytes += e->bytes;
        continue;
      }
    }
    const auto resident = file->residency();
    if (!resident) continue;
    const auto end = std::chrono::steady_clock::now();
    std::lock_guard lock(mutex_);
    auto e = std::find_if(entries_.begin(), entries_.end(), [&](auto& x) { return x.file == file; });
    e->bytes = resident->cached;
    e->valid_until = end + 20 * (end - begin);
    total.bytes += resident->cached;
  }
  total.objects = total.bytes / kPageSize;
  return total;
}

ScanReport PmemShrinker::scan(const ScanRequest& r) {
  ScanReport report;
  if (!r.may_block) {
    report.status = ScanStatus::kStop;
    return report;
  }
  const uint64_t want = std::max<uint64_t>(r.nr_to_scan * kPageSize, PmemFile::kChunk);
  const bool ignore_heat = r.priority <= 1;
  for (auto& file : files_of(r.group->id())) {
    if (report.freed_bytes >= want) break;
    const uint64_t chunks = file->size() / PmemFile::kChunk + 1;
    const auto turn = file->evict_cold(want - report.freed_bytes, chunks, ignore_heat);
    report.freed_bytes += turn.freed;
    report.not_freed_referenced += turn.warm * (PmemFile::kChunk / kPageSize);
  }
  report.freed_objects = report.freed_bytes / kPageSize;
  report.scanned = std::max(report.freed_objects, r.nr_to_scan);
  std::lock_guard lock(mutex_);
  for (auto& e : entries_)
    if (static_cast<uint32_t>(e.file->options().group) == r.group->id()) e.valid_until = {};
  return report;
}

}  // namespace spillway
