// Bits and deferred work of a (group, node).
//
// Empty protocol. Two sides, and one rule at every level of the tree of bits
// (unit.map -> block.summary -> info.summary -> active -> active_summary):
//
//   adder   A1 object visible   A2 set lower bit (RMW)   A3 look at the upper one, set it if clear
//   walker  W1 clear upper bit (RMW)   W2 look at the lower one   W3 set upper again if not empty
//
// All of A2, A3, W1, W2 are seq_cst. Either A3 comes after W1 in their total order, then the adder
// sets the bit again; or W1 comes after A3, then W2 comes after A2 and sees the lower bit. At the
// lowest level "lower" is the cache's own count: A1 is made visible by the fence in set_bit, W2 is
// the second call of `count`, after the fence in walk.cc (clear_and_recheck).
// Model: tests/reclaim/spin/empty_bit.pml, summary.pml. Litmus: tests/reclaim/litmus.
//
// Why every access to a cell is coherent (S5): a Unit is installed once by compare-exchange, is
// never copied or replaced, and is freed with the group; so there is one cell per (group, node, id),
// whoever looks, whenever, and all changes to it are atomic read-modify-writes.
#include "src/reclaim/internal.h"

namespace spillway::reclaim {

Block::~Block() {
  for (auto& u : units) destroy(u.load());
}
Info::~Info() {
  for (auto& b : blocks) destroy(b.load());
}

namespace {
// Installs by compare-exchange; the loser frees its own. Null only when memory is short.
template <class T>
T* get_or_install(RcuPtr<T>& p) noexcept {
  T* have = p.load();
  if (have != nullptr) return have;
  T* fresh = make<T>();
  if (fresh == nullptr) return nullptr;
  if (p.compare_exchange(have, fresh)) return fresh;
  destroy(fresh);
  return have;
}

constexpr auto kSc = std::memory_order_seq_cst;

void set_if_clear(Atomic<std::uint64_t>& word, std::uint64_t bit) noexcept {
  if ((word.load(kSc) & bit) == 0) word.fetch_or(bit, kSc);
}
}  // namespace

Unit* Registry::Impl::find_unit(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  Info* i = GroupAccess::state(g).info[node].load();
  if (i == nullptr) return nullptr;
  Block* b = i->blocks[block_of(id)].load();
  return b != nullptr ? b->units[unit_of(id)].load() : nullptr;
}

Unit* Registry::Impl::make_unit(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  Info* i = get_or_install(GroupAccess::state(g).info[node]);
  if (i == nullptr) return nullptr;
  Block* b = get_or_install(i->blocks[block_of(id)]);
  return b != nullptr ? get_or_install(b->units[unit_of(id)]) : nullptr;
}

// Upper levels after a lower bit was set (A3) or found set again (W3).
void Registry::Impl::propagate(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  Info* i = GroupAccess::state(g).info[node].load();
  Block* b = i->blocks[block_of(id)].load();
  set_if_clear(b->summary, mask(unit_of(id)));
  set_if_clear(i->summary, mask(block_of(id)));
  mark_active(g, node);
}

void Registry::Impl::mark_active(MemoryGroup& g, int node) noexcept {
  NodeState& n = nodes[node];
  const std::uint32_t word = g.id() / 64;
  set_if_clear(n.active[word], mask(g.id() % 64));
  set_if_clear(n.active_summary[word / 64], mask(word % 64));
}

// The group's id goes back to the pool: nobody has a reference, so nobody can set bits.
void Registry::Impl::clear_active(std::uint32_t group_id) noexcept {
  for (int n = 0; n < opt.nodes; ++n) {
    nodes[n].active[group_id / 64].fetch_and(~mask(group_id % 64), kSc);
  }
}

void Registry::Impl::set_bit(MemoryGroup& g, int node, std::uint32_t id) noexcept {
  MemoryGroup* p = &g;
  for (;;) {
    auto& st = GroupAccess::state(*p);
    Unit* u = make_unit(*p, node, id);
    if (u == nullptr) {
      // No memory for the bit: the group is walked over all registered shrinkers from now on.
      st.overflow[node].store(1, kSc);
      mark_active(*p, node);
    } else {
      const std::uint64_t bit = mask(bit_of(id));
#if defined(SPILLWAY_TSAN)
      u->map.fetch_or(bit, kSc);  // the tool does not see fences; the read-modify-write it does
#else
      std::atomic_thread_fence(kSc);  // A1 before A2/A3; partner: the fence in clear_and_recheck
      if ((u->map.load(std::memory_order_relaxed) & bit) == 0) u->map.fetch_or(bit, kSc);
#endif
      propagate(*p, node, id);
    }
    // Partner: the store of `dead` in remove_group, which is followed by move_up reading the bits.
    // Either move_up sees our bit, or we see `dead` and announce to the parent ourselves.
    if (st.dead.load(kSc) == 0 || p->parent() == nullptr) return;
    p = p->parent();
  }
}

// ---------------------------------------------------------------- deferred work

std::uint64_t Registry::Impl::claim_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s) noexcept {
  Unit* u = find_unit(g, node, s.id);
  if (u == nullptr) return 0;
  auto& cell = u->deferred[bit_of(s.id)];
  std::uint64_t v = cell.load(std::memory_order_relaxed);
  const std::uint64_t zero = std::uint64_t{s.generation} << kWorkBits;
  for (;;) {
    if (v == zero || v == 0 || (v & kWorkMask) == kDeadWork) return 0;
    if (cell.compare_exchange_weak(v, zero, std::memory_order_acq_rel, std::memory_order_relaxed)) {
      return (v >> kWorkBits) == s.generation ? v & kWorkMask : 0;
    }
  }
}

std::uint64_t Registry::Impl::read_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s) noexcept {
  Unit* u = find_unit(g, node, s.id);
  if (u == nullptr) return 0;
  const std::uint64_t v = u->deferred[bit_of(s.id)].load(std::memory_order_relaxed);
  if ((v >> kWorkBits) != s.generation || (v & kWorkMask) == kDeadWork) return 0;
  return v & kWorkMask;
}

// Adds, saturating at `cap`; in a dead group to the parent, exactly once: either the cell was not
// yet dead when our compare-exchange succeeded, then whoever marks it dead takes our work along; or
// it was, then nothing was added here. A cell whose unit was installed after move_up had passed is
// found by the look at `dead` afterwards.
void Registry::Impl::add_deferred(MemoryGroup& g, int node, const ShrinkerImpl& s, std::uint64_t work,
                                  std::uint64_t cap) noexcept {
  cap = std::min(cap, kWorkMax);
  for (MemoryGroup* p = &g; p != nullptr && work != 0; p = p->parent()) {
    Unit* u = make_unit(*p, node, s.id);
    if (u == nullptr) return;  // no memory: the work is forgotten, the objects are not
    auto& cell = u->deferred[bit_of(s.id)];
    std::uint64_t v = cell.load(std::memory_order_relaxed);
    bool dead = false;
    for (;;) {
      if ((v & kWorkMask) == kDeadWork) {
        dead = true;
        break;
      }
      const std::uint64_t old = (v >> kWorkBits) == s.generation ? v & kWorkMask : 0;
      const std::uint64_t sum = std::max(old, std::min(old + std::min(work, kWorkMax), cap));
      if (cell.compare_exchange_weak(v, std::uint64_t{s.generation} << kWorkBits | sum,
                                     std::memory_order_seq_cst, std::memory_order_relaxed)) {
        break;
      }
    }
    if (!dead) {
      if (GroupAccess::state(*p).dead.load(kSc) != 0 && p->parent() != nullptr) {
        move_deferred_cell(*p, node, s.id, *u);
      }
      return;
    }
  }
}

// Marks the cell dead and hands its work to the parent. Exactly once by the exchange: a second
// caller gets kDeadWork.
void Registry::Impl::move_deferred_cell(MemoryGroup& child, int node, std::uint32_t id,
                                        Unit& u) noexcept {
  const std::uint64_t v = u.deferred[bit_of(id)].exchange(kDeadWork, kSc);
  const std::uint64_t work = v & kWorkMask;
  if (work == 0 || work == kDeadWork) return;
  // A reference, so that the id can not change hands between the look and the add.
  ShrinkerRef s = get(id);
  if (!s || s->generation != v >> kWorkBits) return;
  add_deferred(*child.parent(), node, *s, work, kWorkMax);
}

// Reads pointers, bits and cells after the store of `dead`: the fence here pairs with the one in set_bit (which
// comes after make_unit) and with the seq_cst installation of units, so a unit that is missed here has an
// installer who sees `dead`.
void Registry::Impl::move_up(MemoryGroup& child, MemoryGroup& parent) noexcept {
  auto& st = GroupAccess::state(child);
  std::atomic_thread_fence(kSc);
  for (int node = 0; node < opt.nodes; ++node) {
    if (st.overflow[node].load(kSc) != 0) {
      GroupAccess::state(parent).overflow[node].store(1, kSc);
      mark_active(parent, node);
    }
    Info* i = st.info[node].load();
    if (i == nullptr) continue;
    for (std::uint32_t b = 0; b < kFan; ++b) {
      Block* block = i->blocks[b].load();
      if (block == nullptr) continue;
      for (std::uint32_t u = 0; u < kFan; ++u) {
        Unit* unit = block->units[u].load();
        if (unit == nullptr) continue;
        const std::uint32_t base = (b * kFan + u) * kFan;
        std::uint64_t map = unit->map.load(kSc);
        for (; map != 0; map &= map - 1) {
          set_bit(parent, node, base + static_cast<std::uint32_t>(std::countr_zero(map)));
        }
        for (std::uint32_t k = 0; k < kFan; ++k) move_deferred_cell(child, node, base + k, *unit);
      }
    }
  }
}

}  // namespace spillway::reclaim
