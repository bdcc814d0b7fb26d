#include "src/volume/mirror/mirror.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/base/log.h"
#include "src/volume/scatter.h"

namespace spillway {
namespace {

using namespace md;

constexpr uint64_t kGranule = 64 * kKiB;      // of a write lock
constexpr uint64_t kReadSpread = 8 * kMiB;    // neighbouring reads stay on one member
constexpr uint64_t kBounce = kMiB;

Geometry mirror_geometry(const std::vector<MemberPtr>& slots, bool read_only) {
  std::vector<VolumePtr> there;
  for (const auto& m : slots)
    if (m) there.push_back(m->volume);
  Geometry g = combine_geometry(there);
  g.read_only |= read_only;
  return g;
}

class Mirror final : public RedundantArray {
 public:
  Mirror(std::string name, uint64_t size, Geometry geometry, ArrayInit init)
      : RedundantArray(std::move(name), size, geometry, std::move(init)), bounce_(kBounce, 16) {}

  std::string_view layer() const override { return "mirror"; }

 protected:
  bool survives(const std::vector<bool>& missing) const override {
    return std::find(missing.begin(), missing.end(), false) != missing.end();
  }
  bool unsurvived_fault_is_final() const override { return false; }
  bool can_resync() const override { return active_members() >= 1; }
  uint64_t sync_unit() const override { return kGranule; }
  Task<Status> prepare_member(Member&) override { return Task<Status>::ready(); }

  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override;
  Task<Status> do_flush(IoContext ctx) override { return flush_members(ctx); }
  // Zeros, not discard: what a discarded block reads as may differ between members.
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return zero(ctx, offset, length, true);
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override {
    return zero(ctx, offset, length, unmap);
  }
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override;
  Task<Result<uint64_t>> sync_step(Sync kind, MemberPtr target, uint64_t offset, uint64_t length) override;

 private:
  size_t active_members() const {
    size_t n = 0;
    for (const auto& m : table().slots) n += m && m->state.load() == MemberState::kActive;
    return n;
  }
  MemberPtr first_active() const {
    for (const auto& m : table().slots)
      if (m && m->state.load() == MemberState::kActive) return m;
    return nullptr;
  }
  Task<Status> read_other(IoContext ctx, uint64_t offset, Iov iov);
  Task<Status> read_any(IoContext ctx, uint64_t offset, std::byte* to, uint64_t length, MemberPtr* source);
  Task<Status> write_all(IoContext ctx, uint64_t offset, Iov iov);
  Task<Status> zero(IoContext ctx, uint64_t offset, uint64_t length, bool unmap);
  Task<Status> fan_out(uint64_t end, std::function<Task<Status>(Member&)> op);

  BufferPool bounce_;
};

Task<Status> Mirror::do_read(IoContext ctx, uint64_t offset, Iov iov) {
  note_foreground();
  const uint64_t end = offset + iov_length(iov);
  const auto& slots = table().slots;
  MemberPtr m;
  if (needs_sync(offset, end)) {
    m = first_active();
  } else {
    const size_t turn = static_cast<size_t>(offset / kReadSpread);
    for (size_t i = 0; i < slots.size() && !m; ++i)
      if (const size_t k = (turn + i) % slots.size(); slots[k] && slots[k]->in_use(end)) m = slots[k];
  }
  if (!m) co_return failed_error();
  Status s = co_await m->volume->read(ctx, m->data_offset() + offset, iov);
  if (s) co_return s;
  if (s.error().kind() != ErrorKind::kIo && s.error().kind() != ErrorKind::kNotFound) co_return s;
  co_return co_await read_other(ctx, offset, iov);
}

// Some member could not read. Again under the lock, so that a correction undoes no newer write.
Task<Status> Mirror::read_other(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov), end = offset + length;
  const uint64_t g0 = offset / kGranule, g1 = (end - 1) / kGranule;
  AlignedBuffer copy(length);
  if (!copy) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: read", name()));
  co_await stripes_.lock_range(g0, g1);
  MemberPtr source;
  Status s = co_await read_any(ctx, offset, copy.data(), length, &source);
  stripes_.unlock_range(g0, g1);
  if (s) copy_to_iov(iov, 0, copy.data(), length);
  co_return co_await settle(std::move(s));
}

// Under the locks: the range from whichever member has it, in pieces where no single one has all of it. What a member
// could not read it gets back from the one that could; a member that refuses even that is faulty.
// *source: who had it, null when it came in pieces.
Task<Status> Mirror::read_any(IoContext ctx, uint64_t offset, std::byte* to, uint64_t length, MemberPtr* source) {
  const uint64_t end = offset + length;
  const bool doubtful = needs_sync(offset, end);
  std::vector<MemberPtr> unreadable;
  Status s = failed_error();
  source->reset();
  for (const auto& m : table().slots) {
    if (!m || !m->in_use(end)) continue;
    s = co_await member_read(*m, ctx, offset, to, length);
    if (s) {
      *source = m;
      break;
    }
    unreadable.push_back(m);
    if (doubtful) break;  // only the first one counts here
  }
  if (!s && length > kPageSize) {
    const uint64_t half = align_up(length / 2, kPageSize);
    s = co_await read_any(ctx, offset, to, half, source);
    if (s) s = co_await read_any(ctx, offset + half, to + half, length - half, source);
    source->reset();
    co_return s;
  }
  if (!s || read_only_open()) co_return s;
  for (const auto& m : unreadable) {
    if (m->state.load() != MemberState::kActive) continue;
    AlignedBuffer check(length);
    if (!check) break;
    Status w = co_await begin_write(offset, end);
    if (!w) break;
    w = co_await member_write(*m, ctx, offset, to, length);
    if (w) w = co_await member_read(*m, ctx, offset, check.data(), length);
    end_write(offset, end);
    if (w) {
      m->read_errors.fetch_add(1);
      LOG_LIMITED(LogLevel::kWarn, "volume", "volume {}: member {}: read error at {} corrected", name(), m->name, offset);
    } else {
      note_fault(*m, w.error());
    }
  }
  co_return Status{};
}

// Runs `op` on every member in use for [.., end) side by side. A member that fails is faulty when the rest can do
// without it; an error of all is the request's.
Task<Status> Mirror::fan_out(uint64_t, std::function<Task<Status>(Member&)> op) {
  struct Result1 {
    MemberPtr member;
    Status status{};
  };
  std::vector<Result1> results;
  for (const auto* list : {&table().slots, &table().replacements})
    for (const auto& m : *list) {
      if (!m) continue;
      const MemberState st = m->state.load();
      if (st == MemberState::kActive || st == MemberState::kRebuilding) results.push_back({m, {}});
    }
  auto one = [](Task<Status> t, Status* out) -> Task<Status> {
    *out = co_await t;
    co_return Status{};
  };
  std::vector<Task<Status>> tasks;
  for (auto& r : results) tasks.push_back(one(op(*r.member), &r.status));
  co_await all_of(std::move(tasks));
  bool any_active = false;
  for (auto& r : results) any_active |= r.status && r.member->state.load() == MemberState::kActive;
  if (!any_active) {
    for (auto& r : results)
      if (!r.status) co_return std::move(r.status);
    co_return failed_error();
  }
  for (auto& r : results)
    if (!r.status) note_fault(*r.member, r.status.error());
  co_return co_await settle(Status{});
}

Task<Status> Mirror::write_all(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov), end = offset + length;
  BufferPool::Lease copy(bounce_);
  if (!copy) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: write", name()));
  Status s = co_await begin_write(offset, end);
  if (!s) co_return s;
  const uint64_t g0 = offset / kGranule, g1 = (end - 1) / kGranule;
  co_await stripes_.lock_range(g0, g1);
  copy_from_iov(copy.data(), iov, 0, length);
  const std::byte* from = copy.data();
  s = co_await fan_out(end, [&](Member& m) { return member_write(m, ctx, offset, from, length); });
  stripes_.unlock_range(g0, g1);
  end_write(offset, end);
  co_return s;
}

Task<Status> Mirror::do_write(IoContext ctx, uint64_t offset, Iov iov) {
  note_foreground();
  const uint64_t length = iov_length(iov);
  if (length <= kBounce) return write_all(ctx, offset, iov);
  auto pieces = [](Mirror* self, IoContext c, uint64_t at, Iov all) -> Task<Status> {
    const uint64_t total = iov_length(all);
    for (uint64_t done = 0; done < total; done += kBounce) {
      const IovSlice part(all, done, std::min(kBounce, total - done));
      Status s = co_await self->write_all(c, at + done, part);
      if (!s) co_return s;
    }
    co_return Status{};
  };
  return pieces(this, ctx, offset, iov);
}

Task<Status> Mirror::zero(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) {
  note_foreground();
  const uint64_t end = offset + length;
  Status s = co_await begin_write(offset, end);
  if (!s) co_return s;
  const uint64_t g0 = offset / kGranule, g1 = (end - 1) / kGranule;
  co_await stripes_.lock_range(g0, g1);
  s = co_await fan_out(end, [&](Member& m) { return m.volume->write_zeroes(ctx, m.data_offset() + offset, length, unmap); });
  stripes_.unlock_range(g0, g1);
  end_write(offset, end);
  co_return s;
}

Task<Result<std::vector<Extent>>> Mirror::do_block_status(uint64_t offset, uint64_t length) {
  MemberPtr m = first_active();
  if (!m) return Volume::do_block_status(offset, length);
  auto ask = [](MemberPtr who, uint64_t at, uint64_t n) -> Task<Result<std::vector<Extent>>> {
    auto r = co_await who->volume->block_status(who->data_offset() + at, n);
    if (r)
      for (Extent& e : *r) e.offset -= who->data_offset();
    co_return r;
  };
  return ask(m, offset, length);
}

Task<Result<uint64_t>> Mirror::sync_step(Sync kind, MemberPtr target, uint64_t offset, uint64_t length) {
  IoContext ctx;
  ctx.io_class = kind == Sync::kCheck || kind == Sync::kRepair ? IoClass::kScrub : IoClass::kRebuild;
  AlignedBuffer good(length), other(length);
  if (!good || !other) co_return fail(ErrorKind::kNoMemory, "resync buffers");
  const uint64_t end = offset + length, g0 = offset / kGranule, g1 = (end - 1) / kGranule;
  co_await stripes_.lock_range(g0, g1);
  uint64_t differ = 0;
  MemberPtr source;
  Status s = co_await read_any(ctx, offset, good.data(), length, &source);
  if (s && kind == Sync::kRebuild) {
    s = co_await member_write(*target, ctx, offset, good.data(), length);
    if (s) target->recovered.store(end, std::memory_order_release);
    else note_fault(*target, s.error());
  }
  for (size_t slot = 0; s && kind != Sync::kRebuild && slot < table().slots.size(); ++slot) {
    const MemberPtr m = table().slots[slot];
    if (!m || m == source || !m->in_use(end)) continue;
    Status r = co_await member_read(*m, ctx, offset, other.data(), length);
    uint64_t here = 0;
    for (uint64_t i = 0; r && i < length; i += kSectorSize)
      here += std::memcmp(good.data() + i, other.data() + i, kSectorSize) != 0;
    differ += here;
    if (r && (here == 0 || kind == Sync::kCheck)) continue;
    Status w = co_await slot_write(slot, ctx, offset, good.data(), length);
    if (w && !r && m->state.load() == MemberState::kActive) m->read_errors.fetch_add(1);
  }
  stripes_.unlock_range(g0, g1);
  if (!s) co_return fail(std::move(s).error());
  co_return differ;
}

}  // namespace

Result<std::shared_ptr<md::RedundantArray>> make_mirror(std::string name, md::ArrayInit init) {
  const Geometry geometry = mirror_geometry(init.slots, init.read_only);
  const uint64_t size = align_down(init.sb.raw.size * kSectorSize, geometry.block_size);
  return std::make_shared<Mirror>(std::move(name), size, geometry, std::move(init));
}

}  // namespace spillway
