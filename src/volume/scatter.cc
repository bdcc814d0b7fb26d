#include "src/volume/scatter.h"

#include <algorithm>
#include <utility>

#include "src/io/sync.h"

namespace spillway {

void Scatter::take(Part& part, uint64_t n) {
  part.length += n;
  while (n > 0 && !rest_.empty()) {
    const iovec& v = rest_.front();
    const size_t now = std::min<uint64_t>(n, v.iov_len - skip_);
    if (now > 0) part.iov.push_back({static_cast<std::byte*>(v.iov_base) + skip_, now});
    n -= now;
    skip_ += now;
    if (skip_ == v.iov_len) {
      rest_ = rest_.subspan(1);
      skip_ = 0;
    }
  }
}

static Task<Status> start(Scatter::Op op, IoContext ctx, Scatter::Part& p) {
  switch (op) {
    case Scatter::Op::kRead: return p.volume->read(ctx, p.offset, p.iov);
    case Scatter::Op::kWrite: return p.volume->write(ctx, p.offset, p.iov);
    case Scatter::Op::kDiscard: return p.volume->discard(ctx, p.offset, p.length);
    case Scatter::Op::kZero: return p.volume->write_zeroes(ctx, p.offset, p.length, false);
    case Scatter::Op::kZeroUnmap: return p.volume->write_zeroes(ctx, p.offset, p.length, true);
  }
  std::unreachable();
}

Task<Status> Scatter::run(Op op, IoContext ctx) {
  if (parts_.size() == 1) return start(op, ctx, parts_[0]);
  std::vector<Task<Status>> tasks;
  tasks.reserve(parts_.size());
  for (Part& p : parts_) tasks.push_back(start(op, ctx, p));
  return all_of(std::move(tasks));
}

Task<Status> flush_all(IoContext ctx, const std::vector<VolumePtr>& volumes) {
  if (volumes.size() == 1) return volumes[0]->flush(ctx);
  std::vector<Task<Status>> tasks;
  tasks.reserve(volumes.size());
  for (const VolumePtr& v : volumes) tasks.push_back(v->flush(ctx));
  return all_of(std::move(tasks));
}

Geometry combine_geometry(const std::vector<VolumePtr>& members) {
  Geometry g = members.front()->geometry();
  bool can_discard = true;
  for (const VolumePtr& m : members) {
    const Geometry& o = m->geometry();
    g.block_size = std::max(g.block_size, o.block_size);
    g.physical_block_size = std::max(g.physical_block_size, o.physical_block_size);
    g.min_io = std::max(g.min_io, o.min_io);
    g.opt_io = std::max(g.opt_io, o.opt_io);
    g.discard_granularity = std::max(g.discard_granularity, o.discard_granularity);
    g.rotational |= o.rotational;
    g.read_only |= o.read_only;
    can_discard &= o.discard_granularity != 0;
  }
  if (!can_discard) g.discard_granularity = 0;
  return g;
}

void append_extent(std::vector<Extent>& to, Extent e) {
  if (!to.empty() && to.back().kind == e.kind && to.back().offset + to.back().length == e.offset)
    to.back().length += e.length;
  else
    to.push_back(e);
}

}  // namespace spillway
