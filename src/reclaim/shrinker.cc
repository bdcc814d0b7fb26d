// Shrinkers: ids, references, the three verbs.
//
// The life of a shrinker, and why each step is needed and in this order (S2, S3, S8):
//
//   alloc     1 a block: recycled or new               its counts are 0, so nothing can hold it
//             2 id and slot in the radix tree          lookups find it, try_get says no: count is 0
//   register  3 every field is final
//             4 refs[shard] = 1, release               try_get's acquire pairs with it: whoever gets
//                                                      a reference sees a whole shrinker (weakness 8)
//   free      5 put the initial reference of each shard  from its zero on no try_get on it succeeds
//             6 wait for the completion                the last put of the last shard signals it; no
//                                                      callback runs now and none will start (S3)
//             7 slot = null, id back to the pool       only now: a walker that still holds a reference
//                                                      in 5 or 6 must be able to tell "dying" (slot
//                                                      there, keep the bit) from "gone" (slot empty)
//             8 callbacks and name are destroyed       only references led to them, and there are none
//             9 the block goes to the next alloc,      a lookup under RCU may have the pointer from before 7
//               or to the allocator after a grace      and is about to read a count; and the signaller of
//               period                                 6 touches the block until it leaves RCU
//
//   lookup   L1 RCU; slot -> block                     the block can not go back to the allocator
//            L2 try_get: increment unless zero         only a registered shrinker is got, with acquire
//            L3 block.id == id, or put and "not there" the block may serve somebody else since L1
//            L4 leave RCU                              from here the reference alone keeps it
//
// Recycling without a grace period is what Linux calls SLAB_TYPESAFE_BY_RCU: between L1 and L2 a block may be
// freed and registered again, so what L2 gets is *a* registered shrinker, whole by 4, and L3 asks whether
// it is the one that was looked for. If it has the same id, it is: an id names one shrinker at a time. The
// atomics of a block are therefore never constructed again; between two owners all counts are 0.
//
// What protects what: the reference count keeps callbacks and fields, the completion tells free that the
// last reference is gone, the RCU head keeps the block's memory for those who only look.
//
// A half-built or dying shrinker has count 0 and so is not there. There is no other flag on the read
// side; `registered` belongs to the owner and tells `free` whether 5 and 6 are due.
// Models: tests/reclaim/spin/free_walk.pml, id_reuse.pml.
#include <cstdio>
#include <cstring>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

thread_local CallFrame* t_frame = nullptr;

static_assert(sizeof(ShrinkerImpl) % 64 == 0 && sizeof(RareStats) % 64 == 0 && sizeof(Shard) % 64 == 0);

// ---------------------------------------------------------------- memory

ShrinkerImpl::ShrinkerImpl(Registry::Impl* registry, unsigned shards_wanted) noexcept
    : reg(registry), nshards(shards_wanted), name(&first_name) {
  reset_stats();
  for (unsigned i = 0; i < nshards; ++i) new (&refs(i)) RefShard();
}
ShrinkerImpl::~ShrinkerImpl() = default;

void ShrinkerImpl::reset_stats() noexcept {
  new (&rare()) RareStats();
  for (unsigned i = 0; i < nshards; ++i) new (&stats(i)) Shard();
}

void ReleaseShrinker::operator()(ShrinkerImpl* s) const noexcept {
  const std::size_t size = ShrinkerImpl::block_size(s->nshards);
  s->~ShrinkerImpl();
  release(s, size);
}

ShrinkerImpl* Registry::Impl::make_shrinker() noexcept {
  {
    Lock lock(blocks_mutex);
    if (ShrinkerImpl* s = pool) {
      pool = std::exchange(s->next_free, nullptr);
      --pool_size;
      return s;
    }
  }
  void* block = allocate(ShrinkerImpl::block_size(opt.ref_shards));
  return block != nullptr ? new (block) ShrinkerImpl(this, opt.ref_shards) : nullptr;
}

// Steps 8 and 9. What the callbacks captured goes now, in the caller's thread.
void Registry::Impl::recycle(ShrinkerImpl& s) noexcept {
  s.count = nullptr;
  s.scan = nullptr;
  NameText* name = s.name.load();
  if (name != &s.first_name) {
    s.name.store(&s.first_name);
    destroy(name);
  }
  if (s.visited.load(std::memory_order_relaxed)) {
    s.reset_stats();
    s.visited.store(false, std::memory_order_relaxed);
    s.strikes.store(0, std::memory_order_relaxed);
    s.quarantines.store(0, std::memory_order_relaxed);
    s.quarantined_until_ns.store(0, std::memory_order_relaxed);
  }
  s.seeks = kSeeksDefault;
  s.batch = kBatchDefault;
  s.private_data = nullptr;
  {
    Lock lock(blocks_mutex);
    if (pool_size < pool_max) {
      s.next_free = std::exchange(pool, &s);
      ++pool_size;
      return;
    }
  }
  s.retire(ShrinkerImpl::block_size(s.nshards));
}

void Registry::Impl::free_blocks() noexcept {
  while (pool != nullptr) ReleaseShrinker()(std::exchange(pool, pool->next_free));
}

// ---------------------------------------------------------------- references

// L2. Partner of the release store in register_ (acquire on success).
bool ShrinkerImpl::try_get(unsigned shard) noexcept {
  auto& n = refs(shard);
  std::uint64_t v = n.load(std::memory_order_relaxed);
  while (v != 0) {
    if (n.compare_exchange_weak(v, v + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
  }
  return false;
}

// Release: what the callback did happens before what free's caller does next. The completion is
// signalled under RCU: free may return and give the block away between `done` and the wake. (Should the
// block serve somebody else by then, his waiter looks at his word and sleeps on.) An orphan has no owner
// who could give the block away, so its free is finished outside of RCU: destructors may wait for RCU.
void ShrinkerImpl::put(unsigned shard) noexcept {
  if (refs(shard).fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  std::uint32_t before;
  {
    RcuGuard keep;
    if (live_shards.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    before = done.exchange(kDone, std::memory_order_acq_rel);
    if (before == kWaiting) futex_wake(done, 1);
  }
  if (before == kOrphan) reg->finish_free(*this);
}

// Until the last put below has begun, the last shard's initial reference keeps the block.
void ShrinkerImpl::drop_initial() noexcept {
  const unsigned n = nshards;
  for (unsigned i = 0; i < n; ++i) put(i);
}

void ShrinkerImpl::wait_done() noexcept {
  std::uint32_t seen = done.load(std::memory_order_acquire);
  if (seen == kDone) return;
  done.compare_exchange_strong(seen, kWaiting, std::memory_order_acq_rel, std::memory_order_acquire);
  while (done.load(std::memory_order_acquire) != kDone) futex_wait(done, kWaiting);
}

std::string ShrinkerImpl::label() const {
  RcuGuard g;
  const NameText* n = name.load();
  return std::string(n != nullptr ? n->text : "?") + "-" + std::to_string(id);
}

// ---------------------------------------------------------------- ids

IdTable::~IdTable() {
  for (auto& t : top_) {
    Mid* m = t.load();
    if (m == nullptr) continue;
    for (auto& l : m->leaf) destroy(l.load());
    destroy(m);
  }
}

ShrinkerImpl* IdTable::lookup(std::uint32_t id) const noexcept {
  if (id >= kMaxShrinkers) return nullptr;  // bounds before any use (weakness 5)
  Mid* m = top_[block_of(id)].load();
  if (m == nullptr) return nullptr;
  Leaf* l = m->leaf[unit_of(id)].load();
  return l != nullptr ? l->slot[bit_of(id)].load() : nullptr;
}

Errc IdTable::insert(ShrinkerImpl& s) noexcept {
  Lock lock(mutex_);
  if (~full_top_ == 0) return Errc::kLimit;
  const auto top = static_cast<std::uint32_t>(std::countr_one(full_top_));
  const auto mid = static_cast<std::uint32_t>(std::countr_one(full_[top]));
  const auto bit = static_cast<std::uint32_t>(std::countr_one(used_[top * kFan + mid]));
  Mid* m = top_[top].load();
  if (m == nullptr) {
    if ((m = make<Mid>()) == nullptr) return Errc::kNoMemory;
    top_[top].store(m);
  }
  Leaf* l = m->leaf[mid].load();
  if (l == nullptr) {
    if ((l = make<Leaf>()) == nullptr) return Errc::kNoMemory;
    m->leaf[mid].store(l);
  }
  std::uint64_t& used = used_[top * kFan + mid];
  used |= mask(bit);
  if (~used == 0) {
    full_[top] |= mask(mid);
    if (~full_[top] == 0) full_top_ |= mask(top);
  }
  s.id = (top * kFan + mid) * kFan + bit;
  s.generation = l->generation[bit];
  l->slot[bit].store(&s);  // release: a lookup sees a block with zero counts
  if (s.id >= limit_.load(std::memory_order_relaxed)) limit_.store(s.id + 1, std::memory_order_release);
  size_.fetch_add(1, std::memory_order_relaxed);
  return Errc::kOk;
}

void IdTable::erase(ShrinkerImpl& s) noexcept {
  Lock lock(mutex_);
  const std::uint32_t top = block_of(s.id), mid = unit_of(s.id), bit = bit_of(s.id);
  Leaf* l = top_[top].load()->leaf[mid].load();
  l->slot[bit].store(nullptr);
  l->generation[bit] = (l->generation[bit] + 1) & kGenerationMask;
  used_[top * kFan + mid] &= ~mask(bit);
  full_[top] &= ~mask(mid);
  full_top_ &= ~mask(top);
  size_.fetch_sub(1, std::memory_order_relaxed);
}

// ---------------------------------------------------------------- verbs

ShrinkerRef Registry::Impl::get(std::uint32_t id, bool* there) noexcept {
  RcuGuard guard;
  ShrinkerImpl* s = ids.lookup(id);  // L1
  if (there != nullptr) *there = s != nullptr;
  if (s == nullptr) return {};
  const unsigned shard = cpu_slot() % s->nshards;
  if (!s->try_get(shard)) return {};  // L2
  ShrinkerRef ref(s, shard);
  if (s->id != id) ref.reset();       // L3
  return ref;
}

namespace {
void copy_name(char (&to)[128], std::string_view from) noexcept {
  const std::size_t n = std::min(from.size(), sizeof to - 1);
  std::memcpy(to, from.data(), n);
  to[n] = 0;
}
}  // namespace

Shrinker Registry::alloc(ShrinkerFlags flags, std::string_view name, Errc* why) {
  const auto fail = [&](Errc e) {
    if (why != nullptr) *why = e;
    return Shrinker();
  };
  if (why != nullptr) *why = Errc::kOk;
  ShrinkerImpl* s = impl_->make_shrinker();
  if (s == nullptr) return fail(Errc::kNoMemory);
  s->flags = flags;
  s->flags_seen.store(static_cast<std::uint16_t>(flags), std::memory_order_relaxed);
  s->budget_ns = impl_->opt.time_budget.count();
  copy_name(s->first_name.text, name);
  const Errc e = impl_->ids.insert(*s);
  if (e != Errc::kOk) {
    impl_->recycle(*s);
    return fail(e);
  }
  return Shrinker(s);
}

#define SPILLWAY_FILL_IN()                                  \
  if (impl_ == nullptr) return Errc::kInvalid;              \
  if (impl_->registered) return Errc::kState

Errc Shrinker::set_count(CountFn fn) {
  SPILLWAY_FILL_IN();
  impl_->count = std::move(fn);
  return Errc::kOk;
}
Errc Shrinker::set_scan(ScanFn fn) {
  SPILLWAY_FILL_IN();
  impl_->scan = std::move(fn);
  return Errc::kOk;
}
Errc Shrinker::set_seeks(unsigned seeks) {
  SPILLWAY_FILL_IN();
  impl_->seeks = seeks;
  return Errc::kOk;
}
Errc Shrinker::set_batch(unsigned batch) {
  SPILLWAY_FILL_IN();
  impl_->batch = batch != 0 ? batch : kBatchDefault;
  return Errc::kOk;
}
Errc Shrinker::set_private_data(void* p) {
  SPILLWAY_FILL_IN();
  impl_->private_data = p;
  return Errc::kOk;
}
Errc Shrinker::set_time_budget(Nanoseconds budget) {
  SPILLWAY_FILL_IN();
  if (budget.count() <= 0) return Errc::kInvalid;
  impl_->budget_ns = budget.count();
  return Errc::kOk;
}
#undef SPILLWAY_FILL_IN

void* Shrinker::private_data() const noexcept {
  return impl_ != nullptr ? impl_->private_data : nullptr;
}
std::uint32_t Shrinker::id() const noexcept { return impl_ != nullptr ? impl_->id : ~0u; }
std::string Shrinker::name() const { return impl_ != nullptr ? impl_->label() : std::string(); }

Errc Shrinker::rename(std::string_view name) {
  if (impl_ == nullptr) return Errc::kInvalid;
  auto* text = make<NameText>();
  if (text == nullptr) return Errc::kNoMemory;
  copy_name(text->text, name);
  NameText* old = impl_->name.exchange(text);
  if (old != &impl_->first_name) old->retire();
  return Errc::kOk;
}

Errc Shrinker::register_() {
  if (impl_ == nullptr || !impl_->count || !impl_->scan) return Errc::kInvalid;  // weakness 2
  if (impl_->registered) return Errc::kState;
  impl_->registered = true;
  // The completion is whole before the first count is not zero (weakness 8).
  ShrinkerImpl& s = *impl_;
  s.done.store(ShrinkerImpl::kOpen, std::memory_order_relaxed);
  s.live_shards.store(s.nshards, std::memory_order_relaxed);
  for (unsigned i = 0; i < s.nshards; ++i) s.refs(i).store(1, std::memory_order_release);  // partner: try_get
  return Errc::kOk;
}

void Shrinker::set_bit(MemoryGroup& group, int node) noexcept {
  Registry::Impl* reg = impl_->reg;
  MemoryGroup& g = has(impl_->flags, ShrinkerFlags::kGroupAware) ? group : *reg->root;
  const int n = has(impl_->flags, ShrinkerFlags::kNumaAware) && node >= 0 && node < reg->opt.nodes
                    ? node : 0;
  reg->set_bit(g, n, impl_->id);
}
void Shrinker::set_bit() noexcept { set_bit(*impl_->reg->root, 0); }

// The slot is enough, registered or not (weakness 6); the block is read under RCU only.
void Registry::set_bit(std::uint32_t id, MemoryGroup& group, int node) noexcept {
  bool all_groups = false, all_nodes = false;
  {
    RcuGuard guard;
    const ShrinkerImpl* s = impl_->ids.lookup(id);
    if (s == nullptr) return;
    const auto flags = static_cast<ShrinkerFlags>(s->flags_seen.load(std::memory_order_relaxed));
    all_groups = has(flags, ShrinkerFlags::kGroupAware);
    all_nodes = has(flags, ShrinkerFlags::kNumaAware);
  }
  impl_->set_bit(all_groups ? group : *impl_->root, all_nodes && node >= 0 && node < impl_->opt.nodes ? node : 0, id);
}

Errc Shrinker::free() {
  if (impl_ == nullptr) return Errc::kInvalid;
  const Errc e = impl_->reg->free_shrinker(*impl_, false);
  if (e == Errc::kOk) impl_ = nullptr;
  return e;
}

void Shrinker::destroy() noexcept {
  if (impl_ != nullptr) {
    auto* s = std::exchange(impl_, nullptr);
    s->reg->free_shrinker(*s, true);
  }
}

namespace {
// Would waiting for `s` wait for this thread? It does when a thread inside `s` waits (directly or
// through others) for a shrinker whose callback this thread is inside of. `waiting_for` was published
// (seq_cst) before this look, and the other side does the same, so of two that close a circle at the
// same time at least one sees it.
bool closes_circle(Registry::Impl& reg, std::uint32_t target, std::uint32_t mine) noexcept {
  std::array<std::uint32_t, kMaxRecords> seen{};
  std::size_t n = 0;
  seen[n++] = target;
  for (std::size_t i = 0; i < n; ++i) {
    for (unsigned r = 0; r < kMaxRecords; ++r) {
      const std::uint64_t key = reg.records[r].key.load();
      const std::uint64_t waits = reg.records[r].waiting_for.load();
      if ((key >> 32) != std::uint64_t{seen[i]} + 1 || waits == 0) continue;
      const auto next = static_cast<std::uint32_t>(waits - 1);
      if (next == mine) return true;
      bool known = false;
      for (std::size_t k = 0; k < n; ++k) known |= seen[k] == next;
      if (!known && n < seen.size()) seen[n++] = next;
    }
  }
  return false;
}
}  // namespace

// Steps 5 to 9 of the head of this file. `orphan_on_error`: a destructor can not refuse, so what would
// wait for itself is left to the last put.
Errc Registry::Impl::free_shrinker(ShrinkerImpl& s, bool orphan_on_error) noexcept {
  if (!s.registered) {
    finish_free(s);
    return Errc::kOk;
  }
  CallFrame* f = t_frame;
  WalkRecord* rec = f != nullptr && f->reg == this ? f->record : nullptr;
  Errc e = Errc::kOk;
  std::string_view what = "free-deadlock", text = "callbacks on two threads free each other's shrinker";
  if (f != nullptr && f->shrinker == nullptr) {
    e = Errc::kState;
    what = "free-in-diagnostics";
    text = "a diagnostics callback frees a shrinker; the walk that reports may hold it";
  } else if (f != nullptr && f->shrinker == &s) {
    e = Errc::kSelfFree;
    what = "self-free";
    text = "a callback frees the shrinker it runs for; free it from another place";
  } else if (rec != nullptr) {
    // Both stores seq_cst: whoever looks after us and sees what we wait for sees where we are, too.
    rec->key.store(rec->key.load(std::memory_order_relaxed));
    rec->waiting_for.store(std::uint64_t{s.id} + 1);
    if (closes_circle(*this, s.id, f->shrinker->id)) {
      e = Errc::kDeadlock;
      rec->waiting_for.store(0);
    }
  }
  s.registered = e != Errc::kOk && !orphan_on_error;
  if (e != Errc::kOk) {
    diag(Severity::kError, what, &s, text);
    if (!orphan_on_error) return e;
    s.done.exchange(ShrinkerImpl::kOrphan, std::memory_order_acq_rel);
    s.drop_initial();
    return e;
  }
  s.drop_initial();
  s.wait_done();
  if (rec != nullptr) rec->waiting_for.store(0);
  finish_free(s);
  return Errc::kOk;
}

void Registry::Impl::finish_free(ShrinkerImpl& s) noexcept {
  ids.erase(s);
  recycle(s);
}

}  // namespace spillway::reclaim
