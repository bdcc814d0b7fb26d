#include "src/export/vfio_user/dma.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "src/base/log.h"

namespace spillway::vfio {

DmaTable::Mapping::~Mapping() {
  if (base != nullptr) ::munmap(base, length);
}

bool DmaTable::Snapshot::guest_address(const std::byte* p, uint64_t* address) const {
  for (const auto& r : memory.regions()) {
    if (r.host == nullptr || p < r.host || p >= r.host + r.size) continue;
    *address = r.guest + static_cast<uint64_t>(p - r.host);
    return true;
  }
  return false;
}

std::string DmaTable::key(uint64_t address) const { return fmt::format("{}{:016x}", prefix_, address); }

size_t DmaTable::unmapped() const {
  return static_cast<size_t>(std::count_if(entries_.begin(), entries_.end(), [](auto& e) { return !e.mapping; }));
}

// Sealed against shrinking, and long enough: a touch can never fail.
static bool safe_to_touch(int fd, const DmaMap& r) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  struct stat st{};
  return seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && ::fstat(fd, &st) == 0 &&
         static_cast<uint64_t>(st.st_size) >= r.offset + r.size;
}

Status DmaTable::insert(const DmaMap& r, Fd fd) {
  const uint64_t end = r.address + (r.size - 1);
  std::erase_if(entries_, [&](auto& e) { return e.request.address == r.address && e.request.size == r.size; });
  for (auto& e : entries_)
    if (e.request.address <= end && r.address <= e.request.address + (e.request.size - 1))
      return fail(ErrorKind::kExists, fmt::format("dma map {:#x}+{:#x}: overlaps {:#x}", r.address, r.size,
                                                  e.request.address));
  if (entries_.size() >= kMaxDmaRegions) return fail(ErrorKind::kBusy, "dma map: too many regions");
  Entry entry{r, nullptr};
  if (fd && safe_to_touch(fd.get(), r)) {
    const int prot = PROT_READ | ((r.flags & 2) != 0 ? PROT_WRITE : 0);
    void* p = ::mmap(nullptr, r.size, prot, MAP_SHARED | MAP_NORESERVE, fd.get(), static_cast<off_t>(r.offset));
    if (p == MAP_FAILED) return fail_errno(errno, fmt::format("dma map {:#x}+{:#x}", r.address, r.size));
    ::madvise(p, r.size, MADV_DONTDUMP);
    entry.mapping = std::make_shared<Mapping>();
    entry.mapping->base = static_cast<std::byte*>(p);
    entry.mapping->length = r.size;
    // Rings and answers need to be written: memory that is read-only for devices is an address without memory.
    if ((r.flags & 2) == 0) entry.mapping = nullptr;
  } else if (fd) {
    LOG_LIMITED(LogLevel::kInfo, "vfio-user",
                "guest memory at {:#x} is no sealed memfd: the device will not touch it (QEMU: memory-backend-memfd)",
                r.address);
  }
  entries_.push_back(std::move(entry));
  return {};
}

Status DmaTable::rebuild() {
  std::vector<virtio::GuestRegion> regions;
  auto s = std::make_shared<Snapshot>();
  for (auto& e : entries_) {
    virtio::GuestRegion r;
    r.guest = e.request.address;
    r.size = e.request.size;
    r.host = e.mapping ? e.mapping->base : nullptr;
    regions.push_back(r);
    if (e.mapping) s->keep.push_back(e.mapping);
  }
  SPILLWAY_TRY(s->memory, virtio::GuestMemory::create(std::move(regions)));
  snapshot_ = std::move(s);
  return {};
}

Status DmaTable::map(const DmaMap& request, Fd fd) {
  // Checked first: what is refused must not replace a good entry in the store.
  SPILLWAY_CHECK(insert(request, fd ? fd.dup() : Fd()));
  if (store_ != nullptr) {
    const int raw = fd.get();
    const std::string_view blob(reinterpret_cast<const char*>(&request), sizeof request);
    SPILLWAY_CHECK(store_->put(key(request.address), {&raw, fd ? 1u : 0u}, blob));
  }
  return rebuild();
}

Status DmaTable::unmap(uint64_t address, uint64_t size) {
  const uint64_t last = address + (size - 1);
  auto inside = [&](const Entry& e) {
    return e.request.address >= address && e.request.address + (e.request.size - 1) <= last;
  };
  for (auto& e : entries_) {
    const bool touches = e.request.address <= last && address <= e.request.address + (e.request.size - 1);
    if (touches && !inside(e))
      return fail(ErrorKind::kInvalid, fmt::format("dma unmap {:#x}+{:#x}: cuts {:#x}", address, size,
                                                   e.request.address));
  }
  if (store_ != nullptr)
    for (auto& e : entries_)
      if (inside(e)) SPILLWAY_CHECK(store_->remove(key(e.request.address)));
  std::erase_if(entries_, inside);
  return rebuild();
}

void DmaTable::clear() {
  if (store_ != nullptr)
    for (auto& e : entries_) (void)store_->remove(key(e.request.address));
  entries_.clear();
  (void)rebuild();
}

Status DmaTable::adopt() {
  if (store_ == nullptr) return rebuild();
  SPILLWAY_TRY(auto names, store_->list(prefix_));
  for (auto& name : names) {
    SPILLWAY_TRY(auto kept, store_->get(name));
    DmaMap request{};
    if (kept.blob.size() != sizeof request || kept.fds.size() > 1)
      return fail(ErrorKind::kCorrupt, "vfio-user: kept region " + name);
    std::memcpy(&request, kept.blob.data(), sizeof request);
    SPILLWAY_CHECK(insert(request, kept.fds.empty() ? Fd() : std::move(kept.fds[0])));
  }
  return rebuild();
}

}  // namespace spillway::vfio
