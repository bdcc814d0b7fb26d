// Shrinkers: ids, references, the three verbs.
//
// The life of a shrinker, and why each step is needed and in this order (S2, S3, S8):
//
//   alloc     1 memory, name, shards with count 0        nothing can find it
//             2 id and slot in the radix tree            lookups find it, try_get says no: count is 0
//   register  3 every field is final
//             4 refs[shard] = 1, release                 try_get's acquire pairs with it: whoever gets
//                                                        a reference sees a whole shrinker (weakness 8)
//   free      5 put the initial reference of each shard  from its zero on no try_get on it succeeds
//             6 wait for the completion                  the last put of the last shard signals it; no
//                                                        callback runs now and none will start (S3)
//             7 slot = null, id back to the pool         only now: a walker that still holds a reference
//                                                        in 5 or 6 must be able to tell "dying" (slot
//                                                        there, keep the bit) from "gone" (slot empty)
//             8 the body (callbacks, statistics) now     only references led to it, and there are none
//             9 the gate after a grace period            a reader under RCU may have the pointer from
//                                                        before 7 and is about to read a zero count; and
//                                                        the signaller of 6 touches it until it leaves RCU
//
// A half-built or dying shrinker has count 0 and so is not there. There is no other flag on the read
// side; `registered` belongs to the owner and tells `free` whether 5 and 6 are due.
#include <cstdio>
#include <cstring>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

thread_local CallFrame* t_frame = nullptr;

static_assert(sizeof(ShrinkerGate) <= ShrinkerGate::kHead);
static_assert(sizeof(ShrinkerImpl) % alignof(Shard) == 0 && sizeof(RareStats) % alignof(Shard) == 0);

ShrinkerImpl::~ShrinkerImpl() {
  NameText* n = name.load();
  if (n != &first_name) destroy(n);
}

// ---------------------------------------------------------------- memory

#ifdef SPILLWAY_RECLAIM_POISON
constexpr bool kRecycle = false;  // the tests want to see a use after free
#else
constexpr bool kRecycle = true;
#endif

namespace {
void new_stats(void* body, unsigned n) noexcept {
  auto* rare = new (static_cast<char*>(body) + sizeof(ShrinkerImpl)) RareStats();
  auto* shards = reinterpret_cast<Shard*>(rare + 1);
  for (unsigned i = 0; i < n; ++i) new (&shards[i]) Shard();
}
}  // namespace

ShrinkerImpl* Registry::Impl::make_shrinker() noexcept {
  void *gate = nullptr, *body = nullptr;
  {
    Lock lock(blocks_mutex);
    if (gates == nullptr) gates = freed_gates.exchange(nullptr, std::memory_order_acquire);
    if (gates != nullptr) {
      gate = std::exchange(gates, gates->next);
      gate_count.fetch_sub(1, std::memory_order_relaxed);
    }
    if (bodies != nullptr) {
      body = std::exchange(bodies, bodies->next);
      --body_count;
    }
  }
  const unsigned n = opt.ref_shards;
  if (gate == nullptr) gate = allocate(ShrinkerGate::block_size(n));
  if (body == nullptr && (body = allocate(ShrinkerImpl::block_size(n))) != nullptr) new_stats(body, n);
  if (gate == nullptr || body == nullptr) {
    if (gate != nullptr) release(gate, ShrinkerGate::block_size(n));
    if (body != nullptr) release(body, ShrinkerImpl::block_size(n));
    return nullptr;
  }
  auto* g = new (gate) ShrinkerGate();
  auto* s = new (body) ShrinkerImpl();
  g->reg = s->reg = this;
  g->body = s;
  s->gate = g;
  s->nshards = n;
  g->nshards = static_cast<std::uint16_t>(n);
  for (unsigned i = 0; i < n; ++i) new (&g->shards()[i]) RefShard();
  s->rare = reinterpret_cast<RareStats*>(static_cast<char*>(body) + sizeof(ShrinkerImpl));
  s->shards = reinterpret_cast<Shard*>(s->rare + 1);
  s->name.store(&s->first_name);
  return s;
}

void Registry::Impl::drop_body(ShrinkerImpl* s) noexcept {
  if (kRecycle && s->visited.load(std::memory_order_relaxed)) new_stats(s, s->nshards);
  s->~ShrinkerImpl();
  {
    Lock lock(blocks_mutex);
    if (kRecycle && body_count < kFreeBodiesMax) {
      bodies = new (s) FreeBlock{bodies};
      ++body_count;
      return;
    }
  }
  release(s, ShrinkerImpl::block_size(opt.ref_shards));
}

void RecycleGate::operator()(ShrinkerGate* g) const noexcept { g->reg->give_gate(g); }

// After the grace period, on the RCU worker.
void Registry::Impl::give_gate(ShrinkerGate* g) noexcept {
  g->~ShrinkerGate();
  if (!kRecycle || gate_count.load(std::memory_order_relaxed) >= kFreeGatesMax) {
    release(g, ShrinkerGate::block_size(opt.ref_shards));
    return;
  }
  gate_count.fetch_add(1, std::memory_order_relaxed);
  auto* b = new (g) FreeBlock{freed_gates.load(std::memory_order_relaxed)};
  while (!freed_gates.compare_exchange_weak(b->next, b, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

void Registry::Impl::free_blocks() noexcept {
  const auto all = [](FreeBlock* list, std::size_t size) {
    while (list != nullptr) release(std::exchange(list, list->next), size);
  };
  all(bodies, ShrinkerImpl::block_size(opt.ref_shards));
  all(gates, ShrinkerGate::block_size(opt.ref_shards));
  all(freed_gates.exchange(nullptr, std::memory_order_acquire), ShrinkerGate::block_size(opt.ref_shards));
}

// ---------------------------------------------------------------- references

// Partner of the release store in register_ (acquire on success). Increment unless zero.
bool ShrinkerGate::try_get(unsigned shard) noexcept {
  auto& refs = shards()[shard].refs;
  std::uint64_t v = refs.load(std::memory_order_relaxed);
  while (v != 0) {
    if (refs.compare_exchange_weak(v, v + 1, std::memory_order_acquire, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

// Release: what the callback did happens before what free's caller does next. The completion is
// signalled under RCU: free may return and retire *this between `done` and the wake.
void ShrinkerGate::put(unsigned shard) noexcept {
  if (shards()[shard].refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  RcuGuard keep;
  if (live_shards.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::uint32_t before = done.exchange(kDone, std::memory_order_acq_rel);
  if (before == kOrphan) reg->finish_free(*body);
  if (before == kWaiting) futex_wake(done, 1);
}

void ShrinkerGate::drop_initial() noexcept {
  RcuGuard keep;  // an orphan may be retired by the last put
  const unsigned n = nshards;
  for (unsigned i = 0; i < n; ++i) put(i);
}

void ShrinkerGate::wait_done() noexcept {
  std::uint32_t seen = kOpen;
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

ShrinkerGate* IdTable::lookup(std::uint32_t id) const noexcept {
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
  s.id = s.gate->id = (top * kFan + mid) * kFan + bit;
  s.generation = l->generation[bit];
  l->slot[bit].store(s.gate);  // release: a lookup sees id, shards and the zero counts
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

ShrinkerRef Registry::Impl::get(std::uint32_t id) noexcept {
  RcuGuard guard;
  ShrinkerGate* g = ids.lookup(id);
  if (g == nullptr) return {};
  const unsigned shard = thread_slot() % g->nshards;
  return g->try_get(shard) ? ShrinkerRef(g->body, shard) : ShrinkerRef();
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
  s->gate->flags = static_cast<std::uint16_t>(flags);
  s->budget_ns = impl_->opt.time_budget.count();
  copy_name(s->first_name.text, name);
  const Errc e = impl_->ids.insert(*s);
  if (e != Errc::kOk) {
    impl_->give_gate(s->gate);
    impl_->drop_body(s);
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
  ShrinkerGate& gate = *impl_->gate;
  gate.live_shards.store(gate.nshards, std::memory_order_relaxed);
  for (unsigned i = 0; i < gate.nshards; ++i) {
    gate.shards()[i].refs.store(1, std::memory_order_release);  // partner: try_get
  }
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

// The slot is enough, registered or not (weakness 6); the gate is read under RCU only.
void Registry::set_bit(std::uint32_t id, MemoryGroup& group, int node) noexcept {
  bool all_groups = false, all_nodes = false;
  {
    RcuGuard guard;
    const ShrinkerGate* s = impl_->ids.lookup(id);
    if (s == nullptr) return;
    const auto flags = static_cast<ShrinkerFlags>(s->flags);
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
  Errc e = Errc::kOk;
  CallFrame* f = t_frame;
  if (f != nullptr && f->reg == this) {
    if (f->shrinker == &s) {
      e = Errc::kSelfFree;
    } else if (f->record != nullptr) {
      f->record->waiting_for.store(std::uint64_t{s.id} + 1);
      if (closes_circle(*this, s.id, f->shrinker->id)) e = Errc::kDeadlock;
      if (e != Errc::kOk) f->record->waiting_for.store(0);
    }
  }
  if (e != Errc::kOk) {
    diag(Severity::kError, e == Errc::kSelfFree ? "self-free" : "free-deadlock", &s,
         e == Errc::kSelfFree
             ? "a callback frees the shrinker it runs for; free it from another place"
             : "callbacks on two threads free each other's shrinker");
    if (!orphan_on_error) return e;
    s.registered = false;
    s.gate->done.exchange(ShrinkerGate::kOrphan, std::memory_order_acq_rel);
    s.gate->drop_initial();
    return e;
  }
  s.registered = false;
  s.gate->drop_initial();
  s.gate->wait_done();
  if (f != nullptr && f->record != nullptr) f->record->waiting_for.store(0);
  finish_free(s);
  return Errc::kOk;
}

// What the callbacks captured goes now, in the caller's thread, not after a grace period in another's.
void Registry::Impl::finish_free(ShrinkerImpl& s) noexcept {
  ids.erase(s);
  ShrinkerGate* gate = s.gate;
  drop_body(&s);
  gate->retire(ShrinkerGate::block_size(gate->nshards));
}

}  // namespace spillway::reclaim
