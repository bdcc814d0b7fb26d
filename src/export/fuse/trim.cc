#include "src/export/fuse/trim.h"

#include <fmt/core.h>

namespace spillway {

namespace {

class TrimVolume final : public Volume {
 public:
  TrimVolume(std::shared_ptr<PmemFile> file, BlockingPool* blocking)
      : Volume(file->name() + "-trim", file->size(), geometry_for(*file)), file_(std::move(file)), blocking_(blocking) {}
  std::string_view layer() const override { return "pmem-trim"; }

 protected:
  static Geometry geometry_for(const PmemFile& file) {
    Geometry g;
    g.block_size = kPageSize;  // holes are cut out of mappings: whole pages
    g.discard_granularity = std::max<uint32_t>(kPageSize, file.options().volume->geometry().discard_granularity);
    return g;
  }
  Task<Status> do_read(IoContext, uint64_t, Iov iov) override {
    zero_iov(iov, 0, iov_length(iov));
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t, Iov) override {
    return Task<Status>::ready(fail(ErrorKind::kPermission, fmt::format("{}: only discards", name())));
  }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
  Task<Status> do_discard(IoContext, uint64_t offset, uint64_t length) override {
    // Whole grains only: a part of one would be zeroed, not given back.
    const uint64_t grain = geometry().discard_granularity;
    const uint64_t begin = align_up(offset, grain), end = align_down(offset + length, grain);
    if (begin >= end) co_return Status{};
    PmemFile* file = file_.get();
    Status s = co_await blocking_->run([file, begin, end] { return file->punch_hole(begin, end - begin); });
    co_return s;
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) override {
    if (!may_unmap) return do_write(ctx, offset, {});
    return do_discard(ctx, offset, length);
  }

 private:
  std::shared_ptr<PmemFile> file_;
  BlockingPool* blocking_;
};

}  // namespace

VolumePtr make_trim_volume(std::shared_ptr<PmemFile> file, BlockingPool* blocking) {
  return std::make_shared<TrimVolume>(std::move(file), blocking);
}

}  // namespace spillway
