#include "src/cache/index.h"

#include <algorithm>

namespace spillway::cache {

using reclaim::RcuGuard;

void Leaf::set_chunk(uint32_t slot, ViewChunk* c) {
  chunks += (c != nullptr ? 1u : 0u) - (chunk(slot) != nullptr ? 1u : 0u);
  if (slot < kInlineViews) {
    chunk0[slot].store(c, std::memory_order_release);
    return;
  }
  const uint32_t i = slot - kInlineViews;
  ViewTable* t = more.load(std::memory_order_relaxed);
  if (t == nullptr || i >= t->size) {
    if (c == nullptr) return;
    auto* wider = new ViewTable(std::max(6u, (i + 1) * 3 / 2));
    if (t != nullptr)
      for (uint32_t k = 0; k < t->size; ++k)
        wider->chunk[k].store(t->chunk[k].load(std::memory_order_relaxed), std::memory_order_relaxed);
    more.store(wider, std::memory_order_release);
    if (t != nullptr) t->retire();
    t = wider;
  }
  t->chunk[i].store(c, std::memory_order_release);
}

Index::~Index() {
  Top* t = top_.load(std::memory_order_relaxed);
  for (uint64_t i = 0; i < t->size; ++i) {
    Mid* m = t->mid[i].load(std::memory_order_relaxed);
    if (m == nullptr) continue;
    for (auto& l : m->leaf)
      if (Leaf* leaf = l.load(std::memory_order_relaxed)) {
        delete leaf->more.load(std::memory_order_relaxed);
        delete leaf;
      }
    delete m;
  }
  delete t;
}

void Index::grow(uint64_t pages) {
  const uint64_t n = std::max<uint64_t>(1, (pages + kLeafPages * kFan - 1) / (kLeafPages * kFan));
  std::lock_guard guard(lock_);
  Top* old = top_.load(std::memory_order_relaxed);
  if (old != nullptr && old->size >= n) return;
  auto* wider = new Top(n);
  if (old != nullptr)
    for (uint64_t i = 0; i < old->size; ++i)
      wider->mid[i].store(old->mid[i].load(std::memory_order_relaxed), std::memory_order_relaxed);
  top_.store(wider, std::memory_order_release);
  if (old != nullptr) old->retire();
}

Leaf* Index::lock(uint64_t number) {
  RcuGuard rcu;  // keeps the leaf until we hold its lock; a leaf whose lock is held and that is not dead stays
  Leaf* l = find(number);
  if (l == nullptr) return nullptr;
  l->lock.lock();
  if (!l->dead) return l;
  l->lock.unlock();
  return nullptr;
}

Leaf* Index::lock_or_make(uint64_t number) {
  for (;;) {
    if (Leaf* l = lock(number)) return l;
    std::lock_guard guard(lock_);
    Top* t = top_.load(std::memory_order_relaxed);
    SPILLWAY_ASSERT(number / kFan < t->size);
    auto& mid = t->mid[number / kFan];
    Mid* m = mid.load(std::memory_order_relaxed);
    if (m == nullptr) {
      m = new Mid;
      mids_.fetch_add(1, std::memory_order_relaxed);
      mid.store(m, std::memory_order_release);
    }
    auto& place = m->leaf[number % kFan];
    Leaf* have = place.load(std::memory_order_relaxed);
    if (have != nullptr) continue;  // somebody was faster (a dead leaf is unlinked under lock_)
    auto* l = new Leaf;
    l->node = node_;
    l->number = number;
    l->lock.lock();
    leaves_.fetch_add(1, std::memory_order_relaxed);
    place.store(l, std::memory_order_release);
    return l;
  }
}

void Index::unlock(Leaf* leaf) {
  if (!leaf->empty()) {
    leaf->lock.unlock();
    return;
  }
  // Lock order is structure before leaf: let go, come back, look again. The RCU section keeps the memory meanwhile.
  RcuGuard rcu;
  const uint64_t number = leaf->number;
  leaf->lock.unlock();
  std::lock_guard guard(lock_);
  leaf->lock.lock();
  if (leaf->dead || !leaf->empty()) {
    leaf->lock.unlock();
    return;
  }
  leaf->dead = true;
  top_.load(std::memory_order_relaxed)
      ->mid[number / kFan]
      .load(std::memory_order_relaxed)
      ->leaf[number % kFan]
      .store(nullptr, std::memory_order_release);
  leaf->lock.unlock();
  leaves_.fetch_sub(1, std::memory_order_relaxed);
  if (ViewTable* t = leaf->more.load(std::memory_order_relaxed)) t->retire();
  leaf->retire();
}

uint64_t Index::next(uint64_t number, uint64_t last) const {
  RcuGuard rcu;
  Top* t = top_.load(std::memory_order_acquire);
  while (number <= last) {
    if (number / kFan >= t->size) return last + 1;
    Mid* m = t->mid[number / kFan].load(std::memory_order_acquire);
    if (m == nullptr) {
      number = (number / kFan + 1) * kFan;
      continue;
    }
    if (m->leaf[number % kFan].load(std::memory_order_acquire) != nullptr) return number;
    ++number;
  }
  return last + 1;
}

uint64_t Index::heap_bytes() const {
  return leaves() * sizeof(Leaf) + mids_.load(std::memory_order_relaxed) * sizeof(Mid);
}

}  // namespace spillway::cache
