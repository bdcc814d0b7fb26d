#include "src/volume/stripe/stripe.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "src/volume/scatter.h"

namespace spillway {
namespace {

Geometry stripe_geometry(const std::vector<VolumePtr>& members, uint64_t chunk) {
  Geometry g = combine_geometry(members);
  g.min_io = static_cast<uint32_t>(chunk);
  g.opt_io = static_cast<uint32_t>(chunk * members.size());
  g.independent_region = 0;  // every disk serves every region
  return g;
}

class Stripe final : public Volume {
 public:
  Stripe(std::string name, std::vector<VolumePtr> members, uint64_t chunk, uint64_t size)
      : Volume(std::move(name), size, stripe_geometry(members, chunk)),
        members_(std::move(members)),
        chunk_(chunk),
        shift_(std::has_single_bit(chunk) ? std::countr_zero(chunk) : -1),
        count_(members_.size()),
        reciprocal_(count_ == 1 ? 0 : UINT64_MAX / count_ + 1) {}

  std::string_view layer() const override { return "stripe"; }
  std::vector<VolumePtr> members() const override { return members_; }
  std::string to_text() const override {
    return fmt::format("members: {}\nchunk: {}\nmetadata: none\n", members_.size(), chunk_);
  }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    const At at = locate(offset);
    const uint64_t length = iov_length(iov);
    if (at.inside + length <= chunk_) return members_[at.member]->read(ctx, at.offset, iov);
    return spanning(Scatter::Op::kRead, ctx, offset, length, iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    const At at = locate(offset);
    const uint64_t length = iov_length(iov);
    if (at.inside + length <= chunk_) return members_[at.member]->write(ctx, at.offset, iov);
    return spanning(Scatter::Op::kWrite, ctx, offset, length, iov);
  }
  Task<Status> do_flush(IoContext ctx) override { return flush_all(ctx, members_); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return spanning(Scatter::Op::kDiscard, ctx, offset, length, {});
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override {
    return spanning(unmap ? Scatter::Op::kZeroUnmap : Scatter::Op::kZero, ctx, offset, length, {});
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override;

 private:
  struct At {
    size_t member;
    uint64_t offset;  // in the member
    uint64_t inside;  // in the chunk
  };
  At locate(uint64_t offset) const {
    const uint64_t index = shift_ >= 0 ? offset >> shift_ : offset / chunk_;
    const uint64_t inside = offset - index * chunk_;
    // index / members by multiplication: exact while index * members < 2^64, and index is below 2^55.
    const uint64_t row = count_ == 1 ? index : static_cast<uint64_t>(static_cast<unsigned __int128>(index) * reciprocal_ >> 64);
    return {static_cast<size_t>(index - row * count_), row * chunk_ + inside, inside};
  }
  Task<Status> spanning(Scatter::Op op, IoContext ctx, uint64_t offset, uint64_t length, Iov iov) {
    // Chunks of one member that follow each other in the volume follow each other on the member.
    Scatter scatter(iov);
    scatter.parts().reserve(members_.size());
    std::vector<size_t> part(members_.size(), SIZE_MAX);
    while (length > 0) {
      const At at = locate(offset);
      const uint64_t now = std::min(length, chunk_ - at.inside);
      if (part[at.member] == SIZE_MAX) {
        part[at.member] = scatter.parts().size();
        scatter.add(members_[at.member].get(), at.offset);
      }
      scatter.take(scatter.parts()[part[at.member]], now);
      offset += now;
      length -= now;
    }
    co_return co_await scatter.run(op, ctx);
  }

  const std::vector<VolumePtr> members_;
  const uint64_t chunk_;
  const int shift_;  // log2(chunk), -1 when it is no power of two
  const uint64_t count_;
  const uint64_t reciprocal_;  // ceil(2^64 / count)
};

Task<Result<std::vector<Extent>>> Stripe::do_block_status(uint64_t offset, uint64_t length) {
  // Each member's range once, then dealt out again chunk by chunk.
  const uint64_t end = offset + length;
  const uint64_t rows_first = offset / (chunk_ * members_.size());
  const uint64_t rows_end = (end - 1) / (chunk_ * members_.size()) + 1;
  std::vector<std::vector<Extent>> extents(members_.size());
  for (size_t i = 0; i < members_.size(); ++i) {
    auto r = co_await members_[i]->block_status(rows_first * chunk_, (rows_end - rows_first) * chunk_);
    if (!r) co_return std::unexpected(std::move(r).error());
    extents[i] = std::move(*r);
  }
  std::vector<size_t> next(members_.size(), 0);
  std::vector<Extent> all;
  while (offset < end) {
    const At at = locate(offset);
    auto& list = extents[at.member];
    size_t& k = next[at.member];
    while (list[k].offset + list[k].length <= at.offset) ++k;
    const uint64_t now = std::min({end - offset, chunk_ - at.inside, list[k].offset + list[k].length - at.offset});
    append_extent(all, Extent{offset, now, list[k].kind});
    offset += now;
  }
  co_return all;
}

}  // namespace

Result<VolumePtr> make_stripe(std::string name, std::vector<VolumePtr> members, uint64_t chunk, uint64_t size) {
  if (members.empty()) return fail(ErrorKind::kInvalid, fmt::format("volume {}: stripe without members", name));
  if (members.size() > 512) return fail(ErrorKind::kInvalid, fmt::format("volume {}: {} members", name, members.size()));
  const uint32_t block = combine_geometry(members).block_size;
  if (chunk == 0 || !is_aligned(chunk, block) || chunk > kGiB)
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: chunk {} is no multiple of the block size {}", name,
                                                 chunk, block));
  for (const VolumePtr& m : members) {
    if (!is_aligned(m->size(), chunk) || m->size() == 0)
      return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {}: size {} is no multiple of chunk {}", name,
                                                   m->name(), m->size(), chunk));
    if (m->size() != members[0]->size())
      return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {}: size {} differs from member {}'s {}", name,
                                                   m->name(), m->size(), members[0]->name(), members[0]->size()));
  }
  const uint64_t whole = members[0]->size() * members.size();
  if (size > whole || !is_aligned(size, block))
    return fail(ErrorKind::kInvalid, fmt::format("volume {}: size {} of a stripe that holds {}", name, size, whole));
  return std::make_shared<Stripe>(std::move(name), std::move(members), chunk, size == 0 ? whole : size);
}

}  // namespace spillway
