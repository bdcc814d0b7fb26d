#include "src/volume/volume.h"

#include <algorithm>
#include <utility>

#include <fmt/core.h>

namespace spillway {

Volume::Volume(std::string name, uint64_t size, Geometry geometry)
    : name_(std::move(name)), size_(size), geometry_(geometry) {
  SPILLWAY_ASSERT(geometry.block_size >= 512 && geometry.block_size <= 4096 &&
                  (geometry.block_size & (geometry.block_size - 1)) == 0);
  SPILLWAY_ASSERT(is_aligned(size, geometry.block_size));
}

Status Volume::check_range(uint64_t offset, uint64_t length, bool writes) const {
  const uint64_t total = size();
  const uint32_t block = geometry_.block_size;
  if (writes && geometry_.read_only)
    return fail(ErrorKind::kReadOnly, fmt::format("volume {}: is read-only", name_));
  if (length == 0 || !is_aligned(offset, block) || !is_aligned(length, block))
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: offset {} length {}: not whole blocks of {}",
                                                 name_, offset, length, block));
  if (offset > total || length > total - offset)
    return fail(ErrorKind::kOutOfRange, fmt::format("volume {}: offset {} length {}: beyond the end at {}",
                                                    name_, offset, length, total));
  return {};
}

Task<Status> Volume::read(IoContext ctx, uint64_t offset, Iov iov) {
  SPILLWAY_ASSERT(in_range(offset, iov_length(iov), false));
  return do_read(ctx, offset, iov);
}

Task<Status> Volume::write(IoContext ctx, uint64_t offset, Iov iov) {
  SPILLWAY_ASSERT(in_range(offset, iov_length(iov), true));
  return do_write(ctx, offset, iov);
}

Task<Status> Volume::flush(IoContext ctx) { return do_flush(ctx); }

Task<Status> Volume::discard(IoContext ctx, uint64_t offset, uint64_t length) {
  SPILLWAY_ASSERT(in_range(offset, length, true));
  if (geometry_.discard_granularity == 0)
    return Task<Status>::ready(fail(ErrorKind::kUnsupported, fmt::format("volume {}: discard", name_)));
  return do_discard(ctx, offset, length);
}

Task<Status> Volume::write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) {
  SPILLWAY_ASSERT(in_range(offset, length, true));
  return do_write_zeroes(ctx, offset, length, may_unmap);
}

Task<Result<std::vector<Extent>>> Volume::block_status(uint64_t offset, uint64_t length) {
  SPILLWAY_ASSERT(in_range(offset, length, false));
  return do_block_status(offset, length);
}

Task<Status> Volume::resize(uint64_t new_size) {
  if (new_size < size() || !is_aligned(new_size, geometry_.block_size))
    return Task<Status>::ready(fail(
        ErrorKind::kInvalid, fmt::format("volume {}: resize from {} to {}: must grow by whole blocks of {}",
                                         name_, size(), new_size, geometry_.block_size)));
  return do_resize(new_size);
}

Task<Status> Volume::do_discard(IoContext, uint64_t, uint64_t) {
  return Task<Status>::ready(fail(ErrorKind::kUnsupported, fmt::format("volume {}: discard", name_)));
}

Task<Status> Volume::do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool) {
  constexpr uint64_t kPiece = 64 * kKiB;
  static const AlignedBuffer zeros = [] {
    AlignedBuffer b(kPiece);
    SPILLWAY_ASSERT(bool(b));
    std::fill_n(b.data(), b.size(), std::byte{0});
    return b;
  }();
  iovec pieces[16];
  while (length > 0) {
    uint64_t now = 0;
    size_t n = 0;
    while (n < std::size(pieces) && now < length) {
      pieces[n] = {zeros.data(), static_cast<size_t>(std::min(kPiece, length - now))};
      now += pieces[n++].iov_len;
    }
    Status s = co_await do_write(ctx, offset, Iov(pieces, n));
    if (!s) co_return s;
    offset += now;
    length -= now;
  }
  co_return Status{};
}

Task<Result<std::vector<Extent>>> Volume::do_block_status(uint64_t offset, uint64_t length) {
  std::vector<Extent> all{{offset, length, Extent::Kind::kData}};
  return Task<Result<std::vector<Extent>>>::ready(std::move(all));
}

Task<Status> Volume::do_resize(uint64_t) {
  return Task<Status>::ready(
      fail(ErrorKind::kUnsupported, fmt::format("volume {}: a {} cannot be resized", name_, layer())));
}

Task<Status> Volume::close() {
  Status first{};
  for (auto& m : members()) {
    Status s = co_await m->close();
    if (!s && first) first = std::move(s);
  }
  co_return first;
}

uint64_t Volume::add_resize_listener(ResizeListener fn) {
  std::lock_guard lock(listeners_mutex_);
  listeners_.emplace_back(next_listener_, std::move(fn));
  return next_listener_++;
}

void Volume::remove_resize_listener(uint64_t id) {
  std::lock_guard lock(listeners_mutex_);
  std::erase_if(listeners_, [id](auto& l) { return l.first == id; });
}

void Volume::set_size(uint64_t new_size) {
  size_.store(new_size, std::memory_order_release);
  std::lock_guard lock(listeners_mutex_);
  for (auto& [id, fn] : listeners_) fn(new_size);
}

}  // namespace spillway
