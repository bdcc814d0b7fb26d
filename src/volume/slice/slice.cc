#include "src/volume/slice/slice.h"

#include <fmt/core.h>

#include <utility>

namespace spillway {
namespace {

class Slice final : public Volume {
 public:
  Slice(std::string name, VolumePtr member, uint64_t offset, uint64_t length)
      : Volume(std::move(name), length, slice_geometry(*member, offset)), member_(std::move(member)), offset_(offset) {}

  void expect(IoContext ctx, uint64_t offset, uint64_t length, bool write) override {
    member_->expect(ctx, offset_ + offset, length, write);
  }
  std::string_view layer() const override { return "slice"; }
  std::vector<VolumePtr> members() const override { return {member_}; }
  std::string to_text() const override { return fmt::format("of: {}\noffset: {}\n", member_->name(), offset_); }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    return member_->read(ctx, offset_ + offset, iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    return member_->write(ctx, offset_ + offset, iov);
  }
  Task<Status> do_flush(IoContext ctx) override { return member_->flush(ctx); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return member_->discard(ctx, offset_ + offset, length);
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override {
    return member_->write_zeroes(ctx, offset_ + offset, length, unmap);
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override {
    auto r = co_await member_->block_status(offset_ + offset, length);
    if (r)
      for (Extent& e : *r) e.offset -= offset_;
    co_return r;
  }
  // Into what is free behind it in the member. Overlap with another slice is the composition root's to refuse.
  Task<Status> do_resize(uint64_t new_size) override {
    if (offset_ + new_size > member_->size())
      return Task<Status>::ready(fail(ErrorKind::kNoSpace,
                                      fmt::format("volume {}: {} bytes at {} reach beyond the end of {} at {}", name(),
                                                  new_size, offset_, member_->name(), member_->size())));
    set_size(new_size);
    return Task<Status>::ready();
  }

 private:
  // A region boundary that the slice's start does not hit is no boundary of the slice.
  static Geometry slice_geometry(const Volume& member, uint64_t offset) {
    Geometry g = member.geometry();
    if (g.independent_region != 0 && !is_aligned(offset, g.independent_region)) g.independent_region = 0;
    if (g.min_io != 0 && !is_aligned(offset, g.min_io)) g.min_io = g.opt_io = 0;
    if (g.opt_io != 0 && !is_aligned(offset, g.opt_io)) g.opt_io = 0;
    return g;
  }
  const VolumePtr member_;
  const uint64_t offset_;
};

}  // namespace

Result<VolumePtr> make_slice(std::string name, VolumePtr member, uint64_t offset, uint64_t length) {
  const uint32_t block = member->geometry().block_size;
  if (!is_aligned(offset, block))
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: offset {} is no multiple of {}", name, offset, block));
  if (offset >= member->size())
    return fail(ErrorKind::kOutOfRange, fmt::format("volume {}: offset {} is beyond the end of {} at {}", name, offset,
                                                    member->name(), member->size()));
  if (length == 0) length = member->size() - offset;
  if (!is_aligned(length, block))
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: length {} is no multiple of {}", name, length, block));
  if (length > member->size() - offset)
    return fail(ErrorKind::kOutOfRange, fmt::format("volume {}: {} bytes at {} reach beyond the end of {} at {}", name,
                                                    length, offset, member->name(), member->size()));
  return std::make_shared<Slice>(std::move(name), std::move(member), offset, length);
}

}  // namespace spillway
