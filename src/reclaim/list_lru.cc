// ListLru: one list per (group, node), made when the first object comes.
//
// Where a list is: leaves_[group id / 256] -> list[(id % 256) * nodes + node]. Ids are reused only after
// the last reference to the old group is gone, so a caller with a reference never meets a successor's list.
//
// Dead groups. remove_group stores `dead` (seq_cst), then calls group_offline. An adder locks the list
// of its group and looks at `dead` under that lock:
//   not dead -> its insertion is done before group_offline gets the lock, which then moves it along;
//   dead     -> it goes to the parent.
// A list that is installed late (after group_offline looked and found none) is harmless: its installer
// stored the pointer (seq_cst) before it looked at `dead`, so if group_offline missed the list the
// installer sees `dead`. Order in group_offline (weakness 3): drain under both locks, mark dead, then
// erase the lookup entry; the memory goes after a grace period.
#include "spillway/reclaim/list_lru.h"

#include <utility>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

namespace {
constexpr std::uint32_t kLeaf = 256;

struct alignas(64) List : RcuObject<List, Destroy<List>> {
  Mutex m;
  LruItem head;  // guarded by m; head.next = oldest
  bool dead = false;  // guarded by m
  std::atomic<std::uint64_t> items{0}, bytes{0};  // written under m, read anywhere
  List() { head.prev = head.next = &head; }
};

void link_young(List& l, LruItem& i) noexcept {
  i.prev = l.head.prev;
  i.next = &l.head;
  l.head.prev->next = &i;
  l.head.prev = &i;
}
void unlink(LruItem& i) noexcept {
  i.prev->next = i.next;
  i.next->prev = i.prev;
  i.prev = i.next = nullptr;
}
void account(List& l, std::int64_t items, std::int64_t bytes) noexcept {
  l.items.fetch_add(static_cast<std::uint64_t>(items), std::memory_order_relaxed);
  l.bytes.fetch_add(static_cast<std::uint64_t>(bytes), std::memory_order_relaxed);
}
}  // namespace

struct ListLru::Impl {
  struct Leaf {
    RcuPtr<List>* lists = nullptr;
    std::uint32_t n = 0;
    ~Leaf() {
      if (lists != nullptr) release(lists, n * sizeof(RcuPtr<List>));
    }
  };
  Registry& registry;
  std::uint32_t nodes;
  std::atomic<Shrinker*> shrinker{nullptr};
  RcuPtr<Leaf>* leaves = nullptr;
  std::uint32_t nleaves = 0;

  Impl(Registry& r, std::nullptr_t) noexcept
      : registry(r), nodes(static_cast<std::uint32_t>(r.options().nodes)) {}
  // Delegates, so that the destructor gives back what was made when memory runs out midway.
  explicit Impl(Registry& r) : Impl(r, nullptr) {
    const std::uint32_t wanted = (r.options().max_groups + kLeaf - 1) / kLeaf;
    leaves = static_cast<RcuPtr<Leaf>*>(allocate(wanted * sizeof(RcuPtr<Leaf>)));
    if (leaves == nullptr) throw std::bad_alloc();
    nleaves = wanted;
    for (std::uint32_t i = 0; i < nleaves; ++i) new (&leaves[i]) RcuPtr<Leaf>();
    // The root's lists always exist, so that an adder who gets no memory has somewhere to go.
    for (std::uint32_t n = 0; n < nodes; ++n) {
      if (make_list(0, n) == nullptr) throw std::bad_alloc();
    }
  }
  ~Impl() {
    for (std::uint32_t i = 0; i < nleaves; ++i) {
      Leaf* l = leaves[i].load();
      if (l == nullptr) continue;
      for (std::uint32_t k = 0; k < l->n; ++k) destroy(l->lists[k].load());
      destroy(l);
    }
    release(leaves, nleaves * sizeof(RcuPtr<Leaf>));
  }

  RcuPtr<List>* slot(std::uint32_t group, std::uint32_t node) const noexcept {
    Leaf* l = leaves[group / kLeaf].load();
    return l != nullptr ? &l->lists[group % kLeaf * nodes + node] : nullptr;
  }
  List* find(std::uint32_t group, std::uint32_t node) const noexcept {  // under RCU
    RcuPtr<List>* s = slot(group, node);
    return s != nullptr ? s->load() : nullptr;
  }
  List* make_list(std::uint32_t group, std::uint32_t node) noexcept {
    RcuPtr<Leaf>& at = leaves[group / kLeaf];
    Leaf* l = at.load();
    if (l == nullptr) {
      Leaf* fresh = make<Leaf>();
      if (fresh == nullptr) return nullptr;
      fresh->n = kLeaf * nodes;
      fresh->lists = static_cast<RcuPtr<List>*>(allocate(fresh->n * sizeof(RcuPtr<List>)));
      if (fresh->lists == nullptr) {
        destroy(fresh);
        return nullptr;
      }
      for (std::uint32_t i = 0; i < fresh->n; ++i) new (&fresh->lists[i]) RcuPtr<List>();
      if (at.compare_exchange(l, fresh)) l = fresh;
      else destroy(fresh);
    }
    RcuPtr<List>& s = l->lists[group % kLeaf * nodes + node];
    List* have = s.load();
    if (have != nullptr) return have;
    List* fresh = make<List>();
    if (fresh == nullptr) return nullptr;
    if (s.compare_exchange(have, fresh)) return fresh;
    destroy(fresh);
    return have;
  }

  std::uint32_t node_of(int node) const noexcept {
    return node >= 0 && static_cast<std::uint32_t>(node) < nodes ? static_cast<std::uint32_t>(node) : 0;
  }

  /// Locks the list where objects of `g` are now: its own, or that of the nearest living ancestor.
  /// `create`: make it if there is none. Null: there is none. Under RCU (blocking on a list lock is
  /// short; lists are freed after a grace period). `owner` is the group whose list it is.
  List* lock_list(MemoryGroup& g, std::uint32_t node, bool create, MemoryGroup*& owner) noexcept {
    for (MemoryGroup* p = &g;;) {
      const bool last = p->parent() == nullptr;
      List* l = find(p->id(), node);
      if (l == nullptr && create && !p->dead()) l = make_list(p->id(), node);
      if (l != nullptr) {
        l->m.lock();
        if (!l->dead && (last || !create || !p->dead())) {
          owner = p;
          return l;
        }
        l->m.unlock();
        // Dead, or about to be drained: the parent. A `del` finds it there once it was moved.
      } else if (!create && !p->dead()) {
        // No list because there was no memory for one: its objects went up at once.
        if (last) return nullptr;
      }
      if (last) return nullptr;
      p = p->parent();
    }
  }
};

ListLru::ListLru(Registry& registry, Shrinker* shrinker) : impl_(std::make_unique<Impl>(registry)) {
  impl_->shrinker.store(shrinker, std::memory_order_release);
  registry.add_observer(*this);
}
ListLru::~ListLru() {
  impl_->registry.remove_observer(*this);
  rcu_barrier();
}
void ListLru::attach(Shrinker* shrinker) noexcept {
  impl_->shrinker.store(shrinker, std::memory_order_release);
}

bool ListLru::add(LruItem& item, MemoryGroup& group, int node, std::uint64_t bytes) noexcept {
  const std::uint32_t n = impl_->node_of(node);
  MemoryGroup* owner = nullptr;
  bool first;
  {
    RcuGuard guard;
    List* l = impl_->lock_list(group, n, true, owner);
    if (item.linked()) {
      l->m.unlock();
      return false;
    }
    link_young(*l, item);
    first = l->items.load(std::memory_order_relaxed) == 0;
    account(*l, 1, static_cast<std::int64_t>(bytes));
    l->m.unlock();
  }
  // Only 0 -> 1 needs the bit: while there are objects, no walk gets EMPTY from count.
  if (first) {
    if (Shrinker* s = impl_->shrinker.load(std::memory_order_acquire)) s->set_bit(*owner, static_cast<int>(n));
  }
  return true;
}

// The item's list may change while we look for it (its group is removed): then its lock tells, as the
// list that held it is dead, and the next one up is tried.
bool ListLru::del(LruItem& item, MemoryGroup& group, int node, std::uint64_t bytes) noexcept {
  const std::uint32_t n = impl_->node_of(node);
  MemoryGroup* owner = nullptr;
  RcuGuard guard;
  List* l = impl_->lock_list(group, n, false, owner);
  if (l == nullptr) return false;
  const bool on = item.linked();
  if (on) {
    unlink(item);
    account(*l, -1, -static_cast<std::int64_t>(bytes));
  }
  l->m.unlock();
  return on;
}

bool ListLru::touch(LruItem& item, MemoryGroup& group, int node) noexcept {
  MemoryGroup* owner = nullptr;
  RcuGuard guard;
  List* l = impl_->lock_list(group, impl_->node_of(node), false, owner);
  if (l == nullptr) return false;
  const bool on = item.linked();
  if (on) {
    unlink(item);
    link_young(*l, item);
  }
  l->m.unlock();
  return on;
}

std::uint64_t ListLru::count(const MemoryGroup& group, int node) const noexcept {
  RcuGuard guard;
  const List* l = impl_->find(group.id(), impl_->node_of(node));
  return l != nullptr ? l->items.load(std::memory_order_relaxed) : 0;
}
std::uint64_t ListLru::bytes(const MemoryGroup& group, int node) const noexcept {
  RcuGuard guard;
  const List* l = impl_->find(group.id(), impl_->node_of(node));
  return l != nullptr ? l->bytes.load(std::memory_order_relaxed) : 0;
}
CountReport ListLru::count(const ScanRequest& r) const noexcept {
  RcuGuard guard;
  const List* l = impl_->find(r.group->id(), impl_->node_of(r.node));
  if (l == nullptr) return CountReport::empty();
  const std::uint64_t items = l->items.load(std::memory_order_relaxed);
  if (items == 0) return CountReport::empty();
  return {items, l->bytes.load(std::memory_order_relaxed), 0, false};
}

void ListLru::Walker::isolate(LruItem& item, std::uint64_t bytes) noexcept {
  unlink(item);
  account(*static_cast<List*>(list_), -1, -static_cast<std::int64_t>(bytes));
  freed_bytes_ += bytes;
}

// Outside of RCU, as isolate may take its time: the list lives because the group of the request does,
// unless the group is removed meanwhile; `dead` (under the lock) then ends the walk, and the memory is
// kept by `hold` below.
ScanReport ListLru::walk(const ScanRequest& r, const IsolateFn& isolate) {
  ScanReport out;
  MemoryGroup* owner = nullptr;
  RcuGuard guard;
  List* l = impl_->lock_list(*r.group, impl_->node_of(r.node), false, owner);
  if (l == nullptr || owner != r.group) {
    if (l != nullptr) l->m.unlock();
    out.status = ScanStatus::kEmpty;
    return out;
  }
  Walker w;
  w.list_ = l;
  // Rotated items go behind the last one that was there at the start, so nothing is seen twice.
  std::uint64_t left = std::min(r.nr_to_scan, l->items.load(std::memory_order_relaxed));
  LruItem* at = l->head.next;
  for (; left != 0 && at != &l->head; --left) {
    LruItem* next = at->next;
    const LruVerdict v = isolate(*at, w);
    ++out.scanned;
    if (v == LruVerdict::kRemoved) {
      ++out.freed_objects;
    } else if (v == LruVerdict::kRotate) {
      unlink(*at);
      link_young(*l, *at);
      ++out.not_freed_referenced;
    } else if (v == LruVerdict::kSkip) {
      ++out.not_freed_busy;
    } else {
      break;
    }
    at = next == &l->head && left > 1 ? l->head.next : next;
    if (at == &l->head) break;
  }
  const bool empty = l->items.load(std::memory_order_relaxed) == 0;
  l->m.unlock();
  out.freed_bytes = w.freed_bytes_;
  if (empty) out.status = ScanStatus::kEmpty;
  return out;
}

void ListLru::group_offline(MemoryGroup& child, MemoryGroup& parent) {
  for (std::uint32_t n = 0; n < impl_->nodes; ++n) {
    RcuPtr<List>* slot = impl_->slot(child.id(), n);
    List* from = slot != nullptr ? slot->load() : nullptr;
    if (from == nullptr) continue;
    MemoryGroup* owner = nullptr;
    bool moved = false;
    {
      RcuGuard guard;
      // Child before parent; a list's group is deeper than the one it is moved to, so no circle.
      from->m.lock();
      List* to = impl_->lock_list(parent, n, true, owner);
      if (from->head.next != &from->head) {
        moved = true;
        LruItem *first = from->head.next, *last = from->head.prev;
        first->prev = to->head.prev;
        to->head.prev->next = first;
        last->next = &to->head;
        to->head.prev = last;
        from->head.prev = from->head.next = &from->head;
        account(*to, static_cast<std::int64_t>(from->items.exchange(0, std::memory_order_relaxed)),
                static_cast<std::int64_t>(from->bytes.exchange(0, std::memory_order_relaxed)));
      }
      from->dead = true;
      to->m.unlock();
      from->m.unlock();
    }
    if (moved) {
      if (Shrinker* s = impl_->shrinker.load(std::memory_order_acquire)) s->set_bit(*owner, static_cast<int>(n));
    }
    slot->store(nullptr);
    from->retire();
  }
}

}  // namespace spillway::reclaim
