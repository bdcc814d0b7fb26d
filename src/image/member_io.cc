#include "src/image/member_io.h"

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

namespace spillway::qcow2 {

// Waits for any range to be given back, then looks again (few writers, short waits).
struct RangeLock::Wait {
  RangeLock& l;
  Waiter w;
  bool await_ready() const noexcept { return false; }
  // The spin lock is held on entry.
  void await_suspend(std::coroutine_handle<> h) {
    w.handle = h;
    w.reactor = &Reactor::current();
    l.waiters_.push(&w);
    l.spin_.unlock();
  }
  void await_resume() const noexcept {}
};

Task<std::list<RangeLock::Range>::iterator> RangeLock::lock(uint64_t begin, uint64_t end) {
  for (;;) {
    spin_.lock();
    const bool busy = std::any_of(held_.begin(), held_.end(),
                                  [&](const Range& r) { return r.begin < end && begin < r.end; });
    if (!busy) break;
    co_await Wait{*this, {}};
  }
  auto it = held_.insert(held_.end(), Range{begin, end});
  spin_.unlock();
  co_return it;
}

void RangeLock::unlock(std::list<Range>::iterator it) {
  spin_.lock();
  held_.erase(it);
  WaiterList all = waiters_.take();
  spin_.unlock();
  all.wake_all();
}

Task<Status> MemberIo::read(IoContext ctx, uint64_t offset, Iov iov) const {
  const uint64_t length = iov_length(iov);
  if (is_aligned(offset, block_) && is_aligned(length, block_) && length > 0 && offset <= size() &&
      length <= size() - offset)
    return volume_->read(ctx, offset, iov);
  return read_slow(ctx, offset, iov, length);
}

Task<Status> MemberIo::read_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const {
  const uint64_t total = size();
  const uint64_t have = offset >= total ? 0 : std::min(length, total - offset);
  if (have < length) zero_iov(iov, have, length - have);
  if (have == 0) co_return Status{};
  const uint64_t begin = align_down(offset, block_), end = align_up(offset + have, block_);
  if (begin == offset && end == offset + have) {
    IovSlice part(iov, 0, have);
    co_return co_await volume_->read(ctx, offset, part.iov());
  }
  AlignedBuffer buffer(end - begin);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "image: no memory for a bounce buffer");
  const iovec whole = buffer.iov();
  SPILLWAY_CO_CHECK(co_await volume_->read(ctx, begin, Iov(&whole, 1)));
  copy_to_iov(iov, 0, buffer.data() + (offset - begin), have);
  co_return Status{};
}

Task<Status> MemberIo::write(IoContext ctx, uint64_t offset, Iov iov) const {
  const uint64_t length = iov_length(iov);
  if (length == 0) return Task<Status>::ready({});
  if (offset > size() || length > size() - offset)
    return Task<Status>::ready(fail(ErrorKind::kOutOfRange, fmt::format("volume {}: write of {} at {}: beyond the end at {}",
                                                                        volume_->name(), length, offset, size())));
  if (block_ == 512 && is_aligned(offset, block_) && is_aligned(length, block_))
    return volume_->write(ctx, offset, iov);
  return write_slow(ctx, offset, iov, length);
}

Task<Status> MemberIo::write_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const {
  auto held = co_await lock_->lock(align_down(offset, block_), align_up(offset + length, block_));
  Status s = co_await write_locked(ctx, offset, iov, length);
  lock_->unlock(held);
  co_return s;
}

Task<Status> MemberIo::write_locked(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const {
  const uint64_t end = offset + length;
  const uint64_t first = std::min(align_up(offset, block_), end), last = std::max(align_down(end, block_), first);
  if (first > offset) SPILLWAY_CO_CHECK(co_await patch(ctx, offset, iov, 0, first - offset));
  if (last > first) {
    IovSlice part(iov, first - offset, last - first);
    SPILLWAY_CO_CHECK(co_await volume_->write(ctx, first, part.iov()));
  }
  if (end > last) SPILLWAY_CO_CHECK(co_await patch(ctx, last, iov, last - offset, end - last));
  co_return Status{};
}

// Read-modify-write inside one block.
Task<Status> MemberIo::patch(IoContext ctx, uint64_t offset, Iov iov, uint64_t skip, uint64_t length) const {
  const uint64_t begin = align_down(offset, block_);
  AlignedBuffer buffer(block_);
  if (!buffer) co_return fail(ErrorKind::kNoMemory, "image: no memory for a bounce buffer");
  const iovec whole = buffer.iov();
  IoContext read_ctx = ctx;
  read_ctx.fua = false;
  SPILLWAY_CO_CHECK(co_await volume_->read(read_ctx, begin, Iov(&whole, 1)));
  copy_from_iov(buffer.data() + (offset - begin), iov, skip, length);
  co_return co_await volume_->write(ctx, begin, Iov(&whole, 1));
}

Task<Status> MemberIo::read(IoContext ctx, uint64_t offset, void* to, uint64_t length) const {
  const iovec v{to, length};
  co_return co_await read(ctx, offset, Iov(&v, 1));
}

Task<Status> MemberIo::write(IoContext ctx, uint64_t offset, const void* from, uint64_t length) const {
  const iovec v{const_cast<void*>(from), length};
  co_return co_await write(ctx, offset, Iov(&v, 1));
}

Task<Status> MemberIo::write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) const {
  const uint64_t end = offset + length;
  if (end > size()) co_return fail(ErrorKind::kOutOfRange, "image: zeros beyond the end of the file");
  const uint64_t first = std::min(align_up(offset, block_), end), last = std::max(align_down(end, block_), first);
  AlignedBuffer zeros(block_);
  if (!zeros) co_return fail(ErrorKind::kNoMemory, "image: no memory for a bounce buffer");
  std::memset(zeros.data(), 0, block_);
  if (first > offset) SPILLWAY_CO_CHECK(co_await write(ctx, offset, zeros.data(), first - offset));
  if (last > first) {
    auto held = co_await lock_->lock(first, last);
    Status s = co_await volume_->write_zeroes(ctx, first, last - first, may_unmap);
    lock_->unlock(held);
    if (!s) co_return s;
  }
  if (end > last) SPILLWAY_CO_CHECK(co_await write(ctx, last, zeros.data(), end - last));
  co_return Status{};
}

}  // namespace spillway::qcow2
