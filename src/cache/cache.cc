#include "src/cache/cache.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/cache/impl.h"
#include "src/cache/volume_filter.h"
#include "spillway/reclaim/registry.h"

namespace spillway {

using namespace cache;
using reclaim::GroupRef;

Result<CacheMode> parse_cache_mode(std::string_view text) {
  for (CacheMode m : {CacheMode::kIsolated, CacheMode::kTrusted, CacheMode::kNone})
    if (text == to_string(m)) return m;
  return fail(ErrorKind::kInvalid, fmt::format("cache mode \"{}\": isolated, trusted or none", text));
}

std::string_view to_string(CacheMode mode) {
  switch (mode) {
    case CacheMode::kIsolated: return "isolated";
    case CacheMode::kTrusted: return "trusted";
    case CacheMode::kNone: return "none";
  }
  return "?";
}

// ---- life ----------------------------------------------------------------------------------------------------------

Cache::Cache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Cache::~Cache() = default;

Result<std::unique_ptr<Cache>> Cache::create(CacheOptions options) {
  if (options.registry == nullptr) return fail(ErrorKind::kInvalid, "cache: no registry");
  if (options.capacity_bytes < 64 * kPageSize)
    return fail(ErrorKind::kInvalid, fmt::format("cache: capacity {}: less than 256 KiB", options.capacity_bytes));
  if (options.max_capacity_bytes == 0) options.max_capacity_bytes = 4 * options.capacity_bytes;
  options.max_capacity_bytes = std::max(options.max_capacity_bytes, options.capacity_bytes);
  auto impl = std::make_unique<Impl>(std::move(options));
  SPILLWAY_CHECK(impl->start());
  return std::unique_ptr<Cache>(new Cache(std::move(impl)));
}

// Frames of reads under way whose pages their view has let go of already: what all tenants together may have.
uint64_t Cache::Impl::in_flight_pages() const { return options.max_capacity_bytes / 8 / kPageSize + 8192; }

Result<void> Cache::Impl::start() {
  constexpr uint64_t kSpareFrames = 8192;  // copies of writes under way, floors of many small tenants
  registry = options.registry;
  numa = options.numa_nodes;
  if (options.dirty_bytes_max == 0) options.dirty_bytes_max = options.capacity_bytes / 4;
  capacity_bytes.store(options.capacity_bytes, std::memory_order_relaxed);
  // Views never hold more than the capacity together, dirty pages without a view at most the dirty limit; the rest is
  // for pages that a view let go of while they were being read. All of it is address space until it is touched.
  const uint64_t frames = (options.max_capacity_bytes + options.dirty_bytes_max) / kPageSize + in_flight_pages() +
                          kSpareFrames;
  auto made = FrameStore::open(options.store, numa, frames);
  if (!made) return fail(std::move(made).error());
  store = std::move(*made);
  if (store->adopted()) {
    struct Claim {
      FrameId f;
      uint64_t generation;
    };
    std::lock_guard guard(mutex_);
    store->scan([&](FrameId f, uint32_t slot, uint64_t page, bool dirty, uint64_t) {
      const std::string key = store->node_key(slot);
      if (key.empty()) return;  // a node that was forgotten
      Node& n = node_of(key, slot, page + 1);
      n.index.grow(page + 1);
      Leaf* leaf = n.index.lock_or_make(page / kLeafPages);
      const unsigned i = page % kLeafPages;
      if (const FrameId other = leaf->at(i); other != kNoFrame) {
        // Two frames claim the page: the younger one is right.
        if (store->entry(other).generation.load() > store->entry(f).generation.load()) {
          n.index.unlock(leaf);
          return;
        }
        Frame& o = store->frame(other);
        if (o.dirty) {
          n.dirty.fetch_sub(1);
          dirty_total.fetch_sub(1);
        }
        o.refs.store(0);
        o.dirty = o.counted = o.unclaimed = false;
        leaf->unclean &= ~(uint64_t{1} << i);
        leaf->put(i, kNoFrame);
        n.resident.fetch_sub(1);
        adopted.fetch_sub(1);
        unclaimed.fetch_sub(1);
      }
      Frame& fr = store->frame(f);
      fr.node = static_cast<uint16_t>(slot);
      fr.page = page;
      fr.unclaimed = true;
      fr.refs.store(1, std::memory_order_release);
      leaf->put(i, f);
      n.resident.fetch_add(1);
      if (dirty) {
        fr.dirty = fr.counted = true;
        fr.owner = &n.recovered;
        leaf->unclean |= uint64_t{1} << i;
        n.dirty.fetch_add(1);
        dirty_total.fetch_add(1);
        n.recovered.push(page, f);
        adopted_dirty.fetch_add(1);
      }
      n.index.unlock(leaf);
      adopted.fetch_add(1);
      unclaimed.fetch_add(1);
    });
    store->finish_adoption();
    log(LogLevel::kInfo, "cache", "adopted {} pages, {} of them dirty", adopted.load(), adopted_dirty.load());
  }
  using reclaim::ShrinkerFlags;
  reclaim::Errc why{};
  shrinker = registry->alloc(ShrinkerFlags::kGroupAware | ShrinkerFlags::kNumaAware | ShrinkerFlags::kNoBlock,
                             "cache-frames", &why);
  if (!shrinker) return fail(ErrorKind::kNoMemory, fmt::format("cache: shrinker: {}", reclaim::to_string(why)));
  shrinker.set_count([this](const reclaim::ScanRequest& r) { return count(r); });
  shrinker.set_scan([this](const reclaim::ScanRequest& r) { return scan(r); });
  shrinker.set_private_data(this);
  if (auto e = shrinker.register_(); e != reclaim::Errc::kOk)
    return fail(ErrorKind::kInvalid, fmt::format("cache: shrinker: {}", reclaim::to_string(e)));
  registry->add_observer(*this);
  return {};
}

// Order: nobody asks us any more (observer, shrinker), then the views and their charges, then index and frames.
Cache::Impl::~Impl() {
  if (registry == nullptr || store == nullptr) return;
  if (shrinker) {
    registry->remove_observer(*this);
    shrinker.free();
  }
  for (auto& t : tenants_) {
    for (int i = 0; i < numa; ++i) {
      ViewList& list = t->lists[static_cast<size_t>(i)];
      uncharge(*t, i, list.pages());
      while (ViewChunk* c = list.any_chunk()) {
        c->pages = 0;
        list.remove_chunk(c);
        delete c;
      }
    }
  }
  for (auto& n : nodes_) {
    const uint64_t last = UINT64_MAX / kPageSize / kLeafPages;
    n->index.for_each(0, last, [&](Leaf& l) {
      for (unsigned i = 0; i < kLeafPages; ++i) {
        const FrameId f = l.at(i);
        if (f == kNoFrame) continue;
        Frame& fr = store->frame(f);
        if (fr.orphan && fr.owner != nullptr && fr.owner->tenant != nullptr)
          uncharge(*fr.owner->tenant, numa_of(l.number), 1);
      }
    });
  }
  nodes_.clear();
  tenants_.clear();
}

Node& Cache::Impl::node_of(const std::string& key, uint32_t slot, uint64_t pages) {
  if (auto it = by_key_.find(key); it != by_key_.end()) return *it->second;
  auto n = std::make_unique<Node>(slot, key, pages);
  n->recovered.node = n.get();
  Node& ref = *n;
  by_key_.emplace(key, n.get());
  nodes_.push_back(std::move(n));
  return ref;
}

Result<VolumePtr> Cache::attach(VolumePtr lower, CacheMode mode, const std::string& node_key) {
  if (!lower) return fail(ErrorKind::kInvalid, "cache: attach without a volume");
  auto slot = impl_->store->node_slot(node_key);
  if (!slot) return fail(std::move(slot).error());
  const uint64_t pages = lower->size() / kPageSize;
  std::lock_guard guard(impl_->mutex_);
  Node& n = impl_->node_of(node_key, *slot, pages);
  n.index.grow(pages + 1);
  {
    std::lock_guard node_guard(n.mutex);
    if (auto have = n.lower.lock(); have != nullptr && have != lower)
      return fail(ErrorKind::kInvalid, fmt::format("cache: node {} is in front of volume {}, not {}", node_key,
                                                   have->name(), lower->name()));
    n.lower = lower;
  }
  auto v = std::make_shared<FilterVolume>(*impl_, n, std::move(lower), mode);
  v->listen();
  std::erase_if(impl_->volumes_, [](auto& w) { return w.expired(); });
  impl_->volumes_.push_back(v);
  if (n.recovered.any()) impl_->start_ticker();
  return VolumePtr(v);
}

void Cache::forget(const std::string& node_key) {
  Node* n = nullptr;
  {
    std::lock_guard guard(impl_->mutex_);
    auto it = impl_->by_key_.find(node_key);
    if (it == impl_->by_key_.end()) return;
    n = it->second;
    SPILLWAY_ASSERT(n->volume() == nullptr);  // still attached: the caller's mistake
  }
  // Frames first; the slot last, or a successor would take them for another node's.
  std::vector<Tenant*> views;
  {
    std::lock_guard guard(n->mutex);
    views = n->views;
  }
  const uint64_t last = UINT64_MAX / kPageSize / kLeafPages;
  std::vector<uint64_t> numbers;
  n->index.for_each(0, last, [&](Leaf& l) { numbers.push_back(l.number); });
  for (uint64_t number : numbers) {
    const int nn = impl_->numa_of(number);
    for (uint32_t s = 0; s < views.size(); ++s) {
      ViewList& list = views[s]->lists[static_cast<size_t>(nn)];
      uint64_t gone = 0;
      {
        std::lock_guard list_guard(list.lock);
        Leaf* l = n->index.lock(number);
        if (l == nullptr) break;
        if (ViewChunk* c = l->chunk(s)) {
          for (unsigned i = 0; i < kLeafPages; ++i)
            if (const uint8_t state = c->get(i); (state & page_state::kPresent) != 0) {
              list.remove(*c, i);
              ++gone;
              if ((state & page_state::kLoading) == 0) --l->views[i];
            }
          list.remove_chunk(c);
          l->set_chunk(s, nullptr);
          c->retire();
        }
        n->index.unlock(l);
      }
      impl_->uncharge(*views[s], nn, gone);
    }
    Leaf* l = n->index.lock(number);
    if (l == nullptr) continue;
    for (unsigned i = 0; i < kLeafPages; ++i)
      if (const FrameId f = l->at(i); f != kNoFrame) {
        impl_->store->frame(f).dirty = false;
        impl_->settle(*l, i, f);
        if (l->at(i) == f) {  // unclaimed or clean: settle left it alone
          Frame& fr = impl_->store->frame(f);
          if (fr.unclaimed) impl_->unclaimed.fetch_sub(1);
          fr.unclaimed = false;
          impl_->settle(*l, i, f);
        }
      }
    n->index.unlock(l);
  }
  impl_->store->free_node_slot(n->slot);
  std::lock_guard guard(impl_->mutex_);
  impl_->by_key_.erase(node_key);  // the empty Node stays until the cache goes: frames in flight may name it
}

// ---- tenants and entitlements --------------------------------------------------------------------------------------

uint64_t Cache::Impl::now_ns() const {
  if (options.background != nullptr) return options.background->now_ns();
  return static_cast<uint64_t>(registry->clock().now().time_since_epoch().count());
}

Tenant* Cache::Impl::tenant_of(GroupId id, bool asks) {
  GroupRef g = registry->find_group(static_cast<uint32_t>(id));
  if (!g) g = registry->root();
  GroupRef live = g->live();
  GroupRef top = GroupRef::share(live->top_level());
  const bool direct = asks && live.get() == top.get();
  Tenant* t = nullptr;
  bool fresh = false;
  {
    std::lock_guard guard(mutex_);
    for (auto& have : tenants_)
      if (have->serial == top->serial() && !have->dead.load(std::memory_order_relaxed)) t = have.get();
    if (t != nullptr) {
      if (t->direct || !direct) return t;
      t->direct = true;
    } else {
      t = &make_tenant(top, &fresh);
      t->direct = direct;
    }
  }
  recompute();
  if (fresh && store->adopted()) {
    claim_all();
    claim(*t);
  }
  return t;
}

// mutex_ held. A new one, or one of that name whose group went and came back.
Tenant& Cache::Impl::make_tenant(const GroupRef& top, bool* fresh) {
  const std::string name = top->path();
  Tenant* t = nullptr;
  for (auto& have : tenants_)
    if (have->dead.load(std::memory_order_relaxed) && have->name == name && have->pages(numa) == 0 &&
        have->dirty.load() == 0)
      t = have.get();
  if (t == nullptr) {
    tenants_.push_back(std::make_unique<Tenant>());
    t = tenants_.back().get();
    t->index = static_cast<uint32_t>(tenants_.size() - 1);
    t->name = name;
    t->bit = store->tenant_bit(name);
    t->lists = std::make_unique<ViewList[]>(static_cast<size_t>(numa));
    *fresh = true;
  }
  t->group = top;
  t->serial = top->serial();
  t->dead.store(false, std::memory_order_release);
  return *t;
}

// With the first request after a restart every tenant has its view again, so that what the first does takes nothing from
// those that come later (P4).
void Cache::Impl::claim_all() {
  if (claimed_all.exchange(true, std::memory_order_acq_rel)) return;
  const GroupRef root = registry->root();
  for (auto& g : registry->groups()) {
    const bool top = g->is_root() ? options.root_is_tenant : g->parent() == root.get() && !g->dead();
    if (top && store->knows_tenant(g->path())) (void)tenant_of(GroupId{g->id()}, false);
  }
}

uint32_t Cache::Impl::view_slot(Node& n, Tenant& t, DirtySet** set) {
  std::lock_guard guard(n.mutex);
  uint32_t s = 0;
  while (s < n.views.size() && n.views[s] != &t) ++s;
  if (s == n.views.size()) {
    n.views.push_back(&t);
    n.sets.push_back(std::make_unique<DirtySet>());
    n.sets.back()->node = &n;
    n.sets.back()->tenant = &t;
  }
  *set = n.sets[s].get();
  return s;
}

// What the sub-groups of a tenant may hold together: UINT64_MAX while one of them has no limit. A page of the view is the
// tenant's, whichever of its guests brought it, so their limits hold as a sum, and only where all its guests are in one.
static uint64_t limit_of_subgroups(const std::vector<GroupRef>& all, const reclaim::MemoryGroup& top) {
  uint64_t sum = 0;
  bool any = false;
  for (auto& g : all) {
    if (g->parent() != &top || g->dead()) continue;
    const reclaim::GroupLimits l = g->limits();
    const uint64_t most = std::min(l.max, l.high);
    if (most == reclaim::kUnlimited || sum + most < sum) return reclaim::kUnlimited;
    sum += most;
    any = true;
  }
  return any ? sum : reclaim::kUnlimited;
}

// The capacity is shared out among all top-level groups there are, whether they use the cache or not: what a tenant
// may hold depends on the configuration, never on what others do (P4).
void Cache::Impl::recompute() {
  const GroupRef root = registry->root();
  std::vector<GroupRef> all = registry->groups();
  std::vector<GroupRef> tops;
  for (auto& g : all)
    if (g->parent() == root.get() && !g->dead()) tops.push_back(g);
  std::unique_lock guard(mutex_);
  const bool root_used = options.root_is_tenant ||
                         std::any_of(tenants_.begin(), tenants_.end(),
                                     [](auto& t) { return !t->dead && t->group->is_root(); });
  if (root_used || tops.empty()) tops.push_back(root);
  std::vector<reclaim::Share> in(tops.size());
  std::vector<uint64_t> out(tops.size());
  for (size_t i = 0; i < tops.size(); ++i) {
    in[i].limits = tops[i]->limits();
    if (tops[i]->is_root()) in[i].limits = {};
    in[i].limits.max = std::min(in[i].limits.max, in[i].limits.high);
    const bool direct = tops[i]->is_root() || std::any_of(tenants_.begin(), tenants_.end(), [&](auto& t) {
      return t->serial == tops[i]->serial() && t->direct;
    });
    if (!direct) in[i].limits.max = std::min(in[i].limits.max, limit_of_subgroups(all, *tops[i]));
  }
  const uint64_t capacity = capacity_bytes.load(std::memory_order_relaxed);
  reclaim::entitlements(capacity, in.data(), out.data(), in.size());
  const uint64_t dirty_all = std::min(options.dirty_bytes_max, capacity / 2);
  for (auto& t : tenants_)
    for (size_t i = 0; i < tops.size(); ++i)
      if (tops[i]->serial() == t->serial) {
        constexpr uint64_t kDirtyMin = 16;
        uint64_t own = out[i] / kPageSize;
        auto dirty = static_cast<uint64_t>(static_cast<double>(dirty_all / kPageSize) * static_cast<double>(out[i]) /
                                           static_cast<double>(capacity));
        if (in[i].limits.max != reclaim::kUnlimited) {
          // A group with a limit of its own keeps room for dirty pages that left the view.
          const uint64_t max_pages = in[i].limits.max / kPageSize;
          dirty = std::min(std::max(std::min(dirty, max_pages / 8), kDirtyMin), max_pages / 2);
          own = std::min(own, max_pages - dirty);
        }
        t->dirty_max.store(std::max(dirty, kDirtyMin), std::memory_order_relaxed);
        t->in_flight_max.store(std::max<uint64_t>(kLeafPages, static_cast<uint64_t>(
            static_cast<double>(in_flight_pages()) * static_cast<double>(out[i]) / static_cast<double>(capacity))),
                               std::memory_order_relaxed);
        t->entitlement.store(own, std::memory_order_relaxed);
        apply_capacity(*t);
      }
}

void Cache::Impl::apply_capacity(Tenant& t) {
  constexpr uint64_t kFloor = 16;
  const uint64_t scaled = t.entitlement.load(std::memory_order_relaxed) *
                          t.scale.load(std::memory_order_relaxed) / Tenant::kScaleOne;
  for (int i = 0; i < numa; ++i)
    t.lists[static_cast<size_t>(i)].set_capacity(std::max(kFloor, scaled / static_cast<uint64_t>(numa)));
}

// What pressure took comes back with time alone: 1/64 of the entitlement in each interval.
void Cache::Impl::grow_back(Tenant& t) {
  const uint32_t s = t.scale.load(std::memory_order_relaxed);
  if (s == Tenant::kScaleOne || options.grow_back_ns == 0) return;
  const uint64_t now = now_ns();
  uint64_t since = t.scale_time_ns.load(std::memory_order_relaxed);
  if (now < since + options.grow_back_ns) return;
  std::lock_guard guard(mutex_);
  since = t.scale_time_ns.load(std::memory_order_relaxed);
  if (now < since + options.grow_back_ns) return;
  const uint64_t steps = (now - since) / options.grow_back_ns;
  const uint64_t next = std::min<uint64_t>(Tenant::kScaleOne,
                                           t.scale.load() + steps * (Tenant::kScaleOne / 64));
  t.scale_time_ns.store(since + steps * options.grow_back_ns, std::memory_order_relaxed);
  t.scale.store(static_cast<uint32_t>(next), std::memory_order_relaxed);
  apply_capacity(t);
}

void Cache::refresh_entitlements() { impl_->recompute(); }

void Cache::set_capacity(uint64_t bytes) {
  bytes = std::clamp<uint64_t>(bytes, 64 * kPageSize, impl_->options.max_capacity_bytes);
  impl_->capacity_bytes.store(bytes, std::memory_order_relaxed);
  impl_->recompute();
  impl_->drop_unclaimed();
  std::vector<Tenant*> all;
  {
    std::lock_guard guard(impl_->mutex_);
    for (auto& t : impl_->tenants_) all.push_back(t.get());
  }
  for (Tenant* t : all) impl_->trim(*t, true);
  impl_->store->punch(0);
}

uint64_t Cache::capacity() const { return impl_->capacity_bytes.load(std::memory_order_relaxed); }

uint64_t Cache::apply_pressure(double fraction) {
  impl_->drop_unclaimed();
  std::vector<Tenant*> all;
  {
    std::lock_guard guard(impl_->mutex_);
    for (auto& t : impl_->tenants_) all.push_back(t.get());
  }
  uint64_t pages = 0;
  for (Tenant* t : all) pages += impl_->pressure(*t, fraction);
  impl_->store->punch(0);
  return pages * kPageSize;
}

// ---- eviction ------------------------------------------------------------------------------------------------------

// Guarded by the leaf's lock. The view has let go of the frame: with the last view a clean frame is free; a dirty one
// stays, charged to whoever dirtied it, until it is written.
void Cache::Impl::drop_view(Leaf& leaf, unsigned i, FrameId f, Tenant& t) {
  SPILLWAY_ASSERT(leaf.views[i] > 0);
  --leaf.views[i];
  store->drop_view(f, t.bit);
  if (leaf.views[i] != 0) return;
  settle(leaf, i, f);
  Frame& fr = store->frame(f);
  if (leaf.at(i) == f && fr.counted && !fr.orphan) {
    fr.orphan = true;
    if (fr.owner->tenant != nullptr) fr.owner->tenant->group->charge(kPageSize, numa_of(leaf.number));
    kick(*fr.owner);
  }
}

void Cache::Impl::settle(Leaf& leaf, unsigned i, FrameId f) {
  Frame& fr = store->frame(f);
  if (fr.dirty || fr.writeback) return;
  if (fr.writers == 0) {
    store->set_dirty(f, false);
    leaf.unclean &= ~(uint64_t{1} << i);
  }
  if (fr.counted) {
    fr.counted = false;
    if (fr.owner->tenant != nullptr) {
      fr.owner->tenant->dirty.fetch_sub(1, std::memory_order_relaxed);
      if (fr.orphan) uncharge(*fr.owner->tenant, numa_of(leaf.number), 1);
    }
    fr.orphan = false;
    leaf.node->dirty.fetch_sub(1, std::memory_order_relaxed);
    dirty_total.fetch_sub(1, std::memory_order_relaxed);
  }
  if (leaf.views[i] != 0 || fr.writers != 0 || fr.unclaimed) return;
  store->clear(f);
  leaf.put(i, kNoFrame);
  leaf.node->resident.fetch_sub(1, std::memory_order_relaxed);
  put(f);
}

void Cache::Impl::install(Leaf& leaf, unsigned i, FrameId f) {
  Frame& fr = store->frame(f);
  fr.node = static_cast<uint16_t>(leaf.node->slot);
  fr.page = leaf.number * kLeafPages + i;
  fr.dirty = fr.writeback = fr.unclaimed = fr.counted = fr.orphan = fr.suspect = false;
  fr.writers = 0;
  fr.owner = nullptr;
  fr.refs.fetch_add(1, std::memory_order_release);
  store->publish(f, false);
  const FrameId before = leaf.at(i);
  leaf.put(i, f);
  if (before != kNoFrame) {
    // Cleared after its successor is there: should we be killed in between, the younger of the two counts.
    store->clear(before);
    put(before);
    return;
  }
  SPILLWAY_ASSERT(leaf.views[i] == 0 && leaf.clean(i));
  leaf.node->resident.fetch_add(1, std::memory_order_relaxed);
}

// Little is touched of the old frame, and that was fetched while the device was at work (FilterVolume::fetch_descriptors):
// the time of the answer must not tell that there was one.
void Cache::Impl::replace(Leaf& leaf, unsigned i, FrameId old, FrameId fresh) {
  SPILLWAY_ASSERT(leaf.clean(i));
  bool unclaimed_too = false;
  if (leaf.views[i] == 0) [[unlikely]]  // adopted, in nobody's view yet
    unclaimed_too = std::exchange(store->frame(old).unclaimed, false);
  store->entry(fresh).views.store(store->entry(old).views.load(std::memory_order_relaxed), std::memory_order_relaxed);
  install(leaf, i, fresh);
  store->frame(fresh).unclaimed = unclaimed_too;
}

void Cache::Impl::join_view(Leaf& leaf, unsigned i, FrameId f, Tenant& t) {
  Frame& fr = store->frame(f);
  ++leaf.views[i];
  store->add_view(f, t.bit);
  if (fr.unclaimed) {
    fr.unclaimed = false;
    unclaimed.fetch_sub(1, std::memory_order_relaxed);
  }
  if (fr.orphan) {
    fr.orphan = false;
    if (fr.owner->tenant != nullptr) uncharge(*fr.owner->tenant, numa_of(leaf.number), 1);
  }
}

std::pair<ViewChunk*, unsigned> Cache::Impl::victim_of(ViewList& list) {
  if (mutant == Mutant::kEvictFewestViews)
    for (uint64_t k = 0; k < list.chunks(); ++k)
      for (unsigned i = 0; i < kLeafPages; ++i) {
        ViewChunk* c = list.chunk_at(k);
        const FrameId f = c->leaf->at(i);
        if ((c->get(i) & (page_state::kPresent | page_state::kLoading)) == page_state::kPresent && f != kNoFrame &&
            c->leaf->views[i] == 1)
          return {c, i};
      }
  return list.victim();
}

void Cache::Impl::forget_view(Tenant& t) {
  for (int i = 0; i < numa; ++i) {
    ViewList& list = t.lists[static_cast<size_t>(i)];
    uint64_t gone = 0;
    {
      std::lock_guard guard(list.lock);
      gone = evict(t, list, list.pages());
      while (ViewChunk* c = list.any_chunk()) {
        Leaf* leaf = c->leaf;
        leaf->lock.lock();
        leaf->set_chunk(c->slot, nullptr);
        list.remove_chunk(c);
        c->retire();
        leaf->node->index.unlock(leaf);
      }
      list.reset();
    }
    uncharge(t, i, gone);
  }
}

uint64_t Cache::Impl::evict(Tenant& t, ViewList& list, uint64_t n) {
  uint64_t gone = 0;
  while (gone < n) {
    auto [c, i] = victim_of(list);
    if (c == nullptr) break;
    Leaf* leaf = c->leaf;
    leaf->lock.lock();  // not dead: it has this chunk
    const uint8_t s = c->get(i);
    if ((s & page_state::kLoading) != 0) {
      if (PendingRead* p = leaf->find_pending(&t, i)) p->dropped |= uint64_t{1} << (i - p->first);
    } else {
      drop_view(*leaf, i, leaf->at(i), t);
    }
    list.evicted(*c, i);
    leaf->node->index.unlock(leaf);
    ++gone;
  }
  release_dead_chunks(list);
  return gone;
}

void Cache::Impl::release_dead_chunks(ViewList& list) {
  while (ViewChunk* c = list.take_dead()) {
    Leaf* leaf = c->leaf;
    leaf->lock.lock();
    leaf->set_chunk(c->slot, nullptr);
    list.remove_chunk(c);
    c->retire();
    leaf->node->index.unlock(leaf);
  }
}

ViewChunk* Cache::Impl::chunk_of(Leaf& leaf, uint32_t slot, ViewList& list) {
  if (ViewChunk* c = leaf.chunk(slot)) return c;
  auto* c = new ViewChunk;
  c->leaf = &leaf;
  c->slot = slot;
  list.add_chunk(c);
  leaf.set_chunk(slot, c);
  return c;
}

FrameId Cache::Impl::frame_for_read(Tenant& t, int numa_node) {
  if (t.in_flight.load(std::memory_order_relaxed) < t.in_flight_max.load(std::memory_order_relaxed)) {
    refill_if_few();
    if (const FrameId f = store->alloc(numa_node); f != kNoFrame) return f;
    shortage.fetch_add(1, std::memory_order_relaxed);
  }
  bypassed.fetch_add(1, std::memory_order_relaxed);
  return kNoFrame;
}

void Cache::Impl::make_room(Tenant& t, int numa_node, uint64_t n) {
  if (n == 0) return;
  grow_back(t);
  ViewList& list = t.lists[static_cast<size_t>(numa_node)];
  uint64_t gone = 0;
  {
    std::lock_guard guard(list.lock);
    const uint64_t cap = list.capacity(), want = list.pages() + n;
    if (want > cap) gone = evict(t, list, std::min(want - cap, list.pages()));
  }
  t.evicted.fetch_add(gone, std::memory_order_relaxed);
  // Without asking: the capacity keeps below the group's limit with room for what else is charged (recompute). A charge
  // that could fail would evict by what is dirty at this moment, which a disk's load decides (P3).
  if (gone < n) t.group->charge((n - gone) * kPageSize, numa_node);
  else uncharge(t, numa_node, gone - n);
}

uint64_t Cache::Impl::trim(Tenant& t, bool by_host) {
  constexpr uint64_t kBatch = 64;  // per hold of the list lock
  uint64_t total = 0;
  for (int i = 0; i < numa; ++i) {
    ViewList& list = t.lists[static_cast<size_t>(i)];
    for (;;) {
      uint64_t gone = 0;
      {
        std::lock_guard guard(list.lock);
        const uint64_t cap = list.capacity(), have = list.pages();
        if (have > cap) gone = evict(t, list, std::min(kBatch, have - cap));
      }
      if (gone == 0) break;
      uncharge(t, i, gone);
      total += gone;
    }
  }
  (by_host ? t.reclaimed : t.evicted).fetch_add(total, std::memory_order_relaxed);
  if (by_host) reclaimed.fetch_add(total, std::memory_order_relaxed);
  return total;
}

uint64_t Cache::Impl::pressure(Tenant& t, double fraction) {
  constexpr uint32_t kScaleMin = Tenant::kScaleOne / 256;
  fraction = std::clamp(fraction, 0.0, 1.0);
  grow_back(t);
  if (mutant == Mutant::kShrinkByUsage) {
    uint64_t usage = 0;
    {
      std::lock_guard guard(mutex_);
      for (auto& o : tenants_) usage += o->pages(numa);
    }
    const uint64_t capacity = capacity_bytes.load() / kPageSize;
    const auto target = static_cast<double>(t.pages(numa)) * fraction * static_cast<double>(usage) /
                        static_cast<double>(capacity);
    uint64_t gone = 0;
    ViewList& list = t.lists[0];
    {
      std::lock_guard guard(list.lock);
      gone = evict(t, list, static_cast<uint64_t>(target));
    }
    uncharge(t, 0, gone);
    return gone;
  }
  {
    std::lock_guard guard(mutex_);
    const auto scaled = static_cast<uint32_t>(static_cast<double>(t.scale.load()) * (1.0 - fraction));
    t.scale.store(std::max(scaled, kScaleMin), std::memory_order_relaxed);
    t.scale_time_ns.store(now_ns(), std::memory_order_relaxed);
    apply_capacity(t);
  }
  return trim(t, true);
}

// Adopted pages go back into the views that had them, as far as the tenant's capacity reaches, in the order of nodes and
// pages: which frames they lie in depends on others.
void Cache::Impl::claim(Tenant& t) {
  if (t.bit == FrameStore::kNoTenant) return;
  std::vector<std::tuple<uint32_t, uint64_t, FrameId>> mine;
  store->scan([&](FrameId f, uint32_t slot, uint64_t page, bool, uint64_t views) {
    if ((views >> t.bit & 1) != 0) mine.emplace_back(slot, page, f);
  });
  std::sort(mine.begin(), mine.end());
  for (const auto& [slot, page, f] : mine) {
    Node* n = nullptr;
    {
      std::lock_guard guard(mutex_);
      auto it = by_key_.find(store->node_key(slot));
      if (it == by_key_.end()) continue;
      n = it->second;
    }
    DirtySet* set = nullptr;
    const uint32_t s = view_slot(*n, t, &set);
    const uint64_t number = page / kLeafPages;
    const unsigned i = page % kLeafPages;
    const int nn = numa_of(number);
    ViewList& list = t.lists[static_cast<size_t>(nn)];
    if (list.pages() >= list.capacity()) continue;
    reclaim::ChargeOptions o;
    o.node = nn;
    o.may_block = false;
    if (!t.group->try_charge(kPageSize, o)) break;
    bool taken = false;
    {
      std::lock_guard guard(list.lock);
      if (Leaf* leaf = n->index.lock(number)) {
        if (leaf->at(i) == f) {
          ViewChunk* c = chunk_of(*leaf, s, list);
          if (!c->has(i)) {
            list.insert(*c, i, false);
            join_view(*leaf, i, f, t);
            taken = true;
          }
        }
        n->index.unlock(leaf);
      }
    }
    if (!taken) uncharge(t, nn, 1);
  }
  for (int i = 0; i < numa; ++i)
    if (t.lists[static_cast<size_t>(i)].pages() != 0) shrinker.set_bit(*t.group, i);
}

// Clean adopted pages that nobody claimed are in no view and are charged to nobody.
void Cache::Impl::drop_unclaimed() {
  if (unclaimed.load(std::memory_order_relaxed) == 0) return;
  store->scan([&](FrameId f, uint32_t slot, uint64_t page, bool, uint64_t) {
    Node* n = nullptr;
    {
      std::lock_guard guard(mutex_);
      auto it = by_key_.find(store->node_key(slot));
      if (it == by_key_.end()) return;
      n = it->second;
    }
    Leaf* leaf = n->index.lock(page / kLeafPages);
    if (leaf == nullptr) return;
    const unsigned i = page % kLeafPages;
    if (leaf->at(i) == f && store->frame(f).unclaimed) {
      store->frame(f).unclaimed = false;
      unclaimed.fetch_sub(1, std::memory_order_relaxed);
      settle(*leaf, i, f);
    }
    n->index.unlock(leaf);
  });
}

void Cache::Impl::note_peak() {
  const uint64_t now = store->in_use();
  uint64_t was = peak.load(std::memory_order_relaxed);
  while (now > was && !peak.compare_exchange_weak(was, now, std::memory_order_relaxed)) {
  }
}

// Frames freed by discards and detached tenants; what a tenant frees for its own next miss is reused at once.
void Cache::Impl::punch_if_many() {
  const uint64_t keep = std::max<uint64_t>(256, capacity_bytes.load(std::memory_order_relaxed) / kPageSize / 64);
  if (options.background == nullptr || store->warm() < 2 * keep || closing.load(std::memory_order_acquire)) return;
  if (punching.exchange(true, std::memory_order_acq_rel)) return;
  background_tasks.add();
  options.background->post([this, keep] {
    store->punch(keep);
    punching.store(false, std::memory_order_release);
    background_tasks.done();
  });
}

// Misses take frames that are backed already, and the background backs more when they get few: else a miss after a page
// that another tenant had too (its frame comes back at once) would be faster than one after a page that nobody had, which
// tells the two apart (./bench leak found it). How far it fills up is random, so that when it does tells little.
void Cache::Impl::refill_if_few() {
  const uint64_t low = std::clamp<uint64_t>(capacity_bytes.load(std::memory_order_relaxed) / kPageSize / 64, 8, 256);
  if (options.background == nullptr || !store->wants_refill(low) || closing.load(std::memory_order_acquire)) return;
  if (refilling.exchange(true, std::memory_order_acq_rel)) return;
  background_tasks.add();
  options.background->post([this, low] {
    store->refill(2 * low + refill_random() % (2 * low));
    refilling.store(false, std::memory_order_release);
    background_tasks.done();
  });
}

// ---- the shrinker --------------------------------------------------------------------------------------------------

static Tenant* find_tenant(Cache::Impl& c, const reclaim::MemoryGroup& g) {
  std::lock_guard guard(c.mutex_);
  for (auto& t : c.tenants_)
    if (t->serial == g.serial() && !t->dead.load(std::memory_order_relaxed)) return t.get();
  return nullptr;
}

reclaim::CountReport Cache::Impl::count(const reclaim::ScanRequest& r) {
  Tenant* t = find_tenant(*this, *r.group);
  if (t == nullptr || r.node >= numa) return reclaim::CountReport::empty();
  const uint64_t pages = t->lists[static_cast<size_t>(r.node)].pages();
  const uint64_t dirty = r.node == 0 ? t->dirty.load(std::memory_order_relaxed) * kPageSize : 0;
  if (pages == 0 && dirty == 0) return reclaim::CountReport::empty();
  return {pages, pages * kPageSize, dirty, false};
}

// The group asked for more than its own limit, an operator or the end of the group: its pages go, as many as asked.
// Host pressure: `nr_to_scan` of the pages there are is taken as a fraction, and the *entitlement* goes down by it, so
// that what a tenant loses follows from the pressure and its share, not from what it or others hold (P4).
reclaim::ScanReport Cache::Impl::scan(const reclaim::ScanRequest& r) {
  reclaim::ScanReport out;
  Tenant* t = find_tenant(*this, *r.group);
  if (t == nullptr || r.node >= numa) {
    out.status = reclaim::ScanStatus::kEmpty;
    return out;
  }
  ViewList& list = t->lists[static_cast<size_t>(r.node)];
  const uint64_t before_frames = store->in_use();
  const uint64_t pages = list.pages();
  const bool own = r.reason == reclaim::Reason::kDirect || r.reason == reclaim::Reason::kManual ||
                   r.reason == reclaim::Reason::kOffline;
  uint64_t gone = 0;
  out.scanned = std::max<uint64_t>(1, r.nr_to_scan);
  if (own) {
    {
      std::lock_guard guard(list.lock);
      gone = evict(*t, list, r.nr_to_scan);
    }
    uncharge(*t, r.node, gone);
    t->evicted.fetch_add(gone, std::memory_order_relaxed);
    reclaimed.fetch_add(gone, std::memory_order_relaxed);
    out.freed_bytes = gone * kPageSize;
  } else if (pages != 0) {
    drop_unclaimed();
    gone = pressure(*t, std::min(1.0, static_cast<double>(r.nr_to_scan) / static_cast<double>(pages)));
    const uint64_t now = store->in_use();
    out.freed_bytes = now < before_frames ? (before_frames - now) * kPageSize : 0;  // shared pages stay: physical
  }
  out.freed_objects = std::min(gone, out.scanned);
  out.not_freed_dirty = std::min(out.scanned - out.freed_objects, t->dirty.load(std::memory_order_relaxed));
  out.not_freed_referenced = out.scanned - out.freed_objects - out.not_freed_dirty;
  if (out.freed_bytes > 0) store->punch(0);
  if (list.pages() == 0) out.status = reclaim::ScanStatus::kEmpty;
  return out;
}

void Cache::Impl::group_offline(reclaim::MemoryGroup& child, reclaim::MemoryGroup&) {
  std::vector<std::shared_ptr<Volume>> volumes;
  Tenant* t = nullptr;
  {
    std::lock_guard guard(mutex_);
    for (auto& w : volumes_)
      if (auto v = w.lock()) volumes.push_back(std::move(v));
    for (auto& have : tenants_)
      if (have->serial == child.serial() && !have->dead.load(std::memory_order_relaxed)) t = have.get();
    if (t != nullptr) t->dead.store(true, std::memory_order_release);
  }
  // Later requests with the old number bind anew; ids are reused, serials are not.
  for (auto& v : volumes) static_cast<FilterVolume&>(*v).unbind(static_cast<GroupId>(child.id()));
  if (t == nullptr) return;
  forget_view(*t);
  punch_if_many();
}

// ---- reports -------------------------------------------------------------------------------------------------------

CacheStats Cache::stats() const {
  Impl& c = *impl_;
  CacheStats s;
  s.capacity_bytes = capacity();
  s.resident_bytes = c.store->in_use() * kPageSize;
  s.backed_bytes = c.store->backed_bytes();
  s.dirty_bytes = c.dirty_total.load(std::memory_order_relaxed) * kPageSize;
  s.peak_bytes = std::max(c.peak.load(std::memory_order_relaxed) * kPageSize, s.resident_bytes);
  s.reclaimed_bytes = c.reclaimed.load(std::memory_order_relaxed) * kPageSize;
  s.punched_bytes = c.store->punched_bytes();
  s.adopted_pages = c.adopted.load(std::memory_order_relaxed);
  s.adopted_dirty_pages = c.adopted_dirty.load(std::memory_order_relaxed);
  s.writeback_bytes = c.wb_bytes.load(std::memory_order_relaxed);
  s.writeback_requests = c.wb_requests.load(std::memory_order_relaxed);
  s.writeback_errors = c.wb_errors.load(std::memory_order_relaxed);
  s.merged_resident = c.merged.load(std::memory_order_relaxed);
  s.bypassed = c.bypassed.load(std::memory_order_relaxed);
  s.frame_shortage = c.shortage.load(std::memory_order_relaxed);
  std::lock_guard guard(c.mutex_);
  for (auto& t : c.tenants_) {
    CacheTenantStats ts;
    ts.group = t->group->id();
    ts.name = t->name;
    for (auto& k : t->counters) {
      ts.hits += k.hits.load(std::memory_order_relaxed);
      ts.misses += k.misses.load(std::memory_order_relaxed);
      s.joined_misses += k.joined.load(std::memory_order_relaxed);
      s.read_ahead += k.read_ahead.load(std::memory_order_relaxed);
    }
    ts.view_bytes = t->pages(c.numa) * kPageSize;
    for (int i = 0; i < c.numa; ++i) {
      ViewList& list = t->lists[static_cast<size_t>(i)];
      ts.entitlement_bytes += list.capacity() * kPageSize;
      std::lock_guard list_guard(list.lock);
      s.view_metadata_bytes += list.chunks() * (sizeof(ViewChunk) + 16 + sizeof(void*));
    }
    ts.dirty_bytes = t->dirty.load(std::memory_order_relaxed) * kPageSize;
    ts.dirty_max_bytes = t->dirty_max.load(std::memory_order_relaxed) * kPageSize;
    ts.evicted_bytes = t->evicted.load(std::memory_order_relaxed) * kPageSize;
    ts.reclaimed_bytes = t->reclaimed.load(std::memory_order_relaxed) * kPageSize;
    s.hits += ts.hits;
    s.misses += ts.misses;
    s.view_bytes += ts.view_bytes;
    if (!t->dead.load(std::memory_order_relaxed)) s.tenants.push_back(std::move(ts));
  }
  s.metadata_bytes = s.view_metadata_bytes;
  for (auto& n : c.nodes_) {
    s.metadata_bytes += n->index.heap_bytes();
    CacheNodeStats ns;
    ns.key = n->key;
    ns.resident_bytes = n->resident.load(std::memory_order_relaxed) * kPageSize;
    ns.dirty_bytes = n->dirty.load(std::memory_order_relaxed) * kPageSize;
    std::lock_guard node_guard(n->mutex);
    ns.views = static_cast<uint32_t>(n->views.size());
    s.nodes.push_back(std::move(ns));
  }
  s.hit_ratio = s.hits + s.misses == 0 ? 0 : static_cast<double>(s.hits) / static_cast<double>(s.hits + s.misses);
  return s;
}

std::string Cache::to_text() const {
  const CacheStats s = stats();
  std::string out = fmt::format(
      "capacity: {}\nresident: {} (peak {}), backed by {}\nviews: {}\ndirty: {}\nhits: {}  misses: {}  ratio: {:.3f}\n"
      "first accesses to resident pages: {}  joined misses: {}  read ahead: {} pages\n"
      "reclaimed: {}  given back to the kernel: {}\nwriteback: {} in {} requests, {} errors\n"
      "adopted: {} pages, {} dirty\nserved around the cache: {} ({} for want of frames)\nmetadata: {}\n",
      format_size(s.capacity_bytes), format_size(s.resident_bytes), format_size(s.peak_bytes),
      format_size(s.backed_bytes), format_size(s.view_bytes), format_size(s.dirty_bytes), s.hits, s.misses,
      s.hit_ratio, s.merged_resident, s.joined_misses, s.read_ahead, format_size(s.reclaimed_bytes),
      format_size(s.punched_bytes), format_size(s.writeback_bytes), s.writeback_requests, s.writeback_errors,
      s.adopted_pages, s.adopted_dirty_pages, s.bypassed, s.frame_shortage, format_size(s.metadata_bytes));
  for (auto& t : s.tenants)
    out += fmt::format("tenant {}: view {} of {}, dirty {} of {}, hits {} misses {}, evicted {}, reclaimed {}\n",
                       t.name, format_size(t.view_bytes), format_size(t.entitlement_bytes),
                       format_size(t.dirty_bytes), format_size(t.dirty_max_bytes), t.hits, t.misses,
                       format_size(t.evicted_bytes), format_size(t.reclaimed_bytes));
  for (auto& n : s.nodes)
    out += fmt::format("node {}: resident {}, dirty {}, views {}\n", n.key, format_size(n.resident_bytes),
                       format_size(n.dirty_bytes), n.views);
  return out;
}

Task<Status> Cache::flush_all() { return impl_->flush_everything(); }

Task<Status> Cache::close() {
  Status s = co_await impl_->flush_everything();
  co_await impl_->stop_background();
  co_return s;
}

}  // namespace spillway
