#include "src/cache/view.h"

#include <algorithm>

#include "src/base/result.h"

namespace spillway::cache {

using namespace page_state;

namespace {
constexpr unsigned kSmallShare = 10;      // small = capacity / 10
constexpr unsigned kGhostWindow = 6;      // generations of ghosts that still count, each a sixth of the capacity
constexpr unsigned kUsesToPromote = 1;    // uses in small that lead to main (chosen by ./bench cache)

// 0x80 in every byte of `w` that equals `pattern` under `mask`.
uint64_t match_bytes(uint64_t w, uint8_t mask, uint8_t pattern) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  const uint64_t x = (w & (kOnes * mask)) ^ (kOnes * pattern);
  return ~(((x & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | x | 0x7f7f7f7f7f7f7f7f);
}
}  // namespace

unsigned ViewList::Queue::oldest() const {
  for (unsigned k = 1; k <= kGens; ++k)
    if (const unsigned g = (current + k) % kGens; count[g] != 0) return g;
  return current;
}

void ViewList::Queue::advance() {
  if (count[(current + 1) % kGens] != 0) return;  // all generations live: the current one grows
  current = (current + 1) % kGens;
  entered = 0;
}

void ViewList::set_capacity(uint64_t pages) { capacity_.store(pages, std::memory_order_relaxed); }

void ViewList::add_chunk(ViewChunk* c) {
  c->position = static_cast<uint32_t>(slots_.size());
  slots_.push_back({c, 0, 0});
}

void ViewList::remove_chunk(ViewChunk* c) {
  SPILLWAY_ASSERT(c->pages == 0 && slots_[c->position].chunk == c);
  slots_[c->position] = slots_.back();
  slots_[c->position].chunk->position = c->position;
  slots_.pop_back();
  std::erase(dead_, c);
}

bool ViewList::ghost_fresh(uint8_t s) const {
  return (s & kPresent) == 0 && (s & kGhost) != 0 &&
         (ghost_gen_ + kGens - (s & kGenMask)) % kGens < kGhostWindow;
}

// A place at the young end of a queue, as state bits.
uint8_t ViewList::enter(ViewChunk& c, bool main) {
  Queue& q = queue_[main];
  const uint64_t share = main ? capacity() - capacity() / kSmallShare : capacity() / kSmallShare;
  if (q.entered >= std::max<uint64_t>(1, share / (kGens - 2))) q.advance();
  ++q.entered;
  ++q.count[q.current];
  ++q.total;
  Slot& slot = slots_[c.position];
  (main ? slot.main_gens : slot.small_gens) |= static_cast<uint8_t>(1u << q.current);
  return static_cast<uint8_t>(kPresent | (main ? kMain : 0) | q.current);
}

void ViewList::leave(uint8_t s) {
  Queue& q = queue_[(s & kMain) != 0];
  SPILLWAY_ASSERT(q.count[s & kGenMask] > 0);
  --q.count[s & kGenMask];
  --q.total;
}

void ViewList::insert(ViewChunk& c, unsigned i, bool loading) {
  const uint8_t old = c.get(i);
  SPILLWAY_ASSERT((old & kPresent) == 0);
  c.set(i, static_cast<uint8_t>(enter(c, ghost_fresh(old)) | (loading ? kLoading : 0)));
  ++c.pages;
  pages_.store(pages_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

void ViewList::remove(ViewChunk& c, unsigned i) {
  const uint8_t s = c.get(i);
  SPILLWAY_ASSERT((s & kPresent) != 0);
  leave(s);
  c.set(i, 0);
  --c.pages;
  pages_.store(pages_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
}

// The next page of that queue and generation in sweep order.
std::pair<ViewChunk*, unsigned> ViewList::find(bool main, unsigned gen) {
  Queue& q = queue_[main];
  const auto bit = static_cast<uint8_t>(1u << gen);
  const auto pattern = static_cast<uint8_t>(kPresent | (main ? kMain : 0) | gen);
  const size_t n = slots_.size();
  if (q.hand >= n) q.hand = 0, q.hand_page = 0;
  for (size_t step = 0; step <= n; ++step) {
    Slot& slot = slots_[q.hand];
    uint8_t& gens = main ? slot.main_gens : slot.small_gens;
    if ((gens & bit) != 0) {
      ViewChunk* c = slot.chunk;
      for (unsigned w = q.hand_page / 8; w < kLeafPages / 8; ++w) {
        uint64_t m = match_bytes(c->word[w].load(std::memory_order_relaxed), kPresent | kMain | kGenMask, pattern);
        if (w == q.hand_page / 8) m &= ~uint64_t{0} << (q.hand_page % 8 * 8);
        if (m == 0) continue;
        const unsigned i = w * 8 + static_cast<unsigned>(__builtin_ctzll(m)) / 8;
        q.hand_page = i;
        return {c, i};
      }
      if (q.hand_page == 0) gens &= static_cast<uint8_t>(~bit);  // looked at all of it
    }
    if (slot.chunk->pages == 0) consider_dead(slot.chunk);
    q.hand = q.hand + 1 < n ? q.hand + 1 : 0;
    q.hand_page = 0;
  }
  return {nullptr, 0};
}

std::pair<ViewChunk*, unsigned> ViewList::victim() {
  if (pages() == 0) return {nullptr, 0};
  // Uses are consumed, so this ends; the bound is for hits that arrive meanwhile on other threads.
  for (unsigned round = 0;; ++round) {
    const bool main = queue_[0].total == 0 ||
                      (queue_[1].total != 0 && queue_[0].total <= capacity() / kSmallShare);
    Queue& q = queue_[main];
    const unsigned gen = q.oldest();
    if (gen == q.current) q.advance();  // what is queued again must not join those it is swept with
    auto [c, i] = find(main, gen);
    SPILLWAY_ASSERT(c != nullptr);
    const uint8_t s = c->get(i);
    const unsigned uses = (s & kUsesMask) / kUsesOne;
    if (round > 4 * kLeafPages) return {c, i};
    if (!main && uses >= kUsesToPromote) {
      leave(s);
      c->requeue(i, enter(*c, true));
    } else if (main && uses > 0) {
      leave(s);
      c->requeue(i, static_cast<uint8_t>(enter(*c, true) | (uses - 1) * kUsesOne));
    } else {
      return {c, i};
    }
  }
}

void ViewList::evicted(ViewChunk& c, unsigned i) {
  const uint8_t s = c.get(i);
  SPILLWAY_ASSERT((s & kPresent) != 0);
  leave(s);
  uint8_t next = 0;
  if ((s & kMain) == 0) {
    if (++ghost_entered_ > std::max<uint64_t>(1, capacity() / kGhostWindow)) {
      ghost_gen_ = (ghost_gen_ + 1) % kGens;
      ghost_entered_ = 1;
    }
    next = static_cast<uint8_t>(kGhost | ghost_gen_);
  }
  c.set(i, next);
  --c.pages;
  pages_.store(pages_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
}

void ViewList::reset() {
  SPILLWAY_ASSERT(slots_.empty() && pages() == 0);
  queue_[0] = queue_[1] = {};
  ghost_gen_ = 0;
  ghost_entered_ = 0;
}

void ViewList::consider_dead(ViewChunk* c) {
  if (dead_.size() >= 16) return;
  for (unsigned i = 0; i < kLeafPages; ++i)
    if (ghost_fresh(c->get(i))) return;
  if (std::find(dead_.begin(), dead_.end(), c) == dead_.end()) dead_.push_back(c);
}

ViewChunk* ViewList::take_dead() {
  while (!dead_.empty()) {
    ViewChunk* c = dead_.back();
    dead_.pop_back();
    if (c->pages == 0) return c;
  }
  return nullptr;
}

}  // namespace spillway::cache
