#include "src/volume/md/bitmap.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <utility>

namespace spillway::md {

uint64_t Bitmap::choose_chunk(uint64_t component_size, uint64_t space, uint64_t min_chunk) {
  uint64_t chunk = std::max<uint64_t>(std::bit_ceil(min_chunk), 64 * kKiB);
  while (bytes_for(component_size, chunk) > std::min<uint64_t>(space, 64 * kKiB)) chunk *= 2;
  return chunk;
}

Status Bitmap::check(const RawBitmapHeader& h, uint64_t component_size, uint64_t component_min, uint64_t space,
                     const std::string& who) {
  if (h.magic != kBitmapMagic) return fail(ErrorKind::kCorrupt, who + ": the write-intent bitmap has no magic");
  if (h.version != kBitmapVersion)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: write-intent bitmap version {} is not supported", who, h.version));
  if (h.nodes != 0) return fail(ErrorKind::kUnsupported, who + ": the write-intent bitmap of a cluster is not supported");
  if (h.chunk_size < 512 || !std::has_single_bit(h.chunk_size))
    return fail(ErrorKind::kCorrupt, fmt::format("{}: write-intent bitmap: chunk of {}", who, h.chunk_size));
  // The kernel counts whole raid5 chunks only where the members' used size has a rest.
  if (h.sync_size > component_size / kSectorSize || h.sync_size < component_min / kSectorSize)
    return fail(ErrorKind::kCorrupt, fmt::format("{}: write-intent bitmap covers {} sectors, the members have {}", who,
                                                 h.sync_size, component_size / kSectorSize));
  if (bytes_for(component_size, h.chunk_size) > space)
    return fail(ErrorKind::kCorrupt, fmt::format("{}: write-intent bitmap: {} bytes in a space of {}", who,
                                                 bytes_for(component_size, h.chunk_size), space));
  return {};
}

Bitmap::Bitmap(RawBitmapHeader header, uint64_t component_size, uint64_t space)
    : header_(header),
      component_size_(component_size),
      chunks_((component_size + header.chunk_size - 1) / header.chunk_size),
      image_(align_up(bytes_for(component_size, header.chunk_size), kPage)),
      chunk_(chunks_),
      page_(image_.size() / kPage) {
  SPILLWAY_ASSERT(bytes_for(component_size, header.chunk_size) <= space);
  std::memcpy(image_.data(), &header_, sizeof header_);
}

void Bitmap::merge(std::span<const std::byte> from, bool dirty) {
  for (uint64_t c = 0; c < chunks_ && c / 8 < from.size(); ++c) {
    if ((std::to_integer<uint8_t>(from[c / 8]) >> (c % 8) & 1) == 0) continue;
    bits()[c / 8] |= static_cast<uint8_t>(1u << (c % 8));
    chunk_[c].needs_sync |= dirty;
  }
}

void Bitmap::set_all() {
  for (uint64_t c = 0; c < chunks_; ++c) {
    bits()[c / 8] |= static_cast<uint8_t>(1u << (c % 8));
    chunk_[c].needs_sync = true;
  }
}

Task<Status> Bitmap::write_pages(uint64_t first, uint64_t last, bool fua) {
  // Caller holds io_.
  std::vector<std::byte> copy((last - first + 1) * kPage);
  std::vector<uint64_t> versions(last - first + 1);
  {
    std::lock_guard l(lock_);
    std::memcpy(copy.data(), image_.data() + first * kPage, copy.size());
    for (uint64_t p = first; p <= last; ++p) versions[p - first] = page_[p].set_version;
  }
  Status s = co_await writer_(first * kPage, copy, fua);
  if (!s) co_return s;
  if (fua) {
    std::lock_guard l(lock_);
    for (uint64_t p = first; p <= last; ++p)
      page_[p].stable_version = std::max(page_[p].stable_version, versions[p - first]);
  }
  co_return Status{};
}

Task<Status> Bitmap::start_write(uint64_t first, uint64_t end) {
  const uint64_t c0 = first / header_.chunk_size, c1 = (end - 1) / header_.chunk_size;
  uint64_t page0 = UINT64_MAX, page1 = 0;
  std::vector<uint64_t> wanted;
  {
    std::lock_guard l(lock_);
    for (uint64_t c = c0; c <= c1; ++c) {
      ++chunk_[c].writes;
      chunk_[c].touched = true;
      const uint64_t p = page_of(c);
      if (!image_bit(c)) {
        bits()[c / 8] |= static_cast<uint8_t>(1u << (c % 8));
        ++page_[p].set_version;
      }
      if (page_[p].stable_version < page_[p].set_version) {
        page0 = std::min(page0, p);
        page1 = std::max(page1, p);
      }
    }
    for (uint64_t p = page0; page0 != UINT64_MAX && p <= page1; ++p) wanted.push_back(page_[p].set_version);
  }
  if (page0 == UINT64_MAX) co_return Status{};
  co_await io_.lock();
  bool stable = true;
  {
    std::lock_guard l(lock_);  // the write we waited behind may have carried ours
    for (uint64_t p = page0; p <= page1; ++p) stable &= page_[p].stable_version >= wanted[p - page0];
  }
  Status s{};
  if (!stable) s = co_await write_pages(page0, page1, true);
  io_.unlock();
  if (!s) end_write(first, end);
  co_return s;
}

void Bitmap::end_write(uint64_t first, uint64_t end) {
  std::lock_guard l(lock_);
  for (uint64_t c = first / header_.chunk_size; c <= (end - 1) / header_.chunk_size; ++c) --chunk_[c].writes;
}

bool Bitmap::needs_sync(uint64_t first, uint64_t end) const {
  std::lock_guard l(lock_);
  for (uint64_t c = first / header_.chunk_size; c <= (end - 1) / header_.chunk_size; ++c)
    if (chunk_[c].needs_sync) return true;
  return false;
}

uint64_t Bitmap::next_needing_sync(uint64_t offset) const {
  std::lock_guard l(lock_);
  for (uint64_t c = offset / header_.chunk_size; c < chunks_; ++c)
    if (chunk_[c].needs_sync) return std::max(offset, c * header_.chunk_size);
  return component_size_;
}

void Bitmap::synced(uint64_t first, uint64_t end) {
  std::lock_guard l(lock_);
  const uint64_t size = header_.chunk_size;
  for (uint64_t c = (first + size - 1) / size; c < chunks_ && std::min((c + 1) * size, component_size_) <= end; ++c)
    chunk_[c].needs_sync = false;
}

uint64_t Bitmap::bits_set() const {
  std::lock_guard l(lock_);
  uint64_t n = 0;
  for (uint64_t c = 0; c < chunks_; ++c) n += image_bit(c);
  return n;
}

Task<Result<uint64_t>> Bitmap::clear_idle(std::function<Task<Status>()> flush, std::function<bool()> may_clear, bool all_idle) {
  std::vector<uint64_t> candidates;
  {
    const bool may = may_clear();
    std::lock_guard l(lock_);
    for (uint64_t c = 0; c < chunks_; ++c) {
      if (may && image_bit(c) && chunk_[c].writes == 0 && !chunk_[c].needs_sync &&
          (!chunk_[c].touched || all_idle))
        candidates.push_back(c);
      chunk_[c].touched = false;
    }
  }
  if (!candidates.empty()) {
    Status s = co_await flush();
    if (!s) co_return fail(std::move(s).error());
    if (!may_clear()) co_return bits_set();
    uint64_t page0 = UINT64_MAX, page1 = 0;
    {
      std::lock_guard l(lock_);
      for (uint64_t c : candidates) {
        // A write that began meanwhile has touched it, and relies on the bit.
        if (chunk_[c].writes != 0 || chunk_[c].touched || chunk_[c].needs_sync) continue;
        bits()[c / 8] &= static_cast<uint8_t>(~(1u << (c % 8)));
        page0 = std::min(page0, page_of(c));
        page1 = std::max(page1, page_of(c));
      }
    }
    if (page0 != UINT64_MAX) {
      co_await io_.lock();
      s = co_await write_pages(page0, page1, false);
      io_.unlock();
      if (!s) co_return fail(std::move(s).error());
    }
  }
  co_return bits_set();
}

Task<Status> Bitmap::write_header(uint64_t events, bool degraded) {
  {
    std::lock_guard l(lock_);
    header_.events = events;
    if (!degraded) header_.events_cleared = events;
    header_.state &= ~kBitmapStale;
    std::memcpy(image_.data(), &header_, sizeof header_);
  }
  co_await io_.lock();
  Status s = co_await write_pages(0, 0, true);
  io_.unlock();
  co_return s;
}

Task<Status> Bitmap::write_all() {
  co_await io_.lock();
  Status s = co_await write_pages(0, page_.size() - 1, true);
  io_.unlock();
  co_return s;
}

}  // namespace spillway::md
