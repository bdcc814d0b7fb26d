#include "src/volume/linear/linear.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "src/io/sync.h"
#include "src/volume/scatter.h"

namespace spillway {
namespace {

struct Table {
  std::vector<VolumePtr> members;
  std::vector<uint64_t> ends;  // of each member, in the volume

  size_t find(uint64_t offset) const {
    size_t i = 0;
    if (ends.size() > 16)
      i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), offset) - ends.begin());
    else
      while (ends[i] <= offset) ++i;
    return i;
  }
  uint64_t start(size_t i) const { return i == 0 ? 0 : ends[i - 1]; }
};

Geometry linear_geometry(const std::vector<VolumePtr>& members) {
  Geometry g = combine_geometry(members);
  // Equal members: each is a region of its own. Members that are linear themselves keep their finer regions.
  uint64_t region = 0;
  bool equal = true;
  for (const VolumePtr& m : members) {
    const uint64_t r = m->geometry().independent_region != 0 ? m->geometry().independent_region : m->size();
    equal &= region == 0 || region == r;
    region = r;
  }
  g.independent_region = equal ? region : 0;
  if (!equal) g.independent_region = members.front()->size();
  return g;
}

class Linear final : public LinearVolume {
 public:
  Linear(std::string name, std::unique_ptr<Table> table, Adopt adopt)
      : LinearVolume(std::move(name), table->ends.back(), linear_geometry(table->members)), adopt_(std::move(adopt)) {
    publish(std::move(table));
  }

  std::string_view layer() const override { return "linear"; }
  std::vector<VolumePtr> members() const override { return table().members; }
  std::string to_text() const override {
    std::string s = fmt::format("members: {}\nmetadata: {}\n", table().members.size(), adopt_ ? "md 1.2" : "none");
    for (size_t i = 0; i < table().members.size(); ++i)
      s += fmt::format("region {}: {} at {}\n", i, table().members[i]->name(), table().start(i));
    return s;
  }

  Task<Status> append(VolumePtr member) override {
    co_await growth_.lock();
    Status s = check_appendable(*member);
    if (s && adopt_) {
      auto area = co_await adopt_(member);
      if (area) member = std::move(*area);
      else s = fail(std::move(area).error());
    }
    if (s) {
      auto next = std::make_unique<Table>(table());
      next->ends.push_back(next->ends.back() + member->size());
      next->members.push_back(std::move(member));
      const uint64_t grown = next->ends.back();
      publish(std::move(next));
      set_size(grown);
    }
    growth_.unlock();
    co_return s;
  }

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    const Table& t = table();
    const size_t i = t.find(offset);
    if (offset + iov_length(iov) <= t.ends[i]) return t.members[i]->read(ctx, offset - t.start(i), iov);
    return spanning(Scatter::Op::kRead, ctx, offset, iov_length(iov), iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    const Table& t = table();
    const size_t i = t.find(offset);
    if (offset + iov_length(iov) <= t.ends[i]) return t.members[i]->write(ctx, offset - t.start(i), iov);
    return spanning(Scatter::Op::kWrite, ctx, offset, iov_length(iov), iov);
  }
  Task<Status> do_flush(IoContext ctx) override { return flush_all(ctx, table().members); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return spanning(Scatter::Op::kDiscard, ctx, offset, length, {});
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override {
    return spanning(unmap ? Scatter::Op::kZeroUnmap : Scatter::Op::kZero, ctx, offset, length, {});
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override {
    const Table& t = table();
    std::vector<Extent> all;
    for (const uint64_t end = offset + length; offset < end;) {
      const size_t i = t.find(offset);
      const uint64_t stop = std::min(end, t.ends[i]);
      auto part = co_await t.members[i]->block_status(offset - t.start(i), stop - offset);
      if (!part) co_return std::unexpected(std::move(part).error());
      for (Extent e : *part) {
        e.offset += t.start(i);
        append_extent(all, e);
      }
      offset = stop;
    }
    co_return all;
  }
  // Grows the last member, and with it the volume.
  Task<Status> do_resize(uint64_t new_size) override {
    if (adopt_)
      co_return fail(ErrorKind::kUnsupported, fmt::format("volume {}: an md array grows by whole members", name()));
    co_await growth_.lock();
    VolumePtr last = table().members.back();
    const uint64_t start = table().start(table().members.size() - 1);
    Status s = fail(ErrorKind::kInvalid, fmt::format("volume {}: resize to {}", name(), new_size));
    if (new_size > start) s = co_await last->resize(new_size - start);
    if (s) {
      auto next = std::make_unique<Table>(table());
      next->ends.back() = new_size;
      publish(std::move(next));
      set_size(new_size);
    }
    growth_.unlock();
    co_return s;
  }

 private:
  Status check_appendable(const Volume& member) const {
    const Geometry& g = member.geometry();
    const auto no = [&](ErrorKind kind, const std::string& why) {
      return fail(kind, fmt::format("volume {}: member {}: {}", name(), member.name(), why));
    };
    if (g.block_size > geometry().block_size)
      return no(ErrorKind::kInvalid, fmt::format("blocks of {}, the volume's are {}", g.block_size, geometry().block_size));
    if (!is_aligned(member.size(), geometry().block_size) || member.size() == 0)
      return no(ErrorKind::kInvalid, fmt::format("size {} is no multiple of {}", member.size(), geometry().block_size));
    if (g.read_only != geometry().read_only) return no(ErrorKind::kInvalid, "read-only, unlike the others");
    if (g.discard_granularity == 0 && geometry().discard_granularity != 0)
      return no(ErrorKind::kInvalid, "cannot discard, unlike the others");
    for (const VolumePtr& m : table().members) {  // md's are slices of the disks
      const auto below = m->members();
      if (m.get() == &member || (adopt_ && below.size() == 1 && below[0].get() == &member))
        return no(ErrorKind::kExists, "is a member already");
    }
    return {};
  }
  const Table& table() const { return *table_.load(std::memory_order_acquire); }  // pairs with publish
  void publish(std::unique_ptr<Table> t) {
    table_.store(t.get(), std::memory_order_release);
    tables_.push_back(std::move(t));
  }
  Task<Status> spanning(Scatter::Op op, IoContext ctx, uint64_t offset, uint64_t length, Iov iov) {
    Scatter scatter(iov);
    const Table& t = table();
    for (size_t i = t.find(offset); length > 0; ++i) {
      const uint64_t now = std::min(length, t.ends[i] - offset);
      scatter.take(scatter.add(t.members[i].get(), offset - t.start(i)), now);
      offset += now;
      length -= now;
    }
    co_return co_await scatter.run(op, ctx);
  }

  std::atomic<const Table*> table_{nullptr};
  const Adopt adopt_;
  AsyncMutex growth_;
  std::vector<std::unique_ptr<Table>> tables_;
};

}  // namespace

Result<VolumePtr> make_linear(std::string name, std::vector<VolumePtr> members, Adopt adopt) {
  if (members.empty()) return fail(ErrorKind::kInvalid, fmt::format("volume {}: linear without members", name));
  auto table = std::make_unique<Table>();
  const uint32_t block = combine_geometry(members).block_size;
  uint64_t end = 0;
  for (const VolumePtr& m : members) {
    if (!is_aligned(m->size(), block) || m->size() == 0)
      return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {}: size {} is no multiple of {}", name,
                                                   m->name(), m->size(), block));
    table->ends.push_back(end += m->size());
  }
  table->members = std::move(members);
  return std::make_shared<Linear>(std::move(name), std::move(table), std::move(adopt));
}

}  // namespace spillway
