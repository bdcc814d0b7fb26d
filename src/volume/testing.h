// What the tests of this folder share: patterns, whole-volume reads and writes as tasks.
#pragma once

#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "src/volume/volume.h"

namespace spillway::testing_support {

inline std::vector<std::byte> random_bytes(uint64_t seed, size_t n) {
  std::vector<std::byte> b(n);
  std::mt19937_64 r(seed);
  for (size_t i = 0; i < n; i += 8) {
    const uint64_t v = r();
    std::memcpy(b.data() + i, &v, std::min<size_t>(8, n - i));
  }
  return b;
}

// The buffers are the caller's and outlive the task.
inline Task<Status> write_bytes(Volume& v, uint64_t offset, const std::vector<std::byte>& data, bool fua = false) {
  iovec iov{const_cast<std::byte*>(data.data()), data.size()};
  IoContext ctx;
  ctx.fua = fua;
  co_return co_await v.write(ctx, offset, Iov(&iov, 1));
}
inline Task<Result<std::vector<std::byte>>> read_bytes(Volume& v, uint64_t offset, size_t n) {
  std::vector<std::byte> data(n);
  iovec iov{data.data(), n};
  Status s = co_await v.read(IoContext{}, offset, Iov(&iov, 1));
  if (!s) co_return std::unexpected(std::move(s).error());
  co_return data;
}

// A disk with bad sectors: reads that touch one fail until it is written, as on real media.
class BadSectors final : public Volume {
 public:
  explicit BadSectors(VolumePtr below) : Volume(below->name(), below->size(), below->geometry()), below_(std::move(below)) {}
  std::string_view layer() const override { return "bad-sectors"; }
  std::vector<VolumePtr> members() const override { return {below_}; }
  void spoil(uint64_t offset) { bad_.insert(offset / 512); }
  size_t bad() const { return bad_.size(); }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    const auto it = bad_.lower_bound(offset / 512);
    if (it != bad_.end() && *it * 512 < offset + iov_length(iov))
      return Task<Status>::ready(fail(ErrorKind::kIo, "bad sector"));
    return below_->read(ctx, offset, iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    bad_.erase(bad_.lower_bound(offset / 512), bad_.lower_bound((offset + iov_length(iov)) / 512));
    return below_->write(ctx, offset, iov);
  }
  Task<Status> do_flush(IoContext ctx) override { return below_->flush(ctx); }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override {
    return below_->block_status(offset, length);
  }

 private:
  VolumePtr below_;
  std::set<uint64_t> bad_;
};

}  // namespace spillway::testing_support
