#include "src/virtio/guest_memory.h"

#include <algorithm>

#include <fmt/core.h>

namespace spillway::virtio {

Result<GuestMemory> GuestMemory::create(std::vector<GuestRegion> regions) {
  std::sort(regions.begin(), regions.end(),
            [](const GuestRegion& a, const GuestRegion& b) { return a.guest < b.guest; });
  for (size_t i = 0; i < regions.size(); ++i) {
    const GuestRegion& r = regions[i];
    if (r.size == 0 || r.guest + r.size < r.guest || r.user + r.size < r.user)
      return fail(ErrorKind::kInvalid, fmt::format("memory region at {:#x}: size {:#x}", r.guest, r.size));
    if (i > 0 && regions[i - 1].guest + regions[i - 1].size > r.guest)
      return fail(ErrorKind::kInvalid, fmt::format("memory region at {:#x}: overlaps another", r.guest));
  }
  GuestMemory m;
  m.regions_ = std::move(regions);
  return m;
}

const GuestRegion* GuestMemory::find_slow(uint64_t addr, uint32_t& hint) const {
  auto it = std::upper_bound(regions_.begin(), regions_.end(), addr,
                             [](uint64_t a, const GuestRegion& r) { return a < r.guest; });
  if (it == regions_.begin()) return nullptr;
  --it;
  if (addr - it->guest >= it->size) return nullptr;
  hint = static_cast<uint32_t>(it - regions_.begin());
  return &*it;
}

static std::byte* inside(const GuestRegion& r, uint64_t offset, uint64_t length, uint64_t alignment) {
  if (r.host == nullptr || r.blocking || offset >= r.size || length > r.size - offset) return nullptr;
  std::byte* p = r.host + offset;
  return reinterpret_cast<uintptr_t>(p) % alignment == 0 ? p : nullptr;
}

std::byte* GuestMemory::translate_user(uint64_t addr, uint64_t length, uint64_t alignment) const {
  for (const GuestRegion& r : regions_)
    if (addr - r.user < r.size) return inside(r, addr - r.user, length, alignment);
  return nullptr;
}

std::byte* GuestMemory::translate_guest(uint64_t addr, uint64_t length, uint64_t alignment) const {
  uint32_t hint = 0;
  const GuestRegion* r = find(addr, hint);
  return r == nullptr ? nullptr : inside(*r, addr - r->guest, length, alignment);
}

}  // namespace spillway::virtio
