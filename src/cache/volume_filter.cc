#include "src/cache/volume_filter.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/cache/frame_copy.h"

namespace spillway::cache {

using reclaim::RcuGuard;

namespace {
Geometry geometry_of(const Volume& lower, CacheMode) { return lower.geometry(); }
constexpr uint64_t page_of(uint64_t offset) { return offset / kPageSize; }
constexpr uint64_t bit(unsigned i) { return uint64_t{1} << i; }
}  // namespace

FilterVolume::FilterVolume(Cache::Impl& cache, Node& node, VolumePtr lower, CacheMode mode)
    : Volume(lower->name(), lower->size(), geometry_of(*lower, mode)),
      c_(cache), node_(node), lower_(std::move(lower)), mode_(mode) {}

FilterVolume::~FilterVolume() {
  if (listener_ != 0) lower_->remove_resize_listener(listener_);
}

void FilterVolume::listen() {
  listener_ = lower_->add_resize_listener([this](uint64_t bytes) {
    node_.index.grow(bytes / kPageSize + 1);
    set_size(bytes);
  });
}

Binding& FilterVolume::bind_slow(GroupId group) {
  Tenant* t = c_.tenant_of(group);
  std::lock_guard guard(bind_mutex_);
  for (Binding* b = bindings_.load(std::memory_order_relaxed); b != nullptr; b = b->next)
    if (b->group == group && !b->dead.load(std::memory_order_relaxed)) return *b;
  auto b = std::make_unique<Binding>();
  b->group = group;
  b->tenant = t;
  b->slot = c_.view_slot(node_, *t, &b->set);
  b->next = bindings_.load(std::memory_order_relaxed);
  bindings_.store(b.get(), std::memory_order_release);
  owned_.push_back(std::move(b));
  return *owned_.back();
}

void FilterVolume::unbind(GroupId group) {
  std::lock_guard guard(bind_mutex_);
  for (Binding* b = bindings_.load(std::memory_order_relaxed); b != nullptr; b = b->next)
    if (b->group == group) b->dead.store(true, std::memory_order_release);
}

// ---- read ----------------------------------------------------------------------------------------------------------

// A page that is in the tenant's view and there: its frame with a reference. Lock-free.
inline FrameId FilterVolume::hit(Binding& b, uint64_t page) {
  using namespace page_state;
  RcuGuard rcu;
  Leaf* leaf = node_.index.find(page / kLeafPages);
  if (leaf == nullptr) [[unlikely]] return kNoFrame;
  ViewChunk* chunk = leaf->chunk(b.slot);
  if (chunk == nullptr) [[unlikely]] return kNoFrame;
  const unsigned i = page % kLeafPages;
  const uint8_t s = chunk->get(i);
  if ((s & (kPresent | kLoading)) != kPresent) return kNoFrame;
  const FrameId f = leaf->at(i);
  if (f == kNoFrame) [[unlikely]] return kNoFrame;
  Frame& fr = c_.store->frame(f);
  if (!fr.try_get()) [[unlikely]] return kNoFrame;
  // The descriptor may have begun another life between the look and the reference: look again, view and entry both.
  if (leaf->at(i) != f || !chunk->has(i)) [[unlikely]] {
    c_.put(f);
    return kNoFrame;
  }
  chunk->use(i, s);
  return f;
}

// Starts the way of a page's first lines (and its translation) into this CPU's caches; the CPU itself goes on from there when
// the copy begins. Decides nothing, so what it finds may be out of date. Only what the tenant's view has: what is resident for
// others must not make a difference here either (P3).
inline void FilterVolume::fetch(const Binding& b, uint64_t page, size_t in, bool write) {
  using namespace page_state;
  constexpr unsigned kLines = 8;
  RcuGuard rcu;
  Leaf* leaf = node_.index.find(page / kLeafPages);
  if (leaf == nullptr) return;
  const ViewChunk* chunk = leaf->chunk(b.slot);
  const unsigned i = page % kLeafPages;
  if (chunk == nullptr || (chunk->get(i) & (kPresent | kLoading)) != kPresent) return;
  const FrameId f = leaf->at(i);
  if (f == kNoFrame) return;
  const std::byte* data = c_.store->data(f) + in;
  __builtin_prefetch(&c_.store->frame(f), 1);
  if (write) __builtin_prefetch(leaf, 1);
  for (unsigned k = 0; k < kLines && in + k * 64 < kPageSize; ++k) {
    if (write) __builtin_prefetch(data + k * 64, 1);
    else __builtin_prefetch(data + k * 64, 0);
  }
}

void FilterVolume::expect(IoContext ctx, uint64_t offset, uint64_t length, bool write) {
  if (mode_ != CacheMode::kNone && offset + length <= cacheable_pages() * kPageSize)
    fetch(bind(ctx.group), page_of(offset), offset % kPageSize, write);
}

Task<Status> FilterVolume::do_read(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov);
  if (mode_ == CacheMode::kNone || offset + length > cacheable_pages() * kPageSize) [[unlikely]]
    return read_around(ctx, offset, iov);
  Binding& b = bind(ctx.group);
  const uint32_t reactor = Reactor::current().index();
  ReadAhead& ra = b.ahead[reactor % Binding::kShards];
  uint64_t done = 0, pages = 0;
  bool marked = false;
  while (done < length) {
    const uint64_t page = page_of(offset + done), in = (offset + done) % kPageSize;
    const FrameId f = hit(b, page);
    if (f == kNoFrame) break;
    const size_t n = std::min<uint64_t>(kPageSize - in, length - done);
    if (done + n < length) fetch(b, page + 1, 0, false);
    frame_to_iov(iov, done, c_.store->data(f) + in, n);
    c_.put(f);
    for (auto& s : ra.stream) marked |= s.marker.load(std::memory_order_relaxed) == page;
    done += n;
    ++pages;
  }
  if (pages != 0) b.tenant->count_hits(pages, reactor);
  if (done == length) {
    if (marked) [[unlikely]] note_read(b, ctx, offset, length, false);
    return Task<Status>::ready();
  }
  return read_slow(b, ctx, offset, iov, done);
}

// Decides for every page of [first, first + count) and changes the view accordingly, all before anything suspends.
void FilterVolume::plan(Binding& b, uint64_t first, uint64_t count, bool ahead, Plan& out) {
  while (count > 0) {
    const auto at = static_cast<unsigned>(first % kLeafPages);
    const auto n = static_cast<unsigned>(std::min<uint64_t>(count, kLeafPages - at));
    plan_leaf(b, first / kLeafPages, at, n, ahead, out);
    first += n;
    count -= n;
  }
  Tenant::Counters& mine = b.tenant->mine();
  if (out.hits != 0) mine.hits.fetch_add(out.hits, std::memory_order_relaxed);
  if (out.misses != 0) mine.misses.fetch_add(out.misses, std::memory_order_relaxed);
  if (out.joined != 0) mine.joined.fetch_add(out.joined, std::memory_order_relaxed);
}

// One more page for the device to read, in the run that is being extended or a new one.
void FilterVolume::ask(Binding& b, Leaf& leaf, unsigned i, FrameId fresh, PendingRead*& open, Plan& out) {
  if (open == nullptr || unsigned{open->first} + open->count != i) {
    open = new PendingRead;
    open->leaf = &leaf;
    open->tenant = b.tenant;
    open->first = static_cast<uint8_t>(i);
    open->next = leaf.pending;
    leaf.pending = open;
    out.own.push_back(open);  // the first reference
  }
  c_.store->frame(fresh).refs.store(1, std::memory_order_relaxed);
  open->frame[i - open->first] = fresh;
  // What the device gives may be older than a frame that is not down yet, also when that one is clean, or gone, by then.
  if (!leaf.clean(i)) open->stale |= bit(i - open->first);
  ++open->count;
  b.tenant->in_flight.fetch_add(1, std::memory_order_relaxed);
}

// A page that is in the view, under the leaf's lock: its frame, the read that is bringing it, or, where that one failed,
// a read of our own.
void FilterVolume::take(Binding& b, Leaf& leaf, ViewChunk& chunk, unsigned i, PendingRead*& open, Plan& out) {
  using namespace page_state;
  const uint64_t page = leaf.number * kLeafPages + i;
  const uint8_t s = chunk.get(i);
  ++out.hits;
  chunk.use(i, s);
  if ((s & kLoading) == 0) {
    const FrameId f = leaf.at(i);
    SPILLWAY_ASSERT(f != kNoFrame);
    c_.store->frame(f).refs.fetch_add(1, std::memory_order_relaxed);  // the index has one: it is not zero
    out.steps.push_back({Step::Kind::kFrame, page, f, nullptr});
    return;
  }
  PendingRead* p = leaf.find_pending(b.tenant, i);
  if (p == nullptr) {
    const FrameId fresh = c_.frame_for_read(*b.tenant, c_.numa_of(leaf.number));
    if (fresh == kNoFrame) {
      out.steps.push_back({Step::Kind::kAround, page, kNoFrame, nullptr});
      return;
    }
    ask(b, leaf, i, fresh, open, out);
    p = open;
  } else {
    ++out.joined;
  }
  p->refs.fetch_add(1, std::memory_order_relaxed);
  out.steps.push_back({Step::Kind::kRead, page, kNoFrame, p});
}

void FilterVolume::plan_leaf(Binding& b, uint64_t number, unsigned first, unsigned count, bool ahead, Plan& out) {
  using namespace page_state;
  Tenant& t = *b.tenant;
  const int numa = c_.numa_of(number);
  ViewList& list = t.lists[static_cast<size_t>(numa)];
  const unsigned end = first + count;
  unsigned absent = 0;
  bool leading = false;
  {
    RcuGuard rcu;
    Leaf* l = node_.index.find(number);
    ViewChunk* c = l != nullptr ? l->chunk(b.slot) : nullptr;
    leading = c != nullptr && c->has(first) && !ahead && c_.mutant != Cache::Impl::Mutant::kRoomBeforeUse;
  }
  // Pages of the view that come before the first absent one are used before room is made for that one, as do_read does
  // with those that need not be waited for: the order of the view must not tell whether a read was over (P3).
  if (leading) {
    if (Leaf* leaf = node_.index.lock(number)) {
      PendingRead* open = nullptr;
      for (ViewChunk* c = leaf->chunk(b.slot); c != nullptr && first < end && c->has(first); ++first)
        take(b, *leaf, *c, first, open, out);
      node_.index.unlock(leaf);
    }
    if (first == end) return;
  }
  {
    RcuGuard rcu;
    Leaf* l = node_.index.find(number);
    ViewChunk* c = l != nullptr ? l->chunk(b.slot) : nullptr;
    for (unsigned i = first; i < end; ++i) absent += c == nullptr || !c->has(i);
  }
  c_.make_room(t, numa, absent);
  unsigned inserted = 0;
  bool was_empty = false;
  {
    std::lock_guard list_guard(list.lock);
    was_empty = list.pages() == 0;
    Leaf* leaf = node_.index.lock_or_make(number);
    ViewChunk* chunk = c_.chunk_of(*leaf, b.slot, list);
    PendingRead* open = nullptr;  // the run being extended
    for (unsigned i = first; i < end; ++i) {
      const uint64_t page = number * kLeafPages + i;
      const FrameId f = leaf->at(i);
      if (chunk->has(i)) {
        if (!ahead) take(b, *leaf, *chunk, i, open, out);
        continue;
      }
      if (inserted == absent) {
        // It was evicted just now to make room: not this time.
        c_.bypassed.fetch_add(1, std::memory_order_relaxed);
        if (!ahead) {
          ++out.misses;
          out.steps.push_back({Step::Kind::kAround, page, kNoFrame, nullptr});
        }
        continue;
      }
      if (f != kNoFrame && (mode_ == CacheMode::kTrusted || c_.mutant == Cache::Impl::Mutant::kUseResidentAtOnce)) {
        list.insert(*chunk, i, false);
        ++inserted;
        c_.join_view(*leaf, i, f, t);
        if (ahead) continue;
        ++out.hits;
        c_.store->frame(f).refs.fetch_add(1, std::memory_order_relaxed);
        out.steps.push_back({Step::Kind::kFrame, page, f, nullptr});
        continue;
      }
      const FrameId fresh = c_.frame_for_read(t, numa);
      list.insert(*chunk, i, true);
      ++inserted;
      if (!ahead) ++out.misses;
      if (fresh == kNoFrame) {
        if (!ahead) out.steps.push_back({Step::Kind::kAround, page, kNoFrame, nullptr});
        continue;
      }
      ask(b, *leaf, i, fresh, open, out);
      if (ahead) continue;
      open->refs.fetch_add(1, std::memory_order_relaxed);
      out.steps.push_back({Step::Kind::kRead, page, kNoFrame, open});
    }
    if (chunk->pages == 0) {
      leaf->set_chunk(b.slot, nullptr);
      list.remove_chunk(chunk);
      chunk->retire();
    }
    node_.index.unlock(leaf);
  }
  if (inserted < absent) c_.uncharge(t, numa, absent - inserted);
  if (was_empty && inserted != 0) c_.shrinker.set_bit(*t.group, numa);
  c_.note_peak();
  if (ahead && inserted != 0) t.mine().read_ahead.fetch_add(inserted, std::memory_order_relaxed);
}

void FilterVolume::drop(PendingRead* p) {
  if (p->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  for (unsigned k = 0; k < p->count; ++k) c_.put(p->frame[k]);
  p->tenant->in_flight.fetch_sub(p->count, std::memory_order_relaxed);
  delete p;
}

// What was read comes into the index and the view, page by page. A fresh frame is installed where there is none, and takes
// the place of a clean one that another tenant brought: this read and all that follow are answered from the same memory as
// if nobody had had the page, so the CPU's caches do not tell (P3). A resident frame that is not clean, or was not when the
// device was asked, is taken instead. Returns the pages that must be read again, because they were written since and the
// writer's frame is gone already.
uint64_t FilterVolume::absorb(PendingRead& p, Tenant& t, uint32_t slot, uint64_t todo) {
  uint64_t again = 0;
  Leaf* leaf = p.leaf;
  leaf->lock.lock();  // not dead: it has this pending read
  ViewChunk* chunk = leaf->chunk(slot);
  for (unsigned k = 0; k < p.count; ++k) {
    if ((todo & bit(k)) == 0 || (p.dropped & bit(k)) != 0) continue;
    const unsigned i = p.first + k;
    FrameId f = leaf->at(i);
    if (f == kNoFrame) {
      if ((p.stale & bit(k)) != 0) {
        again |= bit(k);
        continue;
      }
      f = p.frame[k];
      c_.install(*leaf, i, f);
    } else if ((p.stale & bit(k)) == 0) {
      c_.replace(*leaf, i, f, p.frame[k]);
      f = p.frame[k];
      c_.merged.fetch_add(1, std::memory_order_relaxed);
    } else {
      c_.store->frame(f).refs.fetch_add(1, std::memory_order_relaxed);
      c_.put(p.frame[k]);
      p.frame[k] = f;
      c_.merged.fetch_add(1, std::memory_order_relaxed);
    }
    c_.join_view(*leaf, i, f, t);
    chunk->loaded(i);
  }
  p.stale = 0;
  node_.index.unlock(leaf);
  return again;
}

// The read is over and waiters are woken. Pages it could not bring stay in the view, loading with no read under way:
// whoever touches one next asks the device again. So the view never changes when a device answers, only when the
// tenant asks (P3).
void FilterVolume::end_read(PendingRead& p, bool failed) {
  Leaf* leaf = p.leaf;
  leaf->lock.lock();
  for (PendingRead** at = &leaf->pending; *at != nullptr; at = &(*at)->next)
    if (*at == &p) {
      *at = p.next;
      break;
    }
  p.failed = failed;
  node_.index.unlock(leaf);
  p.done.set();
}

// Copies to the guest what it asked for and the device gave. Meanwhile what absorb() will touch is on its way into this CPU's
// caches: that a frame was replaced, and how long ago it was used, is not to be seen in the time of the answer (P3).
void FilterVolume::answer_early(PendingRead& p, Answer& a) {
  uint64_t good = 0;
  p.leaf->lock.lock();
  good = ~p.stale;
  for (unsigned k = 0; k < p.count; ++k) {
    __builtin_prefetch(&c_.store->entry(p.frame[k]), 1);
    if (const FrameId resident = p.leaf->at(p.first + k); resident != kNoFrame) {
      __builtin_prefetch(&c_.store->frame(resident), 1);
      __builtin_prefetch(&c_.store->entry(resident), 1);
    }
  }
  p.leaf->lock.unlock();  // not empty: it has this pending read
  uint64_t done = a.skip;
  const uint64_t length = iov_length(a.iov);
  for (Step& step : a.steps) {
    const uint64_t in = (a.offset + done) % kPageSize;
    const size_t n = std::min<uint64_t>(kPageSize - in, length - done);
    if (step.read == &p) {
      const auto k = static_cast<unsigned>(step.page % kLeafPages - p.first);
      step.answered = (good & bit(k)) != 0;
      if (step.answered) frame_to_iov(a.iov, done, c_.store->data(p.frame[k]) + in, n);
    }
    done += n;
  }
}

// Issues one pending read and brings it to its end.
Task<Status> FilterVolume::read_pages(Binding& b, IoContext ctx, PendingRead* p, Answer* answer) {
  constexpr int kAttempts = 8;
  uint64_t todo = p->count == 64 ? ~uint64_t{0} : bit(p->count) - 1;
  Status s{};
  const uint64_t base = p->leaf->number * kLeafPages + p->first;
  ctx.fua = false;
  for (int attempt = 0; attempt < kAttempts && todo != 0; ++attempt) {
    for (unsigned a = 0; a < p->count && s.has_value();) {
      if ((todo & bit(a)) == 0) {
        ++a;
        continue;
      }
      iovec pieces[kLeafPages];
      unsigned n = 0;
      while (a + n < p->count && (todo & bit(a + n)) != 0) {
        pieces[n] = {c_.store->data(p->frame[a + n]), kPageSize};
        ++n;
      }
      s = co_await lower_->read(ctx, (base + a) * kPageSize, Iov(pieces, n));
      a += n;
    }
    if (!s) break;
    if (answer != nullptr && attempt == 0) answer_early(*p, *answer);
    todo = absorb(*p, *b.tenant, b.slot, todo);
  }
  // Pages that were written under every attempt are served, but not kept.
  end_read(*p, !s.has_value());
  co_return s;
}

Task<Status> FilterVolume::read_slow(Binding& b, IoContext ctx, uint64_t offset, Iov iov, uint64_t skip) {
  const uint64_t length = iov_length(iov);
  const uint64_t first = page_of(offset + skip), last = page_of(offset + length - 1);
  Plan p;
  p.steps.reserve(last - first + 1);
  plan(b, first, last - first + 1, false, p);
  // A page that is still being read for this tenant is no miss: streams follow the view, not the device.
  note_read(b, ctx, offset, length, p.misses != 0 || c_.mutant == Cache::Impl::Mutant::kAheadOnLoading);
  Status s{};
  Answer answer{p.steps, offset, skip, iov};
  if (p.own.size() == 1) {
    s = co_await read_pages(b, ctx, p.own[0], &answer);
  } else if (!p.own.empty()) {
    std::vector<Task<Status>> parts;
    for (PendingRead* r : p.own) parts.push_back(read_pages(b, ctx, r, &answer));
    s = co_await all_of(std::move(parts));
  }
  uint64_t done = skip;
  for (Step& step : p.steps) {
    const uint64_t in = (offset + done) % kPageSize;
    const size_t n = std::min<uint64_t>(kPageSize - in, length - done);
    bool around = step.kind == Step::Kind::kAround;
    FrameId f = step.frame;
    if (step.kind == Step::Kind::kRead) {
      if (!step.read->done.is_set()) co_await step.read->done.wait();
      // Somebody else's read failed: we ask the device for our own page. Our own error is in s.
      around = step.read->failed && s.has_value();
      f = step.read->frame[step.page % kLeafPages - step.read->first];
    }
    if (s.has_value() && !step.answered) {
      if (around) {
        IovSlice part(iov, done, n);
        s = co_await read_around(ctx, offset + done, part);
      } else {
        frame_to_iov(iov, done, c_.store->data(f) + in, n);
      }
    }
    if (step.kind == Step::Kind::kFrame) c_.put(f);
    if (step.kind == Step::Kind::kRead) drop(step.read);
    done += n;
  }
  for (PendingRead* r : p.own) drop(r);
  co_return s;
}

// ---- read-ahead ----------------------------------------------------------------------------------------------------

// A stream begins with a second miss that continues the first; its window doubles up to the limit, and a touch of the
// middle of a window asks for the next. It depends on the tenant's own reads only.
void FilterVolume::note_read(Binding& b, IoContext ctx, uint64_t offset, uint64_t length, bool missed) {
  const uint64_t window_max = c_.options.read_ahead_max_bytes / kPageSize;
  if (window_max == 0 || ctx.io_class != IoClass::kForeground) return;
  ReadAhead& ra = b.ahead[Reactor::current().index() % Binding::kShards];
  const uint64_t first = page_of(offset), end = page_of(offset + length - 1) + 1;
  uint64_t from = 0, count = 0;
  {
    std::lock_guard guard(ra.lock);
    ReadAhead::Stream* s = nullptr;
    for (auto& k : ra.stream) {
      const uint64_t marker = k.marker.load(std::memory_order_relaxed);
      if (marker >= first && marker < end) s = &k;
    }
    if (s == nullptr && missed)
      for (auto& k : ra.stream)
        if (k.next == first || (k.end > first && k.next <= first && k.window != 0)) s = &k;
    if (s == nullptr) {
      if (!missed) return;
      s = &ra.stream[ra.victim++ % ReadAhead::kStreams];
      s->next = end;
      s->end = end;
      s->window = 0;
      s->marker.store(UINT64_MAX, std::memory_order_relaxed);
      return;
    }
    s->window = std::min(window_max, std::max<uint64_t>({4, s->window * 2, end - first}));
    // Never more than an eighth of what the tenant may hold.
    s->window = std::min(s->window, std::max<uint64_t>(1, b.tenant->lists[0].capacity() / 8));
    from = std::max(s->end, end);
    const uint64_t limit = cacheable_pages();
    count = from < limit ? std::min(s->window, limit - from) : 0;
    s->next = end;
    s->end = from + count;
    s->marker.store(count != 0 ? from + count / 2 : UINT64_MAX, std::memory_order_relaxed);
  }
  if (count != 0) start_ahead(b, ctx, from, count);
}

void FilterVolume::start_ahead(Binding& b, IoContext ctx, uint64_t first, uint64_t count) {
  Plan p;
  plan(b, first, count, true, p);
  if (p.own.empty()) return;
  ctx.io_class = IoClass::kReadAhead;
  ahead_.add();
  Reactor::current().spawn(ahead_task(shared_from_this(), b, ctx, std::move(p.own)));
}

Task<void> FilterVolume::ahead_task(std::shared_ptr<FilterVolume> self, Binding& b, IoContext ctx,
                                    std::vector<PendingRead*> own) {
  std::vector<Task<Status>> parts;
  for (PendingRead* r : own) parts.push_back(self->read_pages(b, ctx, r));
  Status s = co_await all_of(std::move(parts));
  (void)s;  // nobody asked for these pages; who does will see the error of its own read
  for (PendingRead* r : own) self->drop(r);
  self->ahead_.done();
}

// ---- write ---------------------------------------------------------------------------------------------------------

// The page is in the tenant's view and there: written in place. use: it counts as one, unless admit() counted it.
bool FilterVolume::write_present(Binding& b, uint64_t page, size_t in, size_t n, Iov iov, uint64_t skip, bool use) {
  using namespace page_state;
  const unsigned i = page % kLeafPages;
  Leaf* leaf = node_.index.lock(page / kLeafPages);
  if (leaf == nullptr) return false;
  ViewChunk* chunk = leaf->chunk(b.slot);
  const uint8_t s = chunk != nullptr ? chunk->get(i) : uint8_t{0};
  if ((s & (kPresent | kLoading)) != kPresent) {
    node_.index.unlock(leaf);
    return false;
  }
  const FrameId f = leaf->at(i);
  if (use) chunk->use(i, s);
  c_.begin_write(*leaf, i, f);
  leaf->lock.unlock();  // not empty: the frame is there and being written
  frame_from_iov(c_.store->data(f) + in, iov, skip, n);
  leaf->lock.lock();
  c_.end_write(*leaf, i, f, *b.set);
  node_.index.unlock(leaf);
  c_.put(f);
  return true;
}

// What a write of this page does to the view, when it is issued: a page that is there is used, an absent one joins, with
// its data still to come. False: it was absent.
bool FilterVolume::admit(Binding& b, uint64_t page) {
  using namespace page_state;
  Tenant& t = *b.tenant;
  const uint64_t number = page / kLeafPages;
  const unsigned i = page % kLeafPages;
  const int numa = c_.numa_of(number);
  ViewList& list = t.lists[static_cast<size_t>(numa)];
  auto use = [&](ViewChunk* c) {
    const uint8_t s = c != nullptr ? c->get(i) : uint8_t{0};
    if ((s & kPresent) != 0) c->use(i, s);
    return (s & kPresent) != 0;
  };
  {
    RcuGuard rcu;
    if (Leaf* l = node_.index.find(number); l != nullptr && use(l->chunk(b.slot))) return true;
  }
  c_.make_room(t, numa, 1);
  bool was_empty = false, joined = false;
  {
    std::lock_guard guard(list.lock);
    was_empty = list.pages() == 0;
    Leaf* leaf = node_.index.lock_or_make(number);
    ViewChunk* chunk = c_.chunk_of(*leaf, b.slot, list);
    joined = !use(chunk);  // else: another request of the tenant was faster, on another thread
    if (joined) list.insert(*chunk, i, true);
    node_.index.unlock(leaf);
  }
  if (!joined) c_.uncharge(t, numa, 1);
  if (was_empty && joined) c_.shrinker.set_bit(*t.group, numa);
  return false;
}

// Brings a page of the view that is not there yet, for a write of a part of it. True: look again.
Task<bool> FilterVolume::load(Binding& b, IoContext ctx, uint64_t page) {
  using namespace page_state;
  const unsigned i = page % kLeafPages;
  PendingRead* p = nullptr;
  Plan own;
  {
    Leaf* leaf = node_.index.lock(page / kLeafPages);
    if (leaf == nullptr) co_return false;
    ViewChunk* chunk = leaf->chunk(b.slot);
    if (chunk != nullptr && (chunk->get(i) & (kPresent | kLoading)) == (kPresent | kLoading)) {
      p = leaf->find_pending(b.tenant, i);
      if (p != nullptr) {
        p->refs.fetch_add(1, std::memory_order_relaxed);
      } else if (const FrameId fresh = c_.frame_for_read(*b.tenant, c_.numa_of(leaf->number)); fresh != kNoFrame) {
        ask(b, *leaf, i, fresh, p, own);
      }
    }
    node_.index.unlock(leaf);
  }
  if (p == nullptr) co_return false;
  bool good = true;
  if (!own.own.empty())
    good = (co_await read_pages(b, ctx, p)).has_value();
  else if (!p->done.is_set())
    co_await p->done.wait();
  drop(p);
  co_return good;
}

// A whole page that is in the view, but not there: it comes with what the guest writes; nothing is read. False: the view
// has let go of it since, or there is no frame.
bool FilterVolume::fill(Binding& b, uint64_t page, Iov iov, uint64_t skip) {
  using namespace page_state;
  Tenant& t = *b.tenant;
  const uint64_t number = page / kLeafPages;
  const unsigned i = page % kLeafPages;
  const FrameId fresh = c_.store->alloc(c_.numa_of(number));
  if (fresh == kNoFrame) {
    c_.shortage.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  // Filled before anybody can see it: it held somebody else's data.
  c_.store->frame(fresh).refs.store(1, std::memory_order_relaxed);
  frame_from_iov(c_.store->data(fresh), iov, skip, kPageSize);
  bool done = false;
  if (Leaf* leaf = node_.index.lock(number)) {
    ViewChunk* chunk = leaf->chunk(b.slot);
    const uint8_t s = chunk != nullptr ? chunk->get(i) : uint8_t{0};
    if ((s & kPresent) != 0) {
      FrameId f = leaf->at(i);
      const bool in_place = f != kNoFrame;
      if (!in_place) {
        f = fresh;
        c_.install(*leaf, i, f);
      }
      c_.begin_write(*leaf, i, f);
      if ((s & kLoading) != 0) {
        if (PendingRead* p = leaf->find_pending(&t, i)) p->dropped |= bit(i - p->first);
        c_.join_view(*leaf, i, f, t);
        chunk->loaded(i);
      }
      if (in_place) {
        leaf->lock.unlock();  // `f` cannot change: it is being written
        frame_copy(c_.store->data(f), c_.store->data(fresh), kPageSize);
        leaf->lock.lock();
      }
      c_.end_write(*leaf, i, f, *b.set);
      c_.put(f);
      done = true;
    }
    node_.index.unlock(leaf);
  }
  c_.put(fresh);
  c_.note_peak();
  return done;
}

Task<Status> FilterVolume::do_write(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov);
  if (mode_ == CacheMode::kNone || offset + length > cacheable_pages() * kPageSize) [[unlikely]]
    return write_around(ctx, offset, iov);
  Binding& b = bind(ctx.group);
  uint64_t done = 0;
  const uint64_t dirty_max = b.tenant->dirty_max.load(std::memory_order_relaxed);
  if (b.tenant->dirty.load(std::memory_order_relaxed) + length / kPageSize < dirty_max) {
    while (done < length) {
      const uint64_t in = (offset + done) % kPageSize;
      const size_t n = std::min<uint64_t>(kPageSize - in, length - done);
      if (done + n < length) fetch(b, page_of(offset + done) + 1, 0, true);
      if (!write_present(b, page_of(offset + done), in, n, iov, done, true)) break;
      done += n;
    }
    if (done == length && !ctx.fua && c_.options.background != nullptr) {
      c_.start_ticker();
      if (b.tenant->dirty.load(std::memory_order_relaxed) > dirty_max / 2) c_.kick(*b.set);
      return Task<Status>::ready();
    }
  }
  return write_slow(b, ctx, offset, iov, done);
}

Task<Status> FilterVolume::write_slow(Binding& b, IoContext ctx, uint64_t offset, Iov iov, uint64_t skip) {
  const uint64_t length = iov_length(iov);
  const bool fua = ctx.fua || c_.options.background == nullptr;
  // The view first, all of it, before anything suspends; the data after that, as far as the view still wants it.
  uint64_t misses = 0;
  for (uint64_t page = page_of(offset + skip); page <= page_of(offset + length - 1); ++page) {
    const bool part = page * kPageSize < offset || (page + 1) * kPageSize > offset + length;
    if (admit(b, page) || !part) continue;
    ++misses;  // the rest of it is read
    note_read(b, ctx, page * kPageSize, kPageSize, true);
  }
  if (misses != 0) b.tenant->mine().misses.fetch_add(misses, std::memory_order_relaxed);
  uint64_t done = skip;
  while (done < length) {
    const uint64_t in = (offset + done) % kPageSize, page = page_of(offset + done);
    const size_t n = std::min<uint64_t>(kPageSize - in, length - done);
    if (b.tenant->dirty.load(std::memory_order_relaxed) >= b.tenant->dirty_max.load(std::memory_order_relaxed)) {
      Status s = co_await throttle(b);
      if (!s) co_return s;
    }
    constexpr int kAttempts = 4;
    const bool again_use = c_.mutant == Cache::Impl::Mutant::kUseAfterWait;
    bool written = write_present(b, page, in, n, iov, done, again_use);
    if (!written && n == kPageSize) written = fill(b, page, iov, done);
    for (int attempt = 0; !written && n != kPageSize && attempt < kAttempts; ++attempt) {
      const bool again = co_await load(b, ctx, page);
      if (!again) break;
      written = write_present(b, page, in, n, iov, done, false);
    }
    if (!written) {
      IovSlice part(iov, done, n);
      Status s = co_await write_around(ctx, offset + done, part);
      if (!s) co_return s;
    }
    done += n;
  }
  c_.start_ticker();
  if (b.tenant->dirty.load(std::memory_order_relaxed) > b.tenant->dirty_max.load(std::memory_order_relaxed) / 2)
    c_.kick(*b.set);
  if (!fua) co_return Status{};
  co_return co_await through(b, ctx, offset, length);
}

// The tenant is at its dirty limit: the writer does a round itself. When nothing gets written the disk is the reason,
// and the writer learns it.
Task<Status> FilterVolume::throttle(Binding& b) {
  constexpr int kRounds = 8;
  Tenant& t = *b.tenant;
  Status s{};
  for (int k = 0; k < kRounds; ++k) {
    {
      auto guard = co_await b.set->round.guard();
      if (t.dirty.load(std::memory_order_relaxed) < t.dirty_max.load(std::memory_order_relaxed)) co_return Status{};
      s = co_await c_.write_round(*b.set);
    }
    if (t.dirty.load(std::memory_order_relaxed) < t.dirty_max.load(std::memory_order_relaxed)) co_return Status{};
    // The dirty pages are in other volumes of the tenant.
    std::vector<DirtySet*> sets;
    {
      std::lock_guard guard(c_.mutex_);
      for (auto& n : c_.nodes_) {
        std::lock_guard node_guard(n->mutex);
        if (n->lower.expired()) continue;
        for (auto& other : n->sets)
          if (other->tenant == &t && other.get() != b.set) sets.push_back(other.get());
      }
    }
    for (DirtySet* other : sets) {
      auto guard = co_await other->round.guard();
      Status o = co_await c_.write_round(*other);
      if (!o && s) s = std::move(o);
    }
    if (t.dirty.load(std::memory_order_relaxed) < t.dirty_max.load(std::memory_order_relaxed)) co_return Status{};
    if (!s && k > 0) co_return s;  // the second round wrote what had only failed beside a bad page
    co_await Reactor::current().sleep_for(1'000'000);
  }
  co_return fail(ErrorKind::kTimeout, fmt::format("cache: node {}: tenant {} stays at its dirty limit", node_.key,
                                                  t.name));
}

// Write-through: a flush of the tenant's pages on this node, shared with those who wait for the same. Where it fails for
// other pages than ours, ours go down by themselves.
Task<Status> FilterVolume::through(Binding& b, IoContext, uint64_t offset, uint64_t length) {
  Status s = co_await c_.flush_set(*b.set, *lower_, true);
  if (s) co_return s;
  {
    auto guard = co_await b.set->round.guard();
    s = co_await c_.write_round(*b.set, page_of(offset), page_of(offset + length - 1) + 1);
  }
  if (!s) co_return s;
  IoContext ctx;
  ctx.group = b.group;
  co_return co_await lower_->flush(ctx);
}

Task<Status> FilterVolume::do_flush(IoContext ctx) {
  if (mode_ == CacheMode::kNone) return lower_->flush(ctx);
  Binding& b = bind(ctx.group);
  if (!b.set->any() && !node_.recovered.any() && b.set->round.try_lock()) {
    b.set->round.unlock();
    return lower_->flush(ctx);
  }
  return c_.flush_node(node_, b.set);
}

// ---- around the cache ----------------------------------------------------------------------------------------------

// fn(leaf, i, frame) under the leaf's lock for every resident page that [offset, offset + length) touches.
template <class Fn>
void FilterVolume::for_frames(uint64_t offset, uint64_t length, Fn fn) {
  const uint64_t first = page_of(offset), last = page_of(offset + length - 1);
  node_.index.for_each(first / kLeafPages, last / kLeafPages, [&](Leaf& leaf) {
    const uint64_t base = leaf.number * kLeafPages;
    for (unsigned i = 0; i < kLeafPages; ++i) {
      if (base + i < first || base + i > last) continue;
      leaf.mark_stale(i);
      if (const FrameId f = leaf.at(i); f != kNoFrame) fn(leaf, i, f);
    }
  });
}

// The overlap of a page with [offset, offset + length): place in the page, in the request, and length.
struct Overlap {
  size_t in;
  uint64_t at;
  size_t n;
};
static Overlap overlap(uint64_t page, uint64_t offset, uint64_t length) {
  const uint64_t a = std::max(page * kPageSize, offset), z = std::min((page + 1) * kPageSize, offset + length);
  return {static_cast<size_t>(a - page * kPageSize), a - offset, static_cast<size_t>(z - a)};
}

Task<Status> FilterVolume::read_around(IoContext ctx, uint64_t offset, Iov iov) {
  if (node_.index.leaves() == 0) return lower_->read(ctx, offset, iov);
  // Frames that are there before the read is issued lie over what it brings.
  return [](FilterVolume& v, IoContext c, uint64_t at, Iov to) -> Task<Status> {
    const uint64_t length = iov_length(to);
    std::vector<Step> held;
    const uint64_t first = page_of(at), last = page_of(at + length - 1);
    v.node_.index.for_each(first / kLeafPages, last / kLeafPages, [&](Leaf& leaf) {
      for (unsigned i = 0; i < kLeafPages; ++i) {
        const uint64_t page = leaf.number * kLeafPages + i;
        const FrameId f = leaf.at(i);
        if (page < first || page > last || f == kNoFrame) continue;
        v.c_.store->frame(f).refs.fetch_add(1, std::memory_order_relaxed);
        held.push_back({Step::Kind::kFrame, page, f, nullptr});
      }
    });
    Status s = co_await v.lower_->read(c, at, to);
    for (Step& h : held) {
      if (s) {
        const Overlap o = overlap(h.page, at, length);
        frame_to_iov(to, o.at, v.c_.store->data(h.frame) + o.in, o.n);
      }
      v.c_.put(h.frame);
    }
    co_return s;
  }(*this, ctx, offset, iov);
}

// Old data of these pages must not be on its way down while new data goes there directly.
Task<Status> FilterVolume::settle_writeback(uint64_t offset, uint64_t length) {
  for (;;) {
    bool busy = false;
    for_frames(offset, length, [&](Leaf&, unsigned, FrameId f) { busy |= c_.store->frame(f).writeback; });
    if (!busy) co_return Status{};
    co_await Reactor::current().sleep_for(100'000);
  }
}

Task<Status> FilterVolume::write_around(IoContext ctx, uint64_t offset, Iov iov) {
  const uint64_t length = iov_length(iov);
  if (node_.index.leaves() == 0 && mode_ == CacheMode::kNone) {
    Status s = co_await lower_->write(ctx, offset, iov);
    if (node_.index.leaves() == 0 || !s) co_return s;
  }
  Binding& b = bind(ctx.group);
  // Frames that are there are marked as being written first (also for a successor), get the data when it is below, and
  // stay dirty: a round may have written older data meanwhile. Where the volume below refuses, they keep what they had,
  // so that an error is the same whether somebody had the page or not. Afterwards those that came meanwhile.
  struct Held {
    uint64_t page;
    FrameId frame;
  };
  std::vector<Held> held;
  auto begin = [&] {
    held.clear();
    for_frames(offset, length, [&](Leaf& leaf, unsigned i, FrameId f) {
      c_.begin_write(leaf, i, f);
      held.push_back({leaf.number * kLeafPages + i, f});
    });
  };
  auto end = [&](bool written) {
    for (Held& h : held) {
      const Overlap o = overlap(h.page, offset, length);
      if (written) frame_from_iov(c_.store->data(h.frame) + o.in, iov, o.at, o.n);
      Leaf* leaf = node_.index.lock(h.page / kLeafPages);
      SPILLWAY_ASSERT(leaf != nullptr);  // a frame with a writer stays
      const unsigned i = h.page % kLeafPages;
      if (written) {
        c_.end_write(*leaf, i, h.frame, *b.set);
      } else {
        --c_.store->frame(h.frame).writers;
        c_.settle(*leaf, i, h.frame);
      }
      node_.index.unlock(leaf);
      c_.put(h.frame);
    }
    if (!held.empty()) c_.start_ticker();
  };
  begin();
  co_await settle_writeback(offset, length);
  Status s = co_await lower_->write(ctx, offset, iov);
  end(s.has_value());
  if (!s) co_return s;
  begin();
  end(true);
  co_return Status{};
}

// ---- discard, zeroes, status ---------------------------------------------------------------------------------------

// Mutant only: what a discard must never do.
void FilterVolume::drop_from_all(Leaf& leaf, unsigned i, FrameId f, const Binding& self) {
  for (uint32_t slot = 0; slot < node_.views.size(); ++slot) {
    ViewChunk* c = leaf.chunk(slot);
    if (slot == self.slot || c == nullptr || (c->get(i) & page_state::kPresent) == 0 ||
        (c->get(i) & page_state::kLoading) != 0)
      continue;
    Tenant& t = *node_.views[slot];
    ViewList& list = t.lists[static_cast<size_t>(c_.numa_of(leaf.number))];
    std::lock_guard guard(list.lock);
    c_.drop_view(leaf, i, f, t);
    list.remove(*c, i);
    c_.uncharge(t, c_.numa_of(leaf.number), 1);
    if (leaf.at(i) != f) return;
  }
}

// Whole pages inside the range; the edges of a discard are left alone, those of write_zeroes are written. They leave the
// caller's view when it asks, and nobody else's ever (P4); the frames follow once the volume below has discarded.
Task<Status> FilterVolume::do_discard(IoContext ctx, uint64_t offset, uint64_t length) {
  const uint64_t first = page_of(align_up(offset, kPageSize)), end = page_of(offset + length);
  if (mode_ != CacheMode::kNone && first < end) leave_view(bind(ctx.group), first, end);
  Status s = co_await lower_->discard(ctx, offset, length);
  if (!s) {
    c_.start_ticker();  // dirty pages that left the view are still to be written
    co_return s;
  }
  if (first >= end || node_.index.leaves() == 0) co_return s;
  Binding& b = bind(ctx.group);
  bool dirtied = false;
  node_.index.for_each(first / kLeafPages, (end - 1) / kLeafPages, [&](Leaf& leaf) {
    for (unsigned i = 0; i < kLeafPages; ++i) {
      const uint64_t page = leaf.number * kLeafPages + i;
      if (page < first || page >= end) continue;
      leaf.mark_stale(i);
      FrameId f = leaf.at(i);
      if (f != kNoFrame && c_.mutant == Cache::Impl::Mutant::kDiscardDropsOthers) {
        drop_from_all(leaf, i, f, b);
        f = leaf.at(i);
      }
      if (f == kNoFrame) continue;
      Frame& fr = c_.store->frame(f);
      if (leaf.views[i] == 0) {
        fr.dirty = false;  // nobody sees it: what was written need not go down
        c_.settle(leaf, i, f);
      } else {
        // In a view: it reads as zeros from now on, and zeros go down, so that it stays so.
        c_.begin_write(leaf, i, f);
        std::memset(c_.store->data(f), 0, kPageSize);
        c_.end_write(leaf, i, f, *b.set);
        c_.put(f);
        dirtied = true;
      }
    }
  });
  if (dirtied) c_.start_ticker();
  c_.punch_if_many();
  co_return Status{};
}

// Takes [first, end) out of the caller's view.
void FilterVolume::leave_view(Binding& b, uint64_t first, uint64_t end) {
  std::vector<uint64_t> numbers;
  node_.index.for_each(first / kLeafPages, (end - 1) / kLeafPages, [&](Leaf& l) {
    if (l.chunk(b.slot) != nullptr) numbers.push_back(l.number);
  });
  for (uint64_t number : numbers) {
    const int numa = c_.numa_of(number);
    ViewList& list = b.tenant->lists[static_cast<size_t>(numa)];
    uint64_t gone = 0;
    {
      std::lock_guard guard(list.lock);
      Leaf* leaf = node_.index.lock(number);
      if (leaf == nullptr) continue;
      if (ViewChunk* chunk = leaf->chunk(b.slot)) {
        for (unsigned i = 0; i < kLeafPages; ++i) {
          const uint64_t page = number * kLeafPages + i;
          if (page < first || page >= end || !chunk->has(i)) continue;
          if ((chunk->get(i) & page_state::kLoading) == 0) {
            c_.drop_view(*leaf, i, leaf->at(i), *b.tenant);
          } else if (PendingRead* p = leaf->find_pending(b.tenant, i)) {
            p->dropped |= bit(i - p->first);
          }
          list.remove(*chunk, i);
          ++gone;
        }
        if (chunk->pages == 0) {
          leaf->set_chunk(b.slot, nullptr);
          list.remove_chunk(chunk);
          chunk->retire();
        }
      }
      node_.index.unlock(leaf);
    }
    c_.uncharge(*b.tenant, numa, gone);
  }
}

Task<Status> FilterVolume::do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool may_unmap) {
  if (node_.index.leaves() == 0) {
    Status s = co_await lower_->write_zeroes(ctx, offset, length, may_unmap);
    if (node_.index.leaves() == 0 || !s) co_return s;
  }
  Binding& b = bind(ctx.group);
  Status s{};
  for (int pass = 0; pass < 2; ++pass) {
    struct Held {
      uint64_t page;
      FrameId frame;
    };
    std::vector<Held> held;
    for_frames(offset, length, [&](Leaf& leaf, unsigned i, FrameId f) {
      c_.begin_write(leaf, i, f);
      const uint64_t page = leaf.number * kLeafPages + i;
      const Overlap o = overlap(page, offset, length);
      std::memset(c_.store->data(f) + o.in, 0, o.n);
      // A whole page of zeros needs no writeback unless it is written again; the second pass catches late ones.
      if (pass == 0 && o.n == kPageSize) c_.store->frame(f).dirty = false;
      held.push_back({page, f});
    });
    if (pass == 0) {
      co_await settle_writeback(offset, length);
      s = co_await lower_->write_zeroes(ctx, offset, length, may_unmap);
    }
    for (Held& h : held) {
      Leaf* leaf = node_.index.lock(h.page / kLeafPages);
      SPILLWAY_ASSERT(leaf != nullptr);
      const unsigned i = h.page % kLeafPages;
      const Overlap o = overlap(h.page, offset, length);
      if (s && pass == 0 && o.n == kPageSize) {
        --c_.store->frame(h.frame).writers;
        c_.settle(*leaf, i, h.frame);
      } else if (pass == 1 && o.n == kPageSize && !c_.store->frame(h.frame).dirty &&
                 c_.store->frame(h.frame).writers == 1) {
        // Clean before and zero now, as is the volume below.
        --c_.store->frame(h.frame).writers;
        c_.settle(*leaf, i, h.frame);
      } else {
        c_.end_write(*leaf, i, h.frame, *b.set);
      }
      node_.index.unlock(leaf);
      c_.put(h.frame);
    }
    if (!s) break;
  }
  c_.start_ticker();
  co_return s;
}

// What is dirty here may lie in a hole below: the tenant's writes go down first.
Task<Result<std::vector<Extent>>> FilterVolume::do_block_status(uint64_t offset, uint64_t length) {
  std::vector<DirtySet*> sets;
  {
    std::lock_guard guard(node_.mutex);
    for (auto& s : node_.sets) sets.push_back(s.get());
    sets.push_back(&node_.recovered);
  }
  for (DirtySet* set : sets) {
    if (!set->any()) continue;
    Status s = co_await c_.flush_set(*set, *lower_, false);
    if (!s) co_return fail(std::move(s).error());
  }
  co_return co_await lower_->block_status(offset, length);
}

Task<Status> FilterVolume::do_resize(uint64_t new_size) { return lower_->resize(new_size); }

Task<Status> FilterVolume::close() {
  co_await ahead_.wait_idle();
  Status s = co_await c_.flush_node(node_, nullptr);
  Status below = co_await lower_->close();
  if (!below && s) s = std::move(below);
  co_return s;
}

std::string FilterVolume::to_text() const {
  return fmt::format("node: {}\nmode: {}\nresident: {}\ndirty: {}\n", node_.key, to_string(mode_),
                     format_size(node_.resident.load(std::memory_order_relaxed) * kPageSize),
                     format_size(node_.dirty.load(std::memory_order_relaxed) * kPageSize));
}

}  // namespace spillway::cache
