// ListLru: one list per (group, node), made when the first object comes.
//
// Where a list is: leaves_[group id / 256] -> list[(id % 256) * nodes + node]. Ids are reused only after
// the last reference to the old group is gone, so a caller with a reference never meets a successor's list.
//
// Where an object is. The rule: it is on the first list, from its group upwards, that is there and not dead;
// so del finds the lock of the list that add has chosen, also while the group goes. What keeps the rule:
//
//   1 A list never becomes not-dead again, and an empty slot never gets a list once somebody has gone past it:
//     - no memory for a list: `elsewhere`, a list that is dead for ever, takes the slot (or the leaf);
//     - the group is dead (looked at before the slot, seq_cst): nobody makes a list any more. Somebody who
//       had looked before may still install his (seq_cst), but every one who locks it looks at `dead` again.
//   2 Under the lock of a list whose group is dead:
//       empty     -> it is marked dead now, and everybody goes to the parent;
//       not empty -> group_offline has not come yet and will take the objects along: it is still the place.
//     A list that group_offline missed, because it was installed after its look, is empty when it is locked
//     for the first time, as its installer and all others see `dead` then; it is taken out again at once.
//
// Order in group_offline (weakness 3): drain under both locks, mark dead, then erase the lookup entry; the
// memory goes after a grace period. Child before parent; a list's group is deeper than the one it is moved
// to, so there is no circle.
#include "spillway/reclaim/list_lru.h"

#include <utility>

#include "src/reclaim/internal.h"

namespace spillway::reclaim {

namespace {
constexpr std::uint32_t kLeaf = 256;

struct alignas(64) List : RcuObject<List, Destroy<List>> {
  Mutex m;
  LruItem head;  // guarded by m; head.next = oldest
  bool dead;  // guarded by m
  std::atomic<std::uint64_t> items{0}, bytes{0};  // written under m, read anywhere
  explicit List(bool is_dead = false) : dead(is_dead) { head.prev = head.next = &head; }
  bool empty() const noexcept { return head.next == &head; }  // under m
};

/// Stands in a slot whose group's objects are at the parent, for want of memory.
List* elsewhere() noexcept {
  static List l(true);
  return &l;
}

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
    RcuPtr<List>* lists = nullptr;  // null in no_leaf_ only
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
  Leaf no_leaf;  // `elsewhere` for a whole leaf

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
      List* l = make_list(0, n);
      if (l == nullptr || l == elsewhere()) throw std::bad_alloc();
    }
  }
  ~Impl() {
    for (std::uint32_t i = 0; i < nleaves; ++i) {
      Leaf* l = leaves[i].load();
      if (l == nullptr || l == &no_leaf) continue;
      for (std::uint32_t k = 0; k < l->n; ++k) {
        if (List* list = l->lists[k].load(); list != elsewhere()) destroy(list);
      }
      destroy(l);
    }
    release(leaves, nleaves * sizeof(RcuPtr<Leaf>));
  }

  RcuPtr<List>* slot(std::uint32_t group, std::uint32_t node) const noexcept {
    Leaf* l = leaves[group / kLeaf].load(std::memory_order_seq_cst);
    return l != nullptr && l->lists != nullptr ? &l->lists[group % kLeaf * nodes + node] : nullptr;
  }
  List* find(std::uint32_t group, std::uint32_t node) const noexcept {  // under RCU
    RcuPtr<List>* s = slot(group, node);
    return s != nullptr ? s->load(std::memory_order_seq_cst) : nullptr;
  }
  Leaf* make_leaf() const noexcept {
    Leaf* l = make<Leaf>();
    if (l == nullptr) return nullptr;
    l->n = kLeaf * nodes;
    l->lists = static_cast<RcuPtr<List>*>(allocate(l->n * sizeof(RcuPtr<List>)));
    if (l->lists == nullptr) {
      destroy(l);
      return nullptr;
    }
    for (std::uint32_t i = 0; i < l->n; ++i) new (&l->lists[i]) RcuPtr<List>();
    return l;
  }
  /// What is in the slot afterwards; null when the whole leaf is `elsewhere`.
  List* make_list(std::uint32_t group, std::uint32_t node) noexcept {
    RcuPtr<Leaf>& at = leaves[group / kLeaf];
    if (Leaf* have = at.load(); have == nullptr) {
      Leaf* fresh = make_leaf();
      if (!at.compare_exchange(have, fresh != nullptr ? fresh : &no_leaf)) destroy(fresh);
    }
    RcuPtr<List>* s = slot(group, node);
    if (s == nullptr) return nullptr;
    List* have = s->load();
    if (have != nullptr) return have;
    List* fresh = make<List>();
    if (s->compare_exchange(have, fresh != nullptr ? fresh : elsewhere())) return fresh != nullptr ? fresh : elsewhere();
    destroy(fresh);
    return have;
  }

  std::uint32_t node_of(int node) const noexcept {
    return node >= 0 && static_cast<std::uint32_t>(node) < nodes ? static_cast<std::uint32_t>(node) : 0;
  }

  /// Locks the list where objects of `g` are now, by the rule above; `owner` is the group whose list it is.
  /// `create`: make one if there is none yet. Null: there is none. Under RCU (blocking on a list lock is short;
  /// lists are freed after a grace period).
  List* lock_list(MemoryGroup& g, std::uint32_t node, bool create, MemoryGroup*& owner) noexcept {
    for (MemoryGroup* p = &g; p != nullptr; p = p->parent()) {
      const bool dead = p->dead();  // before the look at the slot
      List* l = find(p->id(), node);
      if (l == nullptr && create && !dead) l = make_list(p->id(), node);
      if (l == nullptr) continue;
      l->m.lock();
      if (!l->dead && p->dead() && l->empty()) l->dead = true;
      if (!l->dead) {
        owner = p;
        return l;
      }
      l->m.unlock();
      if (p->dead()) forget(p->id(), node, l);  // the next group of this id must not find it
    }
    return nullptr;
  }

  /// Takes a dead list out of its slot, once. Under RCU.
  void forget(std::uint32_t group, std::uint32_t node, List* l) noexcept {
    RcuPtr<List>* s = slot(group, node);
    List* const was = l;
    if (s != nullptr && s->compare_exchange(l, nullptr) && was != elsewhere()) was->retire();
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

// Under the list's lock and RCU throughout: `isolate` must not block, and a call is bounded by nr_to_scan. When
// the objects of the request's group have moved to the parent, they are the parent's to scan: nothing here.
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
    MemoryGroup* owner = nullptr;
    bool moved = false;
    {
      RcuGuard guard;
      List* from = impl_->find(child.id(), n);  // after the store of `dead`; partner: make_list
      if (from == nullptr) continue;
      from->m.lock();
      if (!from->empty()) {
        moved = true;
        List* to = impl_->lock_list(parent, n, true, owner);
        LruItem *first = from->head.next, *last = from->head.prev;
        first->prev = to->head.prev;
        to->head.prev->next = first;
        last->next = &to->head;
        to->head.prev = last;
        from->head.prev = from->head.next = &from->head;
        account(*to, static_cast<std::int64_t>(from->items.exchange(0, std::memory_order_relaxed)),
                static_cast<std::int64_t>(from->bytes.exchange(0, std::memory_order_relaxed)));
        to->m.unlock();
      }
      from->dead = true;
      from->m.unlock();
      impl_->forget(child.id(), n, from);
    }
    if (moved) {
      if (Shrinker* s = impl_->shrinker.load(std::memory_order_acquire)) s->set_bit(*owner, static_cast<int>(n));
    }
  }
}

}  // namespace spillway::reclaim
