// Scatter: one request cut into at most a few member requests that run side by side.
//
// A layer fills `parts` (one part per member and contiguous range there) and awaits run(). The object lives in the
// layer's coroutine frame, so that the iovec arrays outlive the member requests.
// Thread-confined.
#pragma once

#include <cstdint>
#include <vector>

#include "src/volume/volume.h"

namespace spillway {

class Scatter {
 public:
  struct Part {
    Volume* volume;
    uint64_t offset;
    uint64_t length;
    std::vector<iovec> iov;
  };
  // Walks the request's memory: take(part, n) appends the next n bytes of it to the part.
  explicit Scatter(Iov iov) : rest_(iov) {}
  Part& add(Volume* volume, uint64_t offset) {
    return parts_.emplace_back(Part{volume, offset, 0, {}});
  }
  void take(Part& part, uint64_t n);
  std::vector<Part>& parts() { return parts_; }

  enum class Op : uint8_t { kRead, kWrite, kDiscard, kZero, kZeroUnmap };
  Task<Status> run(Op op, IoContext ctx);

 private:
  Iov rest_;
  size_t skip_ = 0;  // into rest_[0]
  std::vector<Part> parts_;
};

// Flushes every volume, side by side; the first error wins.
Task<Status> flush_all(IoContext ctx, const std::vector<VolumePtr>& volumes);

// What linear and stripe make of their members' geometries: the coarsest block sizes, discard where all can.
Geometry combine_geometry(const std::vector<VolumePtr>& members);

// Appends, merged with the last one when it continues it.
void append_extent(std::vector<Extent>& to, Extent e);

}  // namespace spillway
