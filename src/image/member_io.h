// MemberIo: reads and writes at any byte of a member volume, whatever its block size is.
//
// Whole blocks go straight down. Anything else is a read-modify-write, which must not interleave with another write to
// the same block: only then (and for block sizes above 512 only) do writes take a range lock. So with 512-byte members
// and 512-byte requests nothing is locked at all.
//
// Reads beyond the end give zeros (a qcow2 file may end inside its last cluster). Writes beyond the end are an error of
// the caller (kOutOfRange); grow the member first.
//
// Thread-safety: internally synchronised.
#pragma once

#include <list>

#include "src/io/sync.h"
#include "src/volume/volume.h"

namespace spillway::qcow2 {

// Byte ranges held by writers in flight; overlapping ones wait.
class RangeLock {
 public:
  struct Range {
    uint64_t begin = 0, end = 0;
  };
  Task<std::list<Range>::iterator> lock(uint64_t begin, uint64_t end);
  void unlock(std::list<Range>::iterator it);

 private:
  struct Wait;
  SpinLock spin_;
  std::list<Range> held_;
  WaiterList waiters_;
};

class MemberIo {
 public:
  MemberIo() = default;
  explicit MemberIo(VolumePtr v)
      : volume_(std::move(v)), block_(volume_->geometry().block_size), lock_(std::make_shared<RangeLock>()) {}

  explicit operator bool() const { return volume_ != nullptr; }
  Volume& volume() const { return *volume_; }
  const VolumePtr& ptr() const { return volume_; }
  uint64_t size() const { return volume_->size(); }

  // No coroutine of its own when the range is whole blocks inside the member.
  Task<Status> read(IoContext ctx, uint64_t offset, Iov iov) const;
  Task<Status> write(IoContext ctx, uint64_t offset, Iov iov) const;
  Task<Status> read(IoContext ctx, uint64_t offset, void* to, uint64_t length) const;
  Task<Status> write(IoContext ctx, uint64_t offset, const void* from, uint64_t length) const;
  // Ends with zeros in the range; ragged ends are written.
  Task<Status> write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) const;

 private:
  Task<Status> read_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const;
  Task<Status> write_slow(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const;
  Task<Status> write_locked(IoContext ctx, uint64_t offset, Iov iov, uint64_t length) const;
  Task<Status> patch(IoContext ctx, uint64_t offset, Iov iov, uint64_t skip, uint64_t length) const;

  VolumePtr volume_;
  uint64_t block_ = 512;
  std::shared_ptr<RangeLock> lock_;  // shared by copies
};

}  // namespace spillway::qcow2
