// Memory groups: references, charges, limits, removal.
//
// Charging is cgroup v2's page_counter with stocks. All counters of a group and of its ancestors move
// by the same amounts whoever charges or uncharges, also when the group is dead, so re-parenting
// charges needs no transfer that could be done twice: the parent's counter has contained them all the
// time, and giving back through the dead group or through its parent changes the parent alike.
#include "src/reclaim/internal.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace spillway::reclaim {

namespace {
constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr int kChargeRetries = 8;

MemoryGroup::State& st(const MemoryGroup& g) noexcept;
}  // namespace

MemoryGroup::State::~State() {
  if (stocks != nullptr) release(stocks, slots * sizeof(Stock));
  for (int n = 0; info != nullptr && n < nodes; ++n) destroy(info[n].load());
  if (info != nullptr) release(info, static_cast<std::size_t>(nodes) * sizeof(info[0]));
  if (overflow != nullptr) release(overflow, static_cast<std::size_t>(nodes) * sizeof(overflow[0]));
  delete owner;
}

bool GroupAccess::try_get(MemoryGroup& g) noexcept {
  auto& refs = g.state_->refs;
  std::uint64_t v = refs.load(std::memory_order_relaxed);
  while (v != 0) {
    if (refs.compare_exchange_weak(v, v + 1, std::memory_order_acquire, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

// The last reference gives back its share of the parent's protection sums (a charger that raced with
// remove_group may have left a stale one), the id, and then the parent's reference. Stocks are empty: nobody
// leaves any in a dead group.
void GroupAccess::put(MemoryGroup* g) noexcept {
  while (g != nullptr) {
    if (g->state_->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    MemoryGroup* parent = g->parent_;
    Registry::Impl& reg = RegistryAccess::impl(*g->registry_);
    reg.update_protected(*g);
    reg.clear_active(g->id_);
    {
      Lock lock(reg.groups_mutex);
      reg.group_ids[g->id_ / 64] &= ~mask(g->id_ % 64);
    }
    reg.group_count.fetch_sub(1, std::memory_order_relaxed);
    g->state_->retire();
    g = parent;
  }
}

GroupRef::GroupRef(const GroupRef& o) noexcept : p_(o.p_) {
  if (p_ != nullptr) GroupAccess::state(*p_).refs.fetch_add(1, kRelaxed);
}
GroupRef::~GroupRef() {
  if (p_ != nullptr) GroupAccess::put(p_);
}
GroupRef GroupRef::share(MemoryGroup& g) noexcept {
  GroupAccess::state(g).refs.fetch_add(1, kRelaxed);
  return GroupRef(&g);
}

namespace {
MemoryGroup::State& st(const MemoryGroup& g) noexcept { return GroupAccess::state(g); }
}  // namespace

MemoryGroup* GroupAccess::make(Registry& r, MemoryGroup* parent, std::string_view name) noexcept {
  Registry::Impl& reg = RegistryAccess::impl(r);
  auto* state = spillway::reclaim::make<MemoryGroup::State>();
  if (state == nullptr) return nullptr;
  const auto nodes = static_cast<std::size_t>(reg.opt.nodes);
  state->slots = reg.opt.charge_slots;
  state->nodes = reg.opt.nodes;
  state->stocks = static_cast<Stock*>(allocate(state->slots * sizeof(Stock)));
  state->info = static_cast<RcuPtr<Info>*>(allocate(nodes * sizeof(RcuPtr<Info>)));
  state->overflow = static_cast<Atomic<std::uint32_t>*>(allocate(nodes * sizeof(state->overflow[0])));
  try {
    state->owner = new MemoryGroup();
    state->owner->name_ = std::string(name);
  } catch (const std::bad_alloc&) {
    destroy(state);
    return nullptr;
  }
  if (state->stocks == nullptr || state->info == nullptr || state->overflow == nullptr) {
    destroy(state);
    return nullptr;
  }
  for (unsigned i = 0; i < state->slots; ++i) new (&state->stocks[i]) Stock();
  for (std::size_t i = 0; i < nodes; ++i) {
    new (&state->info[i]) RcuPtr<Info>();
    new (&state->overflow[i]) Atomic<std::uint32_t>(0);
  }
  MemoryGroup* g = state->owner;
  g->state_ = state;
  g->parent_ = parent;
  g->registry_ = &r;
  state->depth = parent != nullptr ? st(*parent).depth + 1 : 0;
  return g;
}
void GroupAccess::free_unpublished(MemoryGroup* g) noexcept { destroy(g->state_); }

// ---------------------------------------------------------------- tree

GroupRef Registry::Impl::get_group(std::uint32_t id) noexcept {
  if (id >= opt.max_groups) return {};
  RcuGuard guard;
  MemoryGroup* g = group_table[id].load();
  return g != nullptr && GroupAccess::try_get(*g) ? GroupAccess::adopt(g) : GroupRef();
}

GroupRef Registry::root() noexcept { return GroupRef::share(*impl_->root); }
GroupRef Registry::find_group(std::uint32_t id) noexcept { return impl_->get_group(id); }

GroupRef Registry::find_group(std::string_view path) noexcept {
  GroupRef at = root();
  while (!path.empty()) {
    const std::size_t slash = path.find('/');
    const std::string_view part = path.substr(0, slash);
    path = slash == std::string_view::npos ? std::string_view() : path.substr(slash + 1);
    if (part.empty()) continue;
    GroupRef next;
    const std::uint32_t limit = impl_->group_limit.load(std::memory_order_acquire);
    for (std::uint32_t i = 0; i < limit && !next; ++i) {
      RcuGuard guard;
      MemoryGroup* g = impl_->group_table[i].load();
      if (g != nullptr && g->parent() == at.get() && g->name() == part && GroupAccess::try_get(*g)) {
        next = GroupAccess::adopt(g);
      }
    }
    if (!next) return {};
    at = std::move(next);
  }
  return at;
}

std::vector<GroupRef> Registry::groups() {
  std::vector<GroupRef> out;
  const std::uint32_t limit = impl_->group_limit.load(std::memory_order_acquire);
  for (std::uint32_t i = 0; i < limit; ++i) {
    if (GroupRef g = impl_->get_group(i)) out.push_back(std::move(g));
  }
  return out;
}

GroupRef Registry::create_group(std::string_view name, MemoryGroup* parent, Errc* why) {
  const auto fail = [&](Errc e) {
    if (why != nullptr) *why = e;
    return GroupRef();
  };
  if (why != nullptr) *why = Errc::kOk;
  if (name.empty() || name.size() > 127 || name.find('/') != name.npos) return fail(Errc::kInvalid);
  Impl& reg = *impl_;
  MemoryGroup* up = parent != nullptr ? parent : reg.root;
  if (st(*up).depth + 1 >= kMaxGroupDepth) return fail(Errc::kLimit);
  MemoryGroup* g = GroupAccess::make(*this, up, name);
  if (g == nullptr) return fail(Errc::kNoMemory);
  Errc e = Errc::kOk;
  {
    Lock lock(reg.groups_mutex);
    const std::uint32_t limit = reg.group_limit.load(std::memory_order_relaxed);
    if (st(*up).dead.load() != 0) e = Errc::kState;
    if (e == Errc::kOk && !reg.group_names.try_emplace_name(up->serial(), name)) e = Errc::kInvalid;
    std::uint32_t id = 0;
    if (e == Errc::kOk) {
      while (id < reg.group_ids.size() && ~reg.group_ids[id] == 0) ++id;
      if (id == reg.group_ids.size()) {
        e = Errc::kLimit;
        reg.group_names.erase_name(up->serial(), name);
      }
    }
    if (e == Errc::kOk) {
      id = id * 64 + static_cast<std::uint32_t>(std::countr_one(reg.group_ids[id]));
      reg.group_ids[id / 64] |= mask(id % 64);
      GroupAccess::set_id(*g, id, reg.next_serial++);
      st(*g).listed = true;
      st(*up).children.fetch_add(1);
      st(*up).refs.fetch_add(1, kRelaxed);       // the child's reference
      st(*g).refs.store(2, kRelaxed);            // the table's and the caller's
      reg.group_table[id].store(g);              // release
      if (id >= limit) reg.group_limit.store(id + 1, std::memory_order_release);
    }
  }
  if (e != Errc::kOk) {
    GroupAccess::free_unpublished(g);
    return fail(e);
  }
  reg.group_count.fetch_add(1, kRelaxed);
  return GroupAccess::adopt(g);
}

// Removal, in the one order (weakness 3: drain, mark dead, erase is the order of each list; for the
// group as a whole "no new adds here" comes first):
//   1 dead = 1 (seq_cst)          from here adders that look go to the parent; chargers leave no stock
//   2 observers move objects      under the caches' own list locks; lists marked dead there
//   3 move_up                     bits and deferred work, cell by cell, exactly once (bits.cc)
//   4 stocks are given back
//   5 the slot in the table       only now walks stop finding it: until 3 is done, a pass may still
//                                 come here and work on what is left, which is right
//   6 the table's reference       memory and id go with the last reference, after a grace period
Errc Registry::remove_group(MemoryGroup& group) {
  Impl& reg = *impl_;
  if (group.parent() == nullptr || &group.registry() != this) return Errc::kInvalid;
  auto& s = st(group);
  {
    Lock lock(reg.groups_mutex);
    if (!s.listed) return Errc::kState;
    if (s.children.load() != 0) return Errc::kBusy;
    s.listed = false;
    s.dead.store(1);  // under the mutex: create_group below this group fails from here
  }
  GroupRef parent = group.parent()->live();
  for (std::size_t i = 0;; ++i) {
    GroupObserver* o = nullptr;
    {
      Lock lock(reg.observers_mutex);
      if (i >= reg.observers.size()) break;
      o = reg.observers[i].o;
      if (o == nullptr) continue;
      ++reg.observers[i].busy;
    }
    o->group_offline(group, *parent);
    {
      Lock lock(reg.observers_mutex);
      --reg.observers[i].busy;
    }
    reg.observers_changed.fetch_add(1);
    futex_wake(reg.observers_changed, 1 << 30);
  }
  reg.move_up(group, *parent);
  group.usage_exact();
  group.set_weight(100);
  s.min.store(0);
  s.low.store(0);
  reg.update_protected(group);
  reg.group_table[group.id()].store(nullptr);
  {
    Lock lock(reg.groups_mutex);
    reg.group_names.erase_name(group.parent()->serial(), group.name());
    st(*group.parent()).children.fetch_sub(1);
  }
  GroupAccess::put(&group);
  return Errc::kOk;
}

void Registry::add_observer(GroupObserver& o) {
  Lock lock(impl_->observers_mutex);
  for (auto& slot : impl_->observers) {
    if (slot.o == nullptr && slot.busy == 0) {
      slot.o = &o;
      return;
    }
  }
  impl_->observers.push_back({&o, 0});
}

void Registry::remove_observer(GroupObserver& o) {
  for (;;) {
    const std::uint32_t seen = impl_->observers_changed.load();
    {
      Lock lock(impl_->observers_mutex);
      bool busy = false;
      for (auto& slot : impl_->observers) {
        if (slot.o != &o) continue;
        if (slot.busy == 0) slot.o = nullptr;
        else busy = true;
      }
      if (!busy) return;
    }
    futex_wait(impl_->observers_changed, seen);
  }
}

std::string MemoryGroup::path() const {
  if (parent_ == nullptr) return "/";
  std::string up = parent_->path();
  return (up == "/" ? up : up + "/") + name_;
}
bool MemoryGroup::dead() const noexcept { return state_->dead.load() != 0; }
GroupRef MemoryGroup::live() noexcept {
  MemoryGroup* g = this;
  while (g->dead() && g->parent_ != nullptr) g = g->parent_;
  return GroupRef::share(*g);
}
bool MemoryGroup::is_descendant_of(const MemoryGroup& a) const noexcept {
  for (const MemoryGroup* g = this; g != nullptr; g = g->parent_) {
    if (g == &a) return true;
  }
  return false;
}
MemoryGroup& MemoryGroup::top_level() noexcept {
  MemoryGroup* g = this;
  while (g->parent_ != nullptr && g->parent_->parent_ != nullptr) g = g->parent_;
  return *g;
}

// ---------------------------------------------------------------- charging

std::uint64_t Registry::Impl::node_usage_sum(int node) const noexcept {
  std::int64_t sum = 0;
  for (unsigned i = 0; i < usage_slots; ++i) {
    sum += node_usage[i * static_cast<unsigned>(opt.nodes) + static_cast<unsigned>(node)].bytes.load(
        kRelaxed);
  }
  return sum > 0 ? static_cast<std::uint64_t>(sum) : 0;
}
void Registry::Impl::account_node(int node, std::int64_t delta) noexcept {
  const int n = node >= 0 && node < opt.nodes ? node : 0;
  const unsigned slot = thread_slot() % usage_slots;
  node_usage[slot * static_cast<unsigned>(opt.nodes) + static_cast<unsigned>(n)].bytes.fetch_add(
      delta, kRelaxed);
}
std::uint64_t Registry::node_usage(int node) const noexcept { return impl_->node_usage_sum(node); }

void Registry::Impl::check_watermark(int node) noexcept {
  const int n = node >= 0 && node < opt.nodes ? node : 0;
  const std::uint64_t cap = nodes[n].capacity.load(kRelaxed);
  if (cap == kUnlimited || !background_on.load(kRelaxed)) return;
  const std::uint64_t used = node_usage_sum(n);
  if (used <= cap && cap - used >= nodes[n].low.load(kRelaxed)) return;
  self->request_background(n, 0, Reason::kBackground);
}

namespace {

// min(usage, x) of a group and the sums over siblings, as cgroup v2 keeps them: exact when quiet.
void update_one(Atomic<std::uint64_t>& mine, Atomic<std::uint64_t>* sum, std::uint64_t now) noexcept {
  const std::uint64_t before = mine.exchange(now, kRelaxed);
  if (sum != nullptr && before != now) sum->fetch_add(now - before, kRelaxed);
}

bool add_below(Atomic<std::uint64_t>& usage, std::uint64_t n, std::uint64_t max) noexcept {
  std::uint64_t v = usage.load(kRelaxed);
  do {
    if (n > max || v > max - n) return false;
  } while (!usage.compare_exchange_weak(v, v + n, std::memory_order_acq_rel, kRelaxed));
  return true;
}

void sub_all(Registry::Impl& reg, MemoryGroup* from, MemoryGroup* until, std::uint64_t n) noexcept;

}  // namespace

void Registry::Impl::update_protected(MemoryGroup& g) noexcept {
  auto& s = st(g);
  const std::uint64_t min = s.min.load(kRelaxed), low = s.low.load(kRelaxed);
  if ((min | low | s.min_usage.load(kRelaxed) | s.low_usage.load(kRelaxed)) == 0) return;
  const std::uint64_t usage = s.usage.load(kRelaxed);
  MemoryGroup* up = g.parent();
  update_one(s.min_usage, up != nullptr ? &st(*up).children_min_usage : nullptr, std::min(usage, min));
  update_one(s.low_usage, up != nullptr ? &st(*up).children_low_usage : nullptr, std::min(usage, low));
}

namespace {

void sub_all(Registry::Impl& reg, MemoryGroup* from, MemoryGroup* until, std::uint64_t n) noexcept {
  for (MemoryGroup* g = from; g != until; g = g->parent()) {
    st(*g).usage.fetch_sub(n, std::memory_order_acq_rel);
    reg.update_protected(*g);
  }
}

/// Null: charged everywhere. Otherwise the group whose max said no; nothing is charged then.
MemoryGroup* try_add(Registry::Impl& reg, MemoryGroup& from, std::uint64_t n) noexcept {
  for (MemoryGroup* g = &from; g != nullptr; g = g->parent()) {
    if (!add_below(st(*g).usage, n, st(*g).max.load(kRelaxed))) {
      sub_all(reg, &from, g, n);
      return g;
    }
    reg.update_protected(*g);
  }
  return nullptr;
}

bool take_stock(Stock& s, std::uint64_t n) noexcept {
  std::uint64_t v = s.bytes.load(kRelaxed);
  while (v >= n) {
    if (s.bytes.compare_exchange_weak(v, v - n, std::memory_order_acq_rel, kRelaxed)) return true;
  }
  return false;
}

void drain(Registry::Impl& reg, MemoryGroup& g) noexcept {
  auto& s = st(g);
  std::uint64_t sum = 0;
  for (unsigned i = 0; i < s.slots; ++i) {
    if (s.stocks[i].bytes.load() != 0) sum += s.stocks[i].bytes.exchange(0);  // seq_cst: put_stock
  }
  if (sum != 0) sub_all(reg, &g, nullptr, sum);
}

// Puts what is charged already into the stock; keeps at most a batch there, nothing in a dead group.
// Partner of the look at `dead`: remove_group stores it (seq_cst), then drains.
void put_stock(Registry::Impl& reg, MemoryGroup& g, std::uint64_t n) noexcept {
  auto& s = st(g);
  Stock& stock = s.stocks[thread_slot() % s.slots];
  const std::uint64_t batch = reg.opt.charge_batch_bytes;
  const std::uint64_t have = stock.bytes.fetch_add(n) + n;
  if (have > batch || s.dead.load() != 0) {
    const std::uint64_t back = stock.bytes.exchange(0);
    if (back != 0) sub_all(reg, &g, nullptr, back);
  }
}

void drain_subtree(Registry& r, MemoryGroup& top) noexcept {
  Registry::Impl& reg = RegistryAccess::impl(r);
  const std::uint32_t limit = reg.group_limit.load(std::memory_order_acquire);
  if (st(top).children.load(kRelaxed) == 0) {
    drain(reg, top);
    return;
  }
  for (std::uint32_t i = 0; i < limit; ++i) {
    GroupRef g = reg.get_group(i);
    if (g && g->is_descendant_of(top)) drain(reg, *g);
  }
}

// Over `high` somewhere: wake whoever watches, and take part of the excess back in this thread.
void over_high(Registry& r, MemoryGroup& from, std::uint64_t bytes, const ChargeOptions& o) noexcept {
  for (MemoryGroup* g = &from; g != nullptr; g = g->parent()) {
    auto& s = st(*g);
    const std::uint64_t high = s.high.load(kRelaxed), usage = s.usage.load(kRelaxed);
    if (usage <= high) continue;
    s.high_events.fetch_add(1, kRelaxed);
    {
      RcuGuard guard;  // partner: ~GroupLimitSource closes the descriptor after a grace period
      const int fd = s.high_fd.load();
      if (fd >= 0) {
        const std::uint64_t one = 1;
        [[maybe_unused]] const ssize_t n = ::write(fd, &one, sizeof one);
      }
    }
    if (!o.may_block) continue;
    ReclaimRequest req;
    req.group = g;
    req.reason = Reason::kBackground;
    req.target_bytes = std::min(usage - high, std::max<std::uint64_t>(2 * bytes, 1u << 20));
    req.deadline = o.deadline;
    r.reclaim(req);
  }
}

}  // namespace

bool MemoryGroup::try_charge(std::uint64_t bytes, const ChargeOptions& o) {
  if (bytes == 0) return true;
  if (t_frame != nullptr) {  // memory that serves freeing memory
    charge(bytes, o.node);
    return true;
  }
  Registry::Impl& reg = RegistryAccess::impl(*registry_);
  auto& s = *state_;
  ReclaimRequest req;
  req.node = kAnyNode;
  req.reason = Reason::kDirect;
  req.may_block = o.may_block;
  req.deadline = o.deadline;
  if (reg.opt.fake_low_memory && reg.opt.fake_low_memory()) {
    req.group = this;
    req.target_bytes = bytes;
    registry_->reclaim(req);
  }
  if (s.dead.load(kRelaxed) == 0 && take_stock(s.stocks[thread_slot() % s.slots], bytes)) {
    reg.account_node(o.node, static_cast<std::int64_t>(bytes));
    return true;
  }
  const std::uint64_t batch = std::max(bytes, reg.opt.charge_batch_bytes);
  bool drained = false;
  for (int attempt = 0; attempt < kChargeRetries;) {
    std::uint64_t got = batch;
    MemoryGroup* limiter = try_add(reg, *this, batch);
    if (limiter != nullptr && batch != bytes) {
      got = bytes;
      limiter = try_add(reg, *this, bytes);
    }
    if (limiter == nullptr) {
      if (got > bytes) put_stock(reg, *this, got - bytes);
      reg.account_node(o.node, static_cast<std::int64_t>(bytes));
      reg.check_watermark(o.node);
      over_high(*registry_, *this, bytes, o);
      return true;
    }
    if (!drained) {
      drained = true;
      drain_subtree(*registry_, *limiter);
      continue;
    }
    drained = false;
    ++attempt;
    auto& ls = *limiter->state_;
    if (bytes > ls.max.load(kRelaxed)) break;
    ls.direct_reclaims.fetch_add(1, kRelaxed);
    const std::uint64_t usage = ls.usage.load(kRelaxed), max = ls.max.load(kRelaxed);
    req.group = limiter;
    req.target_bytes = std::max(bytes, usage + bytes > max ? usage + bytes - max : 0);
    const ReclaimResult res = registry_->reclaim(req);
    if (res.freed_bytes == 0 && ls.usage.load(kRelaxed) + bytes > max && attempt > 1) break;
    if (res.status == ReclaimStatus::kDeadline) attempt = kChargeRetries - 1;
  }
  // One last look: others may have uncharged meanwhile.
  drain_subtree(*registry_, *this);
  MemoryGroup* limiter = try_add(reg, *this, bytes);
  if (limiter == nullptr) {
    reg.account_node(o.node, static_cast<std::int64_t>(bytes));
    return true;
  }
  limiter->state_->charge_failures.fetch_add(1, kRelaxed);
  return false;
}

void MemoryGroup::charge(std::uint64_t bytes, int node) noexcept {
  if (bytes == 0) return;
  Registry::Impl& reg = RegistryAccess::impl(*registry_);
  reg.account_node(node, static_cast<std::int64_t>(bytes));
  if (state_->dead.load(kRelaxed) == 0 &&
      take_stock(state_->stocks[thread_slot() % state_->slots], bytes)) {
    return;
  }
  for (MemoryGroup* g = this; g != nullptr; g = g->parent_) {
    g->state_->usage.fetch_add(bytes, std::memory_order_acq_rel);
    reg.update_protected(*g);
  }
  reg.check_watermark(node);
}

void MemoryGroup::uncharge(std::uint64_t bytes, int node) noexcept {
  if (bytes == 0) return;
  Registry::Impl& reg = RegistryAccess::impl(*registry_);
  reg.account_node(node, -static_cast<std::int64_t>(bytes));
  if (bytes > reg.opt.charge_batch_bytes || dead()) {
    sub_all(reg, this, nullptr, bytes);
  } else {
    put_stock(reg, *this, bytes);
  }
}

std::uint64_t MemoryGroup::usage() const noexcept { return state_->usage.load(kRelaxed); }
std::uint64_t MemoryGroup::usage_exact() noexcept {
  drain_subtree(*registry_, *this);
  return usage();
}

GroupStats MemoryGroup::stats() const noexcept {
  GroupStats o;
  o.usage = usage();
  o.charge_failures = state_->charge_failures.load(kRelaxed);
  o.direct_reclaims = state_->direct_reclaims.load(kRelaxed);
  o.high_events = state_->high_events.load(kRelaxed);
  o.low_events = state_->low_events.load(kRelaxed);
  o.reclaimed_bytes = state_->reclaimed_bytes.load(kRelaxed);
  return o;
}

// ---------------------------------------------------------------- limits

GroupLimits MemoryGroup::limits() const noexcept {
  GroupLimits l;
  l.min = state_->min.load(kRelaxed);
  l.low = state_->low.load(kRelaxed);
  l.high = state_->high.load(kRelaxed);
  l.max = state_->max.load(kRelaxed);
  l.weight = state_->weight.load(kRelaxed);
  return l;
}

void MemoryGroup::set_limits(const GroupLimits& l) {
  set_min(l.min);
  set_low(l.low);
  set_weight(l.weight);
  set_high(l.high);
  set_max(l.max);
}
void MemoryGroup::set_min(std::uint64_t bytes) {
  state_->min.store(bytes);
  RegistryAccess::impl(*registry_).update_protected(*this);
}
void MemoryGroup::set_low(std::uint64_t bytes) {
  state_->low.store(bytes);
  RegistryAccess::impl(*registry_).update_protected(*this);
}
void MemoryGroup::set_weight(std::uint32_t weight) {
  state_->weight.store(std::clamp<std::uint32_t>(weight, 1, 10000));
}

namespace {
void reclaim_to(Registry& r, MemoryGroup& g, std::uint64_t limit) {
  const std::uint64_t usage = g.usage_exact();
  if (usage <= limit) return;
  ReclaimRequest req;
  req.group = &g;
  req.reason = Reason::kDirect;
  req.target_bytes = usage - limit;
  r.reclaim(req);
}
}  // namespace

void MemoryGroup::set_high(std::uint64_t bytes) {
  state_->high.store(bytes);
  reclaim_to(*registry_, *this, bytes);
}
void MemoryGroup::set_max(std::uint64_t bytes) {
  state_->max.store(bytes);
  reclaim_to(*registry_, *this, bytes);
}

namespace {
std::uint64_t share_of(std::uint64_t mine, std::uint64_t siblings, std::uint64_t parent) noexcept {
  if (siblings <= parent || siblings == 0) return mine;
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(mine) * parent / siblings);
}
}  // namespace

MemoryGroup::Protection MemoryGroup::effective_protection(const MemoryGroup& target) const noexcept {
  // From the target down to this group; the target itself protects nothing from itself.
  std::array<const MemoryGroup*, kMaxGroupDepth + 1> way{};
  int n = 0;
  const MemoryGroup* g = this;
  for (; g != nullptr && g != &target && n <= kMaxGroupDepth; g = g->parent_) way[n++] = g;
  Protection up{kUnlimited, kUnlimited};
  if (n == 0) return {};
  for (int i = n - 1; i >= 0; --i) {
    const auto& s = *way[i]->state_;
    const std::uint64_t usage = s.usage.load(kRelaxed);
    Protection mine{std::min(usage, s.min.load(kRelaxed)), std::min(usage, s.low.load(kRelaxed))};
    if (way[i]->parent_ != nullptr) {
      const auto& p = *way[i]->parent_->state_;
      mine.min = share_of(mine.min, p.children_min_usage.load(kRelaxed), up.min);
      mine.low = share_of(mine.low, p.children_low_usage.load(kRelaxed), up.low);
    }
    up = mine;
  }
  return up;
}

// ---------------------------------------------------------------- entitlements

void entitlements(std::uint64_t capacity, const Share* in, std::uint64_t* out, std::size_t n) {
  // First the floors: min(min, demand), in proportion when they do not fit.
  unsigned __int128 floors = 0;
  for (std::size_t i = 0; i < n; ++i) floors += std::min({in[i].limits.min, in[i].demand, in[i].limits.max});
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t floor = std::min({in[i].limits.min, in[i].demand, in[i].limits.max});
    out[i] = floors <= capacity
                 ? floor
                 : static_cast<std::uint64_t>(static_cast<unsigned __int128>(floor) * capacity / floors);
  }
  if (floors > capacity) return;
  // Then by weight: the level x (1/65536 bytes per unit of weight) where the sum of
  // clamp(weight * x, floor, ceiling) is the capacity. The sum grows with x, so bisect.
  using Wide = unsigned __int128;
  const auto at = [&](std::size_t i, Wide x) {
    const std::uint64_t ceiling = std::min(in[i].demand, in[i].limits.max);
    const std::uint64_t floor = std::min(in[i].limits.min, ceiling);
    const Wide fair = (x * in[i].limits.weight) >> 16;
    return fair >= ceiling ? ceiling : std::max(floor, static_cast<std::uint64_t>(fair));
  };
  const auto fits = [&](Wide x) {
    Wide sum = 0;
    for (std::size_t i = 0; i < n; ++i) sum += at(i, x);
    return sum <= capacity;
  };
  Wide lo = 0, hi = Wide{1} << 81;  // above any ceiling at weight 1
  while (hi - lo > 1) {
    const Wide mid = lo + (hi - lo) / 2;
    (fits(mid) ? lo : hi) = mid;
  }
  for (std::size_t i = 0; i < n; ++i) out[i] = at(i, lo);
}

}  // namespace spillway::reclaim
