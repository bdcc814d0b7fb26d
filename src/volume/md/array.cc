#include "src/volume/md/array.h"

#include <fmt/core.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <utility>

#include "src/base/log.h"

namespace spillway::md {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr uint64_t kDaemonPeriod = 5 * kSecond;
constexpr uint64_t kCheckpointBytes = 64 * kMiB;
constexpr uint64_t kCheckpointTime = 5 * kSecond;

uint64_t wall_seconds() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count());
}

}  // namespace

Task<void> StripeLocks::lock_range(uint64_t first, uint64_t last) {
  const uint64_t n = std::min(last - first + 1, kLocks);
  const uint64_t a = first % kLocks, b = a + n;  // [a, b) modulo kLocks
  for (uint64_t i = b > kLocks ? 0 : a; i < kLocks; ++i) {
    const bool in = b > kLocks ? (i < b - kLocks || i >= a) : i < b;
    if (in) co_await locks_[i].m.lock();
  }
}

void StripeLocks::unlock_range(uint64_t first, uint64_t last) {
  const uint64_t n = std::min(last - first + 1, kLocks);
  for (uint64_t i = 0; i < n; ++i) locks_[(first + i) % kLocks].m.unlock();
}

void BufferPool::get(Lease* to) {
  const size_t slab = std::max(kSlab, size_);
  bool grow = false;
  {
    std::lock_guard l(lock_);
    if (!free_.empty()) {
      to->data_ = free_.back();
      free_.pop_back();
      return;
    }
    grow = made_ < keep_;
    if (grow) made_ += slab / size_;
  }
  AlignedBuffer fresh(grow ? slab : size_, grow ? kSlab : kPageSize);
  if (!grow) {
    to->own_ = std::move(fresh);
    to->data_ = to->own_.data();
    return;
  }
  std::lock_guard l(lock_);
  if (!fresh) {
    made_ -= slab / size_;
    return;
  }
  (void)::madvise(fresh.data(), slab, MADV_HUGEPAGE);
  // The first ones on top.
  for (size_t at = slab / size_ * size_; at > size_;) free_.push_back(fresh.data() + (at -= size_));
  to->data_ = fresh.data();
  slabs_.push_back(std::move(fresh));
}

void BufferPool::put(std::byte* p) {
  std::lock_guard l(lock_);
  free_.push_back(p);
}

RedundantArray::RedundantArray(std::string name, uint64_t size, Geometry geometry, ArrayInit init)
    : Volume(std::move(name), size, geometry),
      bitmap_(std::move(init.bitmap)),
      common_(std::move(init.sb)),
      // The kernel rounds to chunks, too; what is left over at a member's end is nobody's.
      component_size_(align_down(common_.raw.size * kSectorSize,
                                 common_.raw.level == kLevelRaid5 ? common_.chunk_bytes() : geometry.block_size)),
      read_only_(init.read_only),
      background_allowed_(init.background && !init.read_only),
      rate_min_(std::max<uint64_t>(init.rebuild_rate_min, 64 * kKiB)),
      bitmap_offset_(init.bitmap_offset),
      home_(&Reactor::current()),
      spares_(std::move(init.spares)),
      slot_names_(std::move(init.slot_names)),
      resync_(init.known_in_sync || common_.clean() ? kInSync : common_.raw.resync_offset * kSectorSize) {
  auto t = std::make_unique<Table>();
  t->slots = std::move(init.slots);
  t->replacements = std::move(init.replacements);
  t->replacements.resize(t->slots.size());
  // These are a member's own, and common_ came from one of them.
  common_.raw.feature_map &= ~(kFeatureRecoveryOffset | kFeatureRecoveryBitmap | kFeatureReplacement);
  slot_names_.resize(t->slots.size());
  for (size_t i = 0; i < t->slots.size(); ++i) {
    if (!t->slots[i]) continue;
    slot_names_[i] = t->slots[i]->name;
    uneven_ |= t->slots[i]->sb.raw.events != common_.raw.events;
  }
  publish_table(std::move(t));
  if (bitmap_) {
    bitmap_->set_writer([this](uint64_t offset, std::span<const std::byte> bytes, bool fua) {
      return write_bitmap(offset, bytes, fua);
    });
    if (resync_position() != kInSync && resync_position() > 0) resync_.store(0);  // the bits say where
  }
}

void RedundantArray::publish_table(std::unique_ptr<Table> t) {
  table_.store(t.get(), std::memory_order_release);
  tables_.push_back(std::move(t));
}

void RedundantArray::start() {
  if (read_only_) return;
  kick_background();
  if (bitmap_ && bitmap_->bits_set() > 0) kick_daemon();
}

std::vector<MemberPtr> RedundantArray::all_members() const {
  std::vector<MemberPtr> all;
  for (const auto* list : {&table().slots, &table().replacements})
    for (const auto& m : *list)
      if (m && m->state.load() != MemberState::kFaulty) all.push_back(m);
  std::lock_guard l(list_lock_);
  for (const auto& m : spares_)
    if (m->state.load() != MemberState::kFaulty) all.push_back(m);
  return all;
}

std::vector<VolumePtr> RedundantArray::members() const {
  std::vector<VolumePtr> v;
  for (const auto& m : all_members()) v.push_back(m->volume);
  return v;
}

MemberPtr RedundantArray::find(std::string_view name) const {
  for (const auto* list : {&table().slots, &table().replacements})
    for (const auto& m : *list)
      if (m && m->name == name) return m;
  std::lock_guard l(list_lock_);
  for (const auto* list : {&spares_, &faulty_})
    for (const auto& m : *list)
      if (m->name == name) return m;
  return nullptr;
}

bool RedundantArray::needs_sync(uint64_t first, uint64_t end) const {
  const uint64_t position = resync_position();
  if (position == kInSync) return false;
  return bitmap_ ? bitmap_->needs_sync(first, end) : end > position;
}

bool RedundantArray::degraded() const {
  for (const auto& m : table().slots)
    if (!m || m->state.load() != MemberState::kActive) return true;
  return false;
}

Status RedundantArray::failed_error() const {
  return fail(ErrorKind::kDegraded, fmt::format("volume {}: too many members have failed", name()));
}

std::string RedundantArray::consistency() const { return bitmap_ ? "bitmap" : "resync"; }

// --- requests ---

Task<Status> RedundantArray::member_read(Member& m, IoContext ctx, uint64_t offset, void* to, uint64_t length) {
  const iovec v{to, length};
  ctx.fua = false;
  co_return co_await m.volume->read(ctx, m.data_offset_ + offset, Iov(&v, 1));
}

Task<Status> RedundantArray::member_write(Member& m, IoContext ctx, uint64_t offset, const void* from, uint64_t length) {
  const iovec v{const_cast<void*>(from), length};
  co_return co_await m.volume->write(ctx, m.data_offset_ + offset, Iov(&v, 1));
}

Task<Status> RedundantArray::slot_write(size_t slot, IoContext ctx, uint64_t offset, const void* from, uint64_t length) {
  const iovec v{const_cast<void*>(from), length};
  co_return co_await slot_write(slot, ctx, offset, Iov(&v, 1));
}

Task<Status> RedundantArray::slot_write(size_t slot, IoContext ctx, uint64_t offset, Iov from) {
  const Table& t = table();
  const MemberPtr m = t.slots[slot], r = t.replacements[slot];
  if (!m || m->state.load() == MemberState::kFaulty) co_return Status{};
  if (r && r->state.load() == MemberState::kRebuilding) {
    std::vector<Task<Status>> both;
    Status of_member{}, of_replacement{};
    auto one = [](Member& to, IoContext c, uint64_t at, Iov data, Status* out) -> Task<Status> {
      *out = co_await to.volume->write(c, to.data_offset_ + at, data);
      co_return Status{};
    };
    both.push_back(one(*m, ctx, offset, from, &of_member));
    both.push_back(one(*r, ctx, offset, from, &of_replacement));
    co_await all_of(std::move(both));
    if (!of_replacement) note_fault(*r, of_replacement.error());
    if (!of_member && !note_fault(*m, of_member.error())) co_return of_member;
    co_return Status{};
  }
  Status s = co_await m->volume->write(ctx, m->data_offset_ + offset, from);
  if (!s && !note_fault(*m, s.error())) co_return s;
  co_return Status{};
}

Task<Status> RedundantArray::begin_write(uint64_t first, uint64_t end) {
  if (array_failed()) co_return failed_error();
  writers_.fetch_add(1);
  written_.fetch_add(1, std::memory_order_relaxed);
  Status s{};
  if (!activated_.load()) s = co_await activate();
  bool counted = false;
  if (s && bitmap_) {
    s = co_await bitmap_->start_write(first, end);
    counted = s.has_value();
  }
  if (s) s = co_await settle(std::move(s));
  if (!s && counted) bitmap_->end_write(first, end);
  if (!s) writers_.fetch_sub(1);
  co_return s;
}

void RedundantArray::end_write(uint64_t first, uint64_t end) {
  if (bitmap_) bitmap_->end_write(first, end);
  writers_.fetch_sub(1);
}

Task<Status> RedundantArray::settle(Status s) {
  if (faults_recorded()) co_return s;
  Status recorded = co_await record_faults();
  if (s && !recorded) co_return recorded;
  co_return s;
}

Task<Status> RedundantArray::flush_members(IoContext ctx) {
  auto one = [](RedundantArray* self, MemberPtr m, IoContext c, bool* lost) -> Task<Status> {
    Status s = co_await m->volume->flush(c);
    if (!s && m->state.load() != MemberState::kFaulty && !self->note_fault(*m, s.error())) *lost = true;
    co_return Status{};
  };
  std::vector<Task<Status>> tasks;
  bool lost = false;
  for (const auto* list : {&table().slots, &table().replacements})
    for (const auto& m : *list)
      if (m && m->state.load() != MemberState::kFaulty) tasks.push_back(one(this, m, ctx, &lost));
  co_await all_of(std::move(tasks));
  if (lost) co_return fail(ErrorKind::kIo, fmt::format("volume {}: flush failed on a member it cannot lose", name()));
  co_return co_await settle(Status{});
}

// --- faults and superblocks ---

bool RedundantArray::can_lose(const Member& m) const {
  const auto& slots = table().slots;
  std::vector<bool> missing(slots.size());
  for (size_t i = 0; i < slots.size(); ++i)
    missing[i] = !slots[i] || slots[i].get() == &m || slots[i]->state.load() != MemberState::kActive;
  return m.state.load() != MemberState::kActive || survives(missing);
}

bool RedundantArray::note_fault(Member& m, const Error& why) {
  std::lock_guard l(fault_lock_);
  if (m.state.load() == MemberState::kFaulty) return true;
  if (!can_lose(m)) {
    if (!failed_.load())
      LOG_LIMITED(LogLevel::kError, "volume", "volume {}: member {}: {}: cannot go on without it", name(), m.name,
                  why.message());
    if (unsurvived_fault_is_final()) failed_.store(true, std::memory_order_release);
    return false;
  }
  log(LogLevel::kError, "volume", "volume {}: member {} is faulty: {}", name(), m.name, why.message());
  m.state.store(MemberState::kFaulty, std::memory_order_release);
  noted_.fetch_add(1, std::memory_order_release);
  return true;
}

Task<Status> RedundantArray::record_faults() {
  co_await config_.lock();
  Status s{};
  while (s && !faults_recorded() && !read_only_) {
    const uint64_t want = noted_.load();
    {
      std::lock_guard l(list_lock_);
      for (auto it = spares_.begin(); it != spares_.end();) {
        if ((*it)->state.load() == MemberState::kFaulty) {
          faulty_.push_back(*it);
          it = spares_.erase(it);
        } else {
          ++it;
        }
      }
    }
    auto next = std::make_unique<Table>(table());
    bool changed = false;
    for (size_t i = 0; i < next->slots.size(); ++i) {
      MemberPtr& r = next->replacements[i];
      if (!r) continue;
      if (r->state.load() == MemberState::kFaulty) {
        std::lock_guard l(list_lock_);
        faulty_.push_back(std::move(r));
        r = nullptr;
        changed = true;
      } else if (next->slots[i] && next->slots[i]->state.load() == MemberState::kFaulty) {
        r->recovered.store(0);  // it misses what is written from now on; see promote_replacement()
      }
    }
    if (changed) publish_table(std::move(next));
    s = co_await write_superblocks();
    if (s) s = co_await write_superblocks();
    if (s) recorded_.store(std::max(recorded_.load(), want), std::memory_order_release);
  }
  config_.unlock();
  kick_background();
  co_return s;
}

Task<Status> RedundantArray::write_bitmap(uint64_t offset, std::span<const std::byte> bytes, bool fua) {
  AlignedBuffer buffer(bytes.size());
  if (!buffer) co_return fail(ErrorKind::kNoMemory, fmt::format("volume {}: bitmap", name()));
  std::memcpy(buffer.data(), bytes.data(), bytes.size());
  auto one = [](RedundantArray* self, MemberPtr m, uint64_t at, iovec v, bool stable, int* good) -> Task<Status> {
    IoContext ctx;
    ctx.io_class = IoClass::kMetadata;
    ctx.fua = stable;
    Status s = co_await m->volume->write(ctx, at, Iov(&v, 1));
    if (s) ++*good;
    else self->note_fault(*m, s.error());
    co_return Status{};
  };
  std::vector<Task<Status>> tasks;
  int good = 0;
  for (const auto& m : all_members())
    tasks.push_back(one(this, m, bitmap_offset_ + offset, buffer.iov(), fua, &good));
  co_await all_of(std::move(tasks));
  if (good == 0) co_return fail(ErrorKind::kIo, fmt::format("volume {}: no member takes the bitmap", name()));
  co_return Status{};
}

Task<Status> RedundantArray::write_superblocks() {
  // A crash in the middle of a round leaves members one event behind, which is allowed; a crash in the middle of the
  // next would leave them two behind, which is stale. So they catch up before the count goes on.
  // With what the others have under that count, not with what has changed since: one count, one content.
  if (uneven_) {
    if (bitmap_) {
      Status s = co_await bitmap_->write_header(common_.raw.events, true);
      if (!s) co_return s;
    }
    for (const MemberPtr& m : all_members()) {
      if (m->sb.raw.events == common_.raw.events || m->sb.own_role() == kRoleSpare) continue;
      m->sb.raw.events = common_.raw.events;
      m->sb.raw.resync_offset = common_.raw.resync_offset;
      m->sb.roles = common_.roles;
      Status s = co_await write_superblock(*m->volume, m->sb);
      if (!s && !note_fault(*m, s.error())) co_return s;
    }
    uneven_ = false;
  }
  ++common_.raw.events;
  co_return co_await superblock_round();
}

Task<Status> RedundantArray::superblock_round() {
  common_.raw.utime = wall_seconds();
  const uint64_t resync = resync_position();
  if (active_.load())
    common_.raw.resync_offset = 0;
  else
    common_.raw.resync_offset = resync == kInSync ? kInSync : resync / kSectorSize;
  const auto all = all_members();
  bool is_degraded = false;
  for (uint16_t& r : common_.roles)
    if (r != kRoleFaulty) r = kRoleSpare;
  {
    std::lock_guard l(list_lock_);
    for (const auto& m : faulty_) common_.roles[m->sb.raw.dev_number] = kRoleFaulty;
  }
  for (const auto& m : table().slots) {
    if (!m || m->state.load() != MemberState::kActive) is_degraded = true;
    if (!m) continue;
    common_.roles[m->sb.raw.dev_number] =
        m->state.load() == MemberState::kFaulty ? kRoleFaulty : static_cast<uint16_t>(m->slot);
  }
  for (const auto& m : table().replacements)
    if (m) common_.roles[m->sb.raw.dev_number] =
        m->state.load() == MemberState::kFaulty ? kRoleFaulty : static_cast<uint16_t>(m->slot);
  for (const auto& m : all)
    if (m->slot < 0) common_.roles[m->sb.raw.dev_number] = kRoleSpare;
  if (bitmap_) {
    Status s = co_await bitmap_->write_header(common_.raw.events, is_degraded);
    if (!s) co_return s;
  }
  auto one = [](RedundantArray* self, MemberPtr m, int* good) -> Task<Status> {
    Status s = co_await write_superblock(*m->volume, m->sb);
    if (s) ++*good;
    else self->note_fault(*m, s.error());
    co_return Status{};
  };
  std::vector<Task<Status>> tasks;
  int good = 0;
  for (const auto& m : all) {
    if (m->state.load() == MemberState::kFaulty) continue;
    RawSuperblock& r = m->sb.raw;
    r.events = common_.raw.events;
    r.utime = common_.raw.utime;
    r.resync_offset = common_.raw.resync_offset;
    r.corrected_reads = static_cast<uint32_t>(m->read_errors.load(std::memory_order_relaxed));
    r.feature_map = common_.raw.feature_map;
    r.recovery_offset = 0;
    if (is_replacement(m)) r.feature_map |= kFeatureReplacement;
    if (m->state.load() == MemberState::kRebuilding) {
      r.feature_map |= kFeatureRecoveryOffset;
      r.recovery_offset = m->recovered.load() / kSectorSize;
    }
    m->sb.roles = common_.roles;
    tasks.push_back(one(this, m, &good));
  }
  co_await all_of(std::move(tasks));
  if (good == 0) co_return fail(ErrorKind::kIo, fmt::format("volume {}: no member takes its superblock", name()));
  co_return Status{};
}

Task<Status> RedundantArray::activate() {
  co_await config_.lock();
  Status s{};
  if (!activated_.load()) {
    const bool was = active_.exchange(true);
    s = co_await write_superblocks();
    // A missing member must not look fresh when it comes back: two events ahead of it.
    if (s && degraded()) s = co_await write_superblocks();
    if (s) activated_.store(true);
    else active_.store(was);
  }
  config_.unlock();
  if (s) kick_daemon();
  co_return s;
}

Task<bool> RedundantArray::try_mark_clean() {
  if (!active_.load()) co_return true;
  if (array_failed()) co_return false;
  // Counted before the flush: a write that begins after it is not covered, even when it ends before the lock is ours.
  const uint64_t before = written_.load();
  if (writers_.load() != 0) co_return false;
  Status s = co_await flush_members(IoContext{.io_class = IoClass::kMetadata});
  if (!s) co_return false;
  co_await config_.lock();
  const bool was = activated_.exchange(false);
  if (writers_.load() != 0 || written_.load() != before) {
    activated_.store(was);
    config_.unlock();
    co_return false;
  }
  active_.store(false);
  s = co_await write_superblocks();
  if (!s) active_.store(true);  // some may say clean all the same: the next write says it again on all
  config_.unlock();
  co_return s.has_value();
}

// --- background work ---

void RedundantArray::kick_background() {
  if ((!background_allowed_ && !scrub_wanted_.load()) || stopping_.load()) return;
  if (background_running_.exchange(true)) return;
  running_.add();
  if (Reactor::current_or_null() == home_) home_->spawn(background());
  else home_->post(std::function<void()>([this] { home_->spawn(background()); }));
}

void RedundantArray::kick_daemon() {
  if (read_only_ || stopping_.load() || daemon_running_.exchange(true)) return;
  running_.add();
  if (Reactor::current_or_null() == home_) home_->spawn(daemon());
  else home_->post(std::function<void()>([this] { home_->spawn(daemon()); }));
}

Task<void> RedundantArray::nap(IoOp** slot, uint64_t ns) {
  if (stopping_.load()) co_return;
  IoAwait sleep = home_->sleep_for(ns);
  *slot = &sleep;
  co_await sleep;
  *slot = nullptr;
}

void RedundantArray::wake_naps() {
  for (IoOp** slot : {&background_nap_, &daemon_nap_})
    if (*slot != nullptr) home_->cancel(**slot);
}

Task<void> RedundantArray::daemon() {
  uint64_t seen = written_.load();
  while (!stopping_.load()) {
    co_await nap(&daemon_nap_, kDaemonPeriod);
    if (stopping_.load()) break;
    uint64_t bits = 0;
    if (bitmap_) {
      auto r = co_await bitmap_->clear_idle(
          [this]() -> Task<Status> { return flush_members(IoContext{.io_class = IoClass::kMetadata}); },
          [this] { return !degraded(); }, false);
      if (r) bits = *r;
    }
    const uint64_t now = written_.load();
    const bool quiet = now == seen && writers_.load() == 0;
    seen = now;
    if (!quiet) continue;
    const bool clean = co_await try_mark_clean();
    // Bits that cannot be cleared now (degraded, resync to come) wait for what changes that, which kicks us again.
    if (clean && (bits == 0 || degraded() || resync_position() != kInSync || !bitmap_)) break;
    if (array_failed()) break;
  }
  daemon_running_.store(false);
  if (active_.load() && !stopping_.load() && !array_failed()) kick_daemon();
  running_.done();
}

Task<bool> RedundantArray::assign_spare() {
  co_await config_.lock();
  bool assigned = false;
  const Table& old = table();
  for (size_t i = 0; i < old.slots.size() && !assigned; ++i) {
    if (old.slots[i] && old.slots[i]->state.load() != MemberState::kFaulty) continue;
    MemberPtr spare;
    {
      std::lock_guard l(list_lock_);
      if (spares_.empty()) break;
      spare = spares_.front();
      spares_.erase(spares_.begin());
      if (old.slots[i]) faulty_.push_back(old.slots[i]);
    }
    spare->slot = static_cast<int>(i);
    spare->recovered.store(0);
    spare->state.store(MemberState::kRebuilding, std::memory_order_release);
    auto next = std::make_unique<Table>(old);
    next->slots[i] = spare;
    slot_names_[i] = spare->name;
    publish_table(std::move(next));
    log(LogLevel::kInfo, "volume", "volume {}: rebuilding slot {} onto {}", name(), i, spare->name);
    co_await write_superblocks();
    if (bitmap_) co_await bitmap_->write_all();  // nobody wrote bits to a spare that another system made
    assigned = true;
  }
  config_.unlock();
  if (assigned) co_await grace();
  co_return assigned;
}

// The old member failed while the new one was being filled: an ordinary rebuild of the slot. It starts again: rows that
// were written since the failure are not on it.
Task<bool> RedundantArray::promote_replacement() {
  co_await config_.lock();
  bool promoted = false;
  auto next = std::make_unique<Table>(table());
  for (size_t i = 0; i < next->slots.size() && !promoted; ++i) {
    MemberPtr r = next->replacements[i];
    if (!r || r->state.load() != MemberState::kRebuilding) continue;
    if (next->slots[i] && next->slots[i]->state.load() != MemberState::kFaulty) continue;
    if (next->slots[i]) {
      std::lock_guard l(list_lock_);
      faulty_.push_back(next->slots[i]);
    }
    r->recovered.store(0);
    next->slots[i] = r;
    next->replacements[i] = nullptr;
    slot_names_[i] = r->name;
    promoted = true;
  }
  if (promoted) {
    publish_table(std::move(next));
    co_await write_superblocks();
  }
  config_.unlock();
  if (promoted) co_await grace();
  co_return promoted;
}

Task<void> RedundantArray::grace() {
  for (uint64_t i = 0; i < StripeLocks::kLocks; ++i) {
    co_await stripes_.of(i).lock();
    stripes_.of(i).unlock();
  }
}

Task<void> RedundantArray::background() {
  // What cannot be finished, because members the array cannot lose fail, waits for a change that kicks us.
  while (!stopping_.load() && !array_failed()) {
    MemberPtr target, replacement;
    for (const auto& m : table().slots)
      if (m && m->state.load() == MemberState::kRebuilding) target = m;
    for (const auto& m : table().replacements)
      if (m && m->state.load() == MemberState::kRebuilding) replacement = m;
    bool done = true;
    if (background_allowed_) {
      if (replacement) {
        const bool promoted = co_await promote_replacement();
        if (promoted) continue;
      }
      if (resync_position() != kInSync && can_resync()) {
        done = co_await run_sync(Sync::kResync, nullptr);
        if (!done) break;
        continue;
      }
      if (target) {
        done = co_await run_sync(Sync::kRebuild, target);
        if (!done && target->state.load() != MemberState::kFaulty) break;
        continue;
      }
      const bool assigned = co_await assign_spare();
      if (assigned) continue;
      if (replacement) {
        done = co_await run_sync(Sync::kRebuild, replacement);
        const bool changed = !is_replacement(replacement) ||
                             table().slots[static_cast<size_t>(replacement->slot)]->state.load() == MemberState::kFaulty;
        if (!done && !changed) break;
        continue;
      }
    }
    // Asked for, so also where nothing starts by itself.
    if (scrub_wanted_.exchange(false)) {
      co_await run_sync(scrub_mode_ == Scrub::kCheck ? Sync::kCheck : Sync::kRepair, nullptr);
    } else {
      break;
    }
  }
  operation_.store(-1);
  background_running_.store(false);
  running_.done();
}

Task<void> RedundantArray::checkpoint(Sync kind, MemberPtr target) {
  if (kind == Sync::kRebuild) {
    // What the superblock claims as recovered must be stable on the target first.
    Status s = co_await target->volume->flush(IoContext{.io_class = IoClass::kRebuild});
    if (!s) {
      note_fault(*target, s.error());
      co_await record_faults();
      co_return;
    }
  } else if (kind == Sync::kResync) {
    Status s = co_await flush_members(IoContext{.io_class = IoClass::kRebuild});
    if (!s) co_return;
  } else {
    co_return;
  }
  co_await config_.lock();
  co_await write_superblocks();
  config_.unlock();
  co_await settle(Status{});
}

Task<bool> RedundantArray::run_sync(Sync kind, MemberPtr target) {
  static constexpr const char* kNames[] = {"resync", "rebuild", "check", "repair"};
  const bool guided = kind == Sync::kResync && bitmap_ != nullptr;
  const bool replacing = kind == Sync::kRebuild && is_replacement(target);
  uint64_t at = kind == Sync::kRebuild ? target->recovered.load() : kind == Sync::kResync ? resync_position() : 0;
  at = align_down(at, sync_unit());
  const uint64_t step = std::max(align_down(kMiB, sync_unit()), sync_unit());
  uint64_t last_bytes = at, last_time = home_->now_ns(), busy_seen = foreground_.load();
  operation_.store(static_cast<int>(kind));
  progress_.store(at);
  started_at_.store(at);
  started_ns_.store(home_->now_ns());
  if (kind == Sync::kCheck || kind == Sync::kRepair) mismatches_.store(0);
  scrub_stop_.store(false);
  log(LogLevel::kInfo, "volume", "volume {}: {} from {}", name(), kNames[static_cast<int>(kind)], at);
  bool stopped = false;
  int failures = 0, lost_in_a_row = 0;
  while (at < component_size_) {
    if (stopping_.load() || array_failed() || (kind >= Sync::kCheck && scrub_stop_.load()) ||
        (kind == Sync::kRebuild && target->state.load() != MemberState::kRebuilding) ||
        (replacing && table().slots[static_cast<size_t>(target->slot)]->state.load() != MemberState::kActive) ||
        (kind == Sync::kResync && !can_resync())) {
      stopped = true;
      break;
    }
    if (guided) {
      at = std::max(at, align_down(bitmap_->next_needing_sync(at), sync_unit()));
      if (at >= component_size_) break;
    }
    const uint64_t length = std::min(step, component_size_ - at);
    const uint64_t begun = home_->now_ns();
    auto r = co_await sync_step(kind, target, at, length);
    co_await settle(Status{});
    if (!r) {
      // A member that failed is out by now and the step is done again without it; a sector nobody can read is not.
      LOG_LIMITED(LogLevel::kWarn, "volume", "volume {}: {} at {}: {}", name(), kNames[static_cast<int>(kind)], at, r.error().message());
      if (++failures < 3) continue;
      if (kind == Sync::kRebuild) {
        stopped = true;
        note_fault(*target, r.error());
        co_await record_faults();
        break;
      }
      failures = 0;
      if (++lost_in_a_row == 16) {  // not a bad sector here and there
        stopped = true;
        break;
      }
    } else {
      failures = lost_in_a_row = 0;
      mismatches_.fetch_add(*r, std::memory_order_relaxed);
    }
    at += length;
    progress_.store(at);
    now_ns_.store(home_->now_ns());
    if (kind == Sync::kResync) {
      if (guided) bitmap_->synced(0, at);
      else resync_.store(at == component_size_ ? resync_position() : at, std::memory_order_release);
    }
    if (kind <= Sync::kRebuild && at < component_size_ &&
        (at - last_bytes >= kCheckpointBytes || home_->now_ns() - last_time >= kCheckpointTime)) {
      co_await checkpoint(kind, target);
      last_bytes = at;
      last_time = home_->now_ns();
    }
    // Yields to guests: with requests coming in, no more than the guaranteed rate; without, as fast as it goes.
    const uint64_t busy = foreground_.load(std::memory_order_relaxed);
    if (busy != busy_seen) {
      busy_seen = busy;
      const uint64_t due = begun + length * kSecond / rate_min_;
      if (home_->now_ns() < due) co_await nap(&background_nap_, std::min(due - home_->now_ns(), kSecond));
    }
  }
  bool done = !stopped;
  if (kind == Sync::kRebuild) {
    if (!stopped) {
      Status s{};
      if (replacing) s = co_await complete_replacement(target);
      else s = co_await complete_rebuild(target);
      done = s.has_value();
    } else if (target->state.load() == MemberState::kRebuilding) {
      co_await checkpoint(kind, target);
    }
  } else if (kind == Sync::kResync) {
    if (!stopped) {
      Status s = co_await flush_members(IoContext{.io_class = IoClass::kRebuild});
      if (s) resync_.store(kInSync, std::memory_order_release);
      done = s.has_value();
    }
    co_await config_.lock();
    co_await write_superblocks();
    config_.unlock();
    co_await settle(Status{});
    kick_daemon();
  }
  if (done) log(LogLevel::kInfo, "volume", "volume {}: {} done", name(), kNames[static_cast<int>(kind)]);
  operation_.store(-1);
  co_return done;
}

Task<Status> RedundantArray::complete_rebuild(MemberPtr target) {
  Status s = co_await flush_members(IoContext{.io_class = IoClass::kRebuild});
  if (!s || target->state.load() != MemberState::kRebuilding) co_return s;
  co_await config_.lock();
  {
    std::lock_guard l(fault_lock_);
    if (target->state.load() == MemberState::kRebuilding) {
      target->recovered.store(kInSync, std::memory_order_release);
      target->state.store(MemberState::kActive, std::memory_order_release);
    }
  }
  s = co_await write_superblocks();
  config_.unlock();
  s = co_await settle(std::move(s));
  kick_daemon();
  co_return s;
}

// The new member has everything. While nothing is being written (all stripe locks): the new one's cache is emptied, and
// the two change places. Two rounds, as for a fault: the old one must look stale, or an md that asks each member for its
// own role would find the slot taken twice.
Task<Status> RedundantArray::complete_replacement(MemberPtr target) {
  co_await stripes_.lock_range(0, StripeLocks::kLocks - 1);
  Status s = co_await flush_members(IoContext{.io_class = IoClass::kRebuild});
  const size_t slot = static_cast<size_t>(target->slot);
  co_await config_.lock();
  MemberPtr old = table().slots[slot];
  bool swapped = false;
  if (s && old && target->state.load() == MemberState::kRebuilding && old->state.load() == MemberState::kActive) {
    auto next = std::make_unique<Table>(table());
    next->slots[slot] = target;
    next->replacements[slot] = nullptr;
    slot_names_[slot] = target->name;
    {
      std::lock_guard l(fault_lock_);
      target->recovered.store(kInSync, std::memory_order_release);
      target->state.store(MemberState::kActive, std::memory_order_release);
      publish_table(std::move(next));
      old->state.store(MemberState::kFaulty, std::memory_order_release);
    }
    {
      std::lock_guard l(list_lock_);
      faulty_.push_back(old);
    }
    s = co_await write_superblocks();
    if (s) s = co_await write_superblocks();
    swapped = true;
  }
  config_.unlock();
  stripes_.unlock_range(0, StripeLocks::kLocks - 1);
  if (swapped) log(LogLevel::kInfo, "volume", "volume {}: {} has taken the place of {}", name(), target->name, old->name);
  co_return co_await settle(std::move(s));
}

Task<void> RedundantArray::wait_idle() {
  while (background_running_.load() || scrub_wanted_.load()) {
    if (stopping_.load()) co_return;
    co_await Reactor::current().sleep_for(1'000'000);
  }
}

Task<Status> RedundantArray::close() {
  stopping_.store(true);
  if (Reactor::current_or_null() == home_) wake_naps();
  else home_->post(std::function<void()>([this] { wake_naps(); }));
  co_await running_.wait_idle();
  Status s{};
  if (!read_only_ && !array_failed()) {
    if (active_.load()) {
      if (bitmap_) {
        auto r = co_await bitmap_->clear_idle(
            [this]() -> Task<Status> { return flush_members(IoContext{.io_class = IoClass::kMetadata}); },
            [this] { return !degraded(); }, true);
        if (!r) s = fail(std::move(r).error());
      }
      if (s && !co_await try_mark_clean())
        s = fail(ErrorKind::kIo, fmt::format("volume {}: could not be marked clean", name()));
    }
  }
  Status below = co_await Volume::close();
  if (s && !below) s = std::move(below);
  co_return s;
}

// --- control ---

uint32_t RedundantArray::next_dev_number() const {
  std::vector<bool> used(common_.roles.size());
  uint32_t highest = 0;
  const auto mark = [&](const MemberPtr& m) {
    if (!m) return;
    used[m->sb.raw.dev_number] = true;
    highest = std::max(highest, m->sb.raw.dev_number);
  };
  for (const auto& m : table().slots) mark(m);
  for (const auto& m : table().replacements) mark(m);
  {
    std::lock_guard l(list_lock_);
    for (const auto& m : spares_) mark(m);
    for (const auto& m : faulty_) mark(m);
  }
  for (uint32_t i = 0; i < common_.roles.size(); ++i)
    if (common_.roles[i] == kRoleFaulty) highest = std::max(highest, i);
  if (highest + 1 < used.size()) return std::max<uint32_t>(highest + 1, common_.raw.raid_disks);
  for (uint32_t i = 0; i < used.size(); ++i)
    if (!used[i]) return i;
  return static_cast<uint32_t>(used.size());
}

Status RedundantArray::may_fail(std::string_view member) const {
  const MemberPtr m = find(member);
  if (!m) return fail(ErrorKind::kNotFound, fmt::format("volume {}: no member {}", name(), member));
  if (read_only_) return fail(ErrorKind::kReadOnly, fmt::format("volume {}: opened read-only", name()));
  if (!can_lose(*m))
    return fail(ErrorKind::kDegraded, fmt::format("volume {}: cannot do without member {}", name(), member));
  return {};
}

Task<Status> RedundantArray::fail_member(std::string_view member) {
  SPILLWAY_CO_CHECK(may_fail(member));
  MemberPtr m = find(member);
  if (m->state.load() == MemberState::kFaulty) co_return Status{};
  if (!note_fault(*m, Error(ErrorKind::kCanceled, "told to")))
    co_return fail(ErrorKind::kDegraded, fmt::format("volume {}: cannot do without member {}", name(), member));
  co_return co_await record_faults();
}

Task<Status> RedundantArray::remove_member(std::string_view member) {
  MemberPtr m = find(member);
  if (!m) co_return fail(ErrorKind::kNotFound, fmt::format("volume {}: no member {}", name(), member));
  const MemberState state = m->state.load();
  if (state == MemberState::kActive || state == MemberState::kRebuilding)
    co_return fail(ErrorKind::kBusy, fmt::format("volume {}: member {} is in use; fail it first", name(), member));
  co_await config_.lock();
  {
    std::lock_guard l(list_lock_);
    std::erase(spares_, m);
    std::erase(faulty_, m);
  }
  bool in_table = false;
  auto next = std::make_unique<Table>(table());
  for (auto& slot : next->slots)
    if (slot == m) {
      slot = nullptr;
      in_table = true;
    }
  if (in_table) publish_table(std::move(next));
  common_.roles[m->sb.raw.dev_number] = kRoleFaulty;
  Status s = co_await write_superblocks();
  config_.unlock();
  co_await grace();
  co_return co_await settle(std::move(s));
}

Task<Result<MemberPtr>> RedundantArray::admit(VolumePtr volume) {
  if (read_only_) co_return fail(ErrorKind::kReadOnly, fmt::format("volume {}: opened read-only", name()));
  for (const auto& m : all_members())
    if (m->volume == volume || m->name == volume->name())
      co_return fail(ErrorKind::kExists, fmt::format("volume {}: {} is a member already", name(), volume->name()));
  auto m = std::make_shared<Member>();
  m->volume = volume;
  m->name = volume->name();
  const uint32_t number = next_dev_number();
  // A superblock the kernel wrote has room for as many members as it had.
  if (number >= common_.roles.size() && number < kMaxDev) common_.roles.resize(number + 1, kRoleSpare);
  m->sb = common_;
  m->sb.raw.dev_number = number;
  const Uuid id = random_uuid();
  std::copy(id.begin(), id.end(), m->sb.raw.device_uuid);
  m->sb.raw.data_size = common_.raw.size;
  m->sb.raw.bblog_size = 0;
  m->sb.raw.bblog_offset = 0;
  m->sb.raw.devflags = 0;
  m->data_offset_ = m->sb.raw.data_offset * kSectorSize;
  Status s{};
  if (m->sb.raw.dev_number >= common_.roles.size())
    s = fail(ErrorKind::kNoSpace, fmt::format("volume {}: its superblock has no room for another member", name()));
  else if (volume->size() < m->data_offset_ + component_size_)
    s = fail(ErrorKind::kNoSpace, fmt::format("volume {}: {} has {} bytes, a member needs {}", name(), volume->name(),
                                              volume->size(), m->data_offset_ + component_size_));
  else if (volume->geometry().read_only)
    s = fail(ErrorKind::kReadOnly, fmt::format("volume {}: {} is read-only", name(), volume->name()));
  else if (volume->geometry().block_size > geometry().block_size)
    s = fail(ErrorKind::kInvalid, fmt::format("volume {}: {} has blocks of {}, the array's are {}", name(), volume->name(),
                                              volume->geometry().block_size, geometry().block_size));
  if (s) {
    auto old = co_await read_superblock(*volume);
    if (!old) s = fail(std::move(old).error());
    else if (old->has_value() && (*old)->uuid() != common_.uuid())
      s = fail(ErrorKind::kExists, fmt::format("volume {}: {} belongs to md array {}; wipe it first", name(),
                                               volume->name(), format_uuid((*old)->uuid())));
  }
  if (!s) co_return fail(std::move(s).error());
  co_return m;
}

// Its superblock first: a disk with nothing but a log or a bitmap on it would be neither blank nor a member after a power
// cut. What these hold of a spare is not believed.
Task<Status> RedundantArray::write_first(Member& m) {
  Status s = co_await write_superblocks();
  if (s && m.state.load() == MemberState::kFaulty) s = fail(ErrorKind::kIo, fmt::format("volume {}: {} cannot be written", name(), m.name));
  if (s && bitmap_) s = co_await bitmap_->write_all();
  if (s) s = co_await prepare_member(m);
  co_return s;
}

Task<Status> RedundantArray::add_member(VolumePtr volume) {
  co_await config_.lock();
  auto m = co_await admit(std::move(volume));
  Status s{};
  if (!m) {
    s = fail(std::move(m).error());
  } else {
    {
      std::lock_guard l(list_lock_);
      spares_.push_back(*m);
    }
    s = co_await write_first(**m);
  }
  config_.unlock();
  s = co_await settle(std::move(s));
  if (s) kick_background();
  co_return s;
}

Task<Status> RedundantArray::replace_member(std::string_view member, VolumePtr with) {
  MemberPtr old = find(member);
  if (!old) co_return fail(ErrorKind::kNotFound, fmt::format("volume {}: no member {}", name(), member));
  if (old->slot < 0 || table().slots[static_cast<size_t>(old->slot)] != old)
    co_return fail(ErrorKind::kInvalid, fmt::format("volume {}: member {} is in no slot: remove it", name(), member));
  // A member that is out of use has nothing to be copied from.
  if (old->state.load() != MemberState::kActive) co_return co_await add_member(std::move(with));
  co_await config_.lock();
  const size_t slot = static_cast<size_t>(old->slot);
  Status s{};
  if (table().replacements[slot]) {
    s = fail(ErrorKind::kBusy, fmt::format("volume {}: {} is being replaced already", name(), member));
  } else {
    auto m = co_await admit(std::move(with));
    if (!m) {
      s = fail(std::move(m).error());
    } else {
      (*m)->slot = old->slot;
      (*m)->recovered.store(0);
      (*m)->state.store(MemberState::kRebuilding, std::memory_order_release);
      auto next = std::make_unique<Table>(table());
      next->replacements[slot] = *m;
      publish_table(std::move(next));
      s = co_await write_first(**m);
    }
  }
  config_.unlock();
  if (s) co_await grace();  // from here on every write goes to both
  s = co_await settle(std::move(s));
  if (s) kick_background();
  co_return s;
}

Task<Status> RedundantArray::start_scrub(Scrub mode) {
  if (read_only_ && mode == Scrub::kRepair)
    co_return fail(ErrorKind::kReadOnly, fmt::format("volume {}: opened read-only", name()));
  if (operation_.load() >= 0 || scrub_wanted_.load())
    co_return fail(ErrorKind::kBusy, fmt::format("volume {}: {} is running", name(), status().operation));
  if (degraded()) co_return fail(ErrorKind::kDegraded, fmt::format("volume {}: degraded, nothing to compare with", name()));
  scrub_mode_ = mode;
  scrub_wanted_.store(true);
  kick_background();
  co_return Status{};
}

Task<Status> RedundantArray::stop_scrub() {
  scrub_stop_.store(true);
  scrub_wanted_.store(false);
  co_return Status{};
}

ArrayStatus RedundantArray::status() const {
  ArrayStatus s;
  s.name = name();
  s.layer = layer();
  s.uuid = format_uuid(common_.uuid());
  s.metadata = "md 1.2";
  s.consistency = consistency();
  s.layout = layout_text();
  s.size = size();
  s.chunk = common_.chunk_bytes();
  s.events = common_.raw.events;
  bool any_rebuilding = false;
  int missing = 0;
  const auto add = [&](const MemberPtr& m, int role, const char* state) {
    MemberStatus ms;
    ms.name = m->name;
    ms.state = state;
    ms.role = role;
    ms.read_errors = m->read_errors.load();
    ms.rebuilt_bytes = m->state.load() == MemberState::kRebuilding ? m->recovered.load() : 0;
    s.members.push_back(ms);
  };
  const auto& slots = table().slots;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int role = static_cast<int>(i);
    if (!slots[i]) {
      ++missing;
      s.members.push_back(MemberStatus{slot_names_[i].empty() ? "-" : slot_names_[i], "missing", role, 0, 0});
      continue;
    }
    switch (slots[i]->state.load()) {
      case MemberState::kActive: add(slots[i], role, "active"); break;
      case MemberState::kRebuilding:
        add(slots[i], role, "rebuilding");
        any_rebuilding = true;
        break;
      default:
        add(slots[i], role, "faulty");
        ++missing;
    }
  }
  bool has_spare = false;
  MemberPtr replacing;
  {
    std::lock_guard l(list_lock_);
    for (const auto& m : table().replacements)
      if (m) {
        add(m, -1, "replacing");
        replacing = m;
      }
    for (const auto& m : spares_) add(m, -1, "spare");
    for (const auto& m : faulty_) add(m, -1, "faulty");
    has_spare = !spares_.empty();
  }
  static constexpr const char* kNames[] = {"resync", "rebuild", "check", "repair"};
  const int op = operation_.load();
  s.operation = op < 0 ? "idle" : kNames[op];
  s.mismatch_blocks = mismatches_.load();
  if (op >= 0) {
    const uint64_t done = progress_.load();
    s.progress_percent = 100.0 * static_cast<double>(done) / static_cast<double>(component_size_);
    const uint64_t elapsed = now_ns_.load() > started_ns_.load() ? now_ns_.load() - started_ns_.load() : 0;
    if (elapsed > 0 && done > started_at_.load()) {
      s.speed_bytes_per_second = static_cast<uint64_t>(static_cast<double>(done - started_at_.load()) * 1e9 /
                                                       static_cast<double>(elapsed));
      if (s.speed_bytes_per_second > 0) s.eta_seconds = (component_size_ - done) / s.speed_bytes_per_second;
    }
  }
  const bool has_faulty = std::any_of(s.members.begin(), s.members.end(), [](auto& m) { return m.state == "faulty"; });
  if (array_failed()) s.state = "failed";
  else if (missing > 0 || any_rebuilding) s.state = "degraded";
  else if (read_only_) s.state = "read-only";
  else s.state = active_.load() ? "active" : "clean";
  if (s.state == "failed") s.advice = "too many members have failed: stop, copy the members, restore from backup";
  else if (any_rebuilding) s.advice = "wait for the rebuild; do not remove another member";
  else if (missing > 0 && read_only_) s.advice = "open it writable and add a disk: spillway volume add " + name() + " DISK";
  else if (missing == 0 && replacing)
    s.advice = fmt::format("wait: {} takes the place of {} when it is full", replacing->name,
                           slots[static_cast<size_t>(replacing->slot)]->name);
  else if (missing > 0 && has_spare) s.advice = "a spare takes over";
  else if (missing > 0) s.advice = fmt::format("no redundancy left: spillway volume add {} DISK", name());
  else if (has_faulty) s.advice = fmt::format("take the faulty member out: spillway volume remove {} MEMBER", name());
  else if (resync_position() != kInSync) s.advice = "wait for the resync";
  else if (s.mismatch_blocks > 0) s.advice = fmt::format("mismatches found: spillway volume scrub {} --repair", name());
  else s.advice = "nothing to do";
  return s;
}

std::string RedundantArray::to_text() const { return format_status(status()); }

}  // namespace spillway::md
