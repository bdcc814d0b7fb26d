// Dirty frames and their way down.
//
//   clean --begin_write--> being written (table: dirty) --end_write--> dirty --round takes it--> writeback
//     writeback --done, not written again--> clean      writeback --failed, or written again--> dirty
//
// A frame is marked dirty in the table before its first byte changes and in memory after its last, so a round that
// takes it in between writes a mix and writes it again. A round copies a frame before it writes it: what goes to
// mirrors and parity below does not change under way. One round at a time per (node, tenant); a flush that began before
// a round did is answered by it (group commit). A failed page stays dirty and is tried again by the next round,
// by itself, so an error reaches every flush that depends on it until the data is down, and good neighbours go down.
#include <algorithm>
#include <cstring>
#include <iterator>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/cache/frame_copy.h"
#include "src/cache/impl.h"
#include "src/cache/volume_filter.h"

namespace spillway {

using namespace cache;

namespace {
constexpr uint64_t kBatchBytesMax = 1 * kMiB;
constexpr size_t kBatchesInFlight = 16;
}  // namespace

void Cache::Impl::begin_write(Leaf& leaf, unsigned i, FrameId f) {
  Frame& fr = store->frame(f);
  ++fr.writers;
  SPILLWAY_ASSERT(fr.writers != 0);
  fr.refs.fetch_add(1, std::memory_order_relaxed);
  store->set_dirty(f, true);
  leaf.unclean |= uint64_t{1} << i;
  leaf.mark_stale(i);
}

void Cache::Impl::end_write(Leaf& leaf, unsigned i, FrameId f, DirtySet& set) {
  Frame& fr = store->frame(f);
  --fr.writers;
  const bool was = fr.dirty;
  fr.dirty = true;
  if (!fr.counted) {
    fr.counted = true;
    fr.owner = &set;
    if (set.tenant != nullptr) set.tenant->dirty.fetch_add(1, std::memory_order_relaxed);
    leaf.node->dirty.fetch_add(1, std::memory_order_relaxed);
    dirty_total.fetch_add(1, std::memory_order_relaxed);
    if (leaf.views[i] == 0 && !fr.unclaimed) {
      fr.orphan = true;
      if (set.tenant != nullptr) set.tenant->group->charge(kPageSize, numa_of(leaf.number));
    }
  }
  if (!was || fr.owner != &set) set.push(leaf.number * kLeafPages + i, f);
}

// A run of neighbours: copied, written, settled.
Task<Status> Cache::Impl::write_batch(DirtySet& set, const DirtySet::Page* pages, size_t n, Volume& lower) {
  AlignedBuffer bounce(n * kPageSize);
  Status s{};
  Node& node = *set.node;
  if (!bounce) {
    s = fail(ErrorKind::kNoMemory, fmt::format("cache: node {}: writeback buffer", node.key));
  } else {
    for (size_t k = 0; k < n; ++k)
      frame_copy(bounce.data() + k * kPageSize, store->data(pages[k].frame), kPageSize);
    IoContext ctx;
    ctx.io_class = IoClass::kWriteback;
    if (set.tenant != nullptr) ctx.group = static_cast<GroupId>(set.tenant->group->id());
    const iovec one{bounce.data(), n * kPageSize};
    const uint64_t offset = pages[0].page * kPageSize;
    if (offset + n * kPageSize > lower.size())
      s = fail(ErrorKind::kOutOfRange, fmt::format("cache: node {}: dirty page beyond the end of {}", node.key,
                                                   lower.name()));
    else
      s = co_await lower.write(ctx, offset, Iov(&one, 1));
    wb_requests.fetch_add(1, std::memory_order_relaxed);
    if (s) wb_bytes.fetch_add(n * kPageSize, std::memory_order_relaxed);
  }
  if (!s) {
    wb_errors.fetch_add(1, std::memory_order_relaxed);
    set.errors.fetch_add(1, std::memory_order_relaxed);
    LOG_LIMITED(LogLevel::kWarn, "cache", "node {}: writeback of {} pages at {}: {}", node.key, n,
                pages[0].page * kPageSize, s.error().message());
  }
  for (size_t k = 0; k < n; ++k) {
    Leaf* leaf = node.index.lock(pages[k].page / kLeafPages);
    SPILLWAY_ASSERT(leaf != nullptr);  // a frame under writeback stays in the index
    const unsigned i = pages[k].page % kLeafPages;
    const FrameId f = pages[k].frame;
    Frame& fr = store->frame(f);
    fr.writeback = false;
    fr.suspect = !s;
    if (!s) {
      // Also when somebody else dirtied it meanwhile: that put it into that tenant's set, and ours is not down.
      fr.dirty = true;
      set.push(pages[k].page, f);
    }
    settle(*leaf, i, f);
    node.index.unlock(leaf);
    put(f);
  }
  co_return s;
}

static Task<void> write_next(Cache::Impl& c, DirtySet& set, const std::vector<DirtySet::Page>& all,
                             const std::vector<std::pair<size_t, size_t>>& batches, size_t& next, Volume& lower,
                             Status& first, AsyncCounter& left) {
  while (next < batches.size()) {
    const auto [at, n] = batches[next++];
    Status s = co_await c.write_batch(set, all.data() + at, n, lower);
    if (!s && first) first = std::move(s);
  }
  left.done();
}

// Takes from `pages` what is dirty for this round, in disk order; what is under way in a round of another tenant's set
// goes to `elsewhere`. The rest is clean, or no more.
static std::vector<DirtySet::Page> take_dirty(Cache::Impl& c, Node& node, std::vector<DirtySet::Page>& pages,
                                              std::vector<DirtySet::Page>& elsewhere) {
  std::sort(pages.begin(), pages.end());
  // A page that is named twice must not meet itself under writeback.
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  std::vector<DirtySet::Page> all;
  for (auto& p : pages) {
    Leaf* leaf = node.index.lock(p.page / kLeafPages);
    if (leaf == nullptr) continue;
    if (leaf->at(p.page % kLeafPages) == p.frame) {
      Frame& fr = c.store->frame(p.frame);
      if (fr.writeback) {
        elsewhere.push_back(p);
      } else if (fr.dirty) {
        fr.dirty = false;
        fr.writeback = true;
        fr.refs.fetch_add(1, std::memory_order_relaxed);
        all.push_back(p);
      }
    }
    node.index.unlock(leaf);
  }
  return all;
}

// Writes what take_dirty took: neighbours together, several batches at once. First error.
static Task<Status> write_all(Cache::Impl& c, DirtySet& set, const std::vector<DirtySet::Page>& all, Volume& lower) {
  if (all.empty()) co_return Status{};
  // A batch ends where a stripe does, so that a layer below sees whole ones.
  const uint64_t stripe = lower.geometry().opt_io;
  uint64_t batch_max = kBatchBytesMax;
  if (stripe > kPageSize && stripe % kPageSize == 0)
    batch_max = std::max(stripe, kBatchBytesMax / stripe * stripe);
  // Constant while the page is under writeback, and it is ours.
  auto suspect = [&](const DirtySet::Page& p) { return c.store->frame(p.frame).suspect; };
  std::vector<std::pair<size_t, size_t>> batches;
  for (size_t a = 0; a < all.size();) {
    const uint64_t end = align_down(all[a].page * kPageSize, batch_max) + batch_max;
    size_t b = a + 1;
    while (b < all.size() && all[b].page == all[b - 1].page + 1 && all[b].page * kPageSize < end &&
           !suspect(all[b - 1]) && !suspect(all[b]))
      ++b;
    batches.emplace_back(a, b - a);
    a = b;
  }
  Status first{};
  size_t next = 0;
  AsyncCounter left;
  const size_t lanes = std::min(kBatchesInFlight, batches.size());
  left.add(lanes);
  for (size_t k = 0; k < lanes; ++k)
    Reactor::current().spawn(write_next(c, set, all, batches, next, lower, first, left));
  co_await left.wait_idle();
  co_return first;
}

// What was in the set for pages [first_page, end_page) when the round began. set.round is held by the caller.
Task<Status> Cache::Impl::write_round(DirtySet& set, uint64_t first_page, uint64_t end_page) {
  constexpr int kTurns = 16;
  Node& node = *set.node;
  std::shared_ptr<Volume> lower = node.volume();
  if (lower == nullptr) co_return Status{};  // detached: it stays dirty in the holder's memory
  std::vector<DirtySet::Page> taken;
  {
    std::lock_guard guard(set.lock);
    if (first_page == 0 && end_page == UINT64_MAX) {
      taken.swap(set.pages);
    } else {
      auto in = [&](const DirtySet::Page& p) { return p.page >= first_page && p.page < end_page; };
      std::copy_if(set.pages.begin(), set.pages.end(), std::back_inserter(taken), in);
      std::erase_if(set.pages, in);
    }
  }
  Status first{};
  for (int turn = 0; !taken.empty(); ++turn) {
    std::vector<DirtySet::Page> elsewhere;
    const std::vector<DirtySet::Page> ours = take_dirty(*this, node, taken, elsewhere);
    Status s = co_await write_all(*this, set, ours, *lower);
    if (!s && first) first = std::move(s);
    if (turn == kTurns) {
      // Others write and flush these pages without end. They are in our set still: a later round sees to them.
      for (auto& p : elsewhere) set.push(p.page, p.frame);
      if (first && !elsewhere.empty())
        first = fail(ErrorKind::kTimeout, fmt::format("cache: node {}: page {} is always being written for another "
                                                      "tenant", node.key, elsewhere[0].page));
      break;
    }
    // Another tenant's round has them; it waits for nothing of ours, so it ends. What it leaves dirty is ours to write.
    for (auto& p : elsewhere) {
      for (;;) {
        Leaf* leaf = node.index.lock(p.page / kLeafPages);
        if (leaf == nullptr) break;
        const bool busy = leaf->at(p.page % kLeafPages) == p.frame && store->frame(p.frame).writeback;
        node.index.unlock(leaf);
        if (!busy) break;
        co_await Reactor::current().sleep_for(100'000);
      }
    }
    taken = std::move(elsewhere);
  }
  punch_if_many();
  co_return first;
}

// Everything acknowledged before the call is below, and stable when flush_lower.
Task<Status> Cache::Impl::flush_set(DirtySet& set, Volume& lower, bool flush_lower) {
  uint64_t ticket = 0;
  {
    std::lock_guard guard(set.lock);
    ticket = set.next_ticket++;
  }
  auto guard = co_await set.round.guard();
  if (flush_lower && set.done_ticket > ticket) co_return set.last;
  uint64_t upto = 0;
  {
    std::lock_guard lock(set.lock);
    upto = set.next_ticket;
  }
  Status s = co_await write_round(set);
  if (flush_lower) {
    IoContext ctx;
    ctx.io_class = IoClass::kWriteback;
    if (set.tenant != nullptr) ctx.group = static_cast<GroupId>(set.tenant->group->id());
    Status f = co_await lower.flush(ctx);
    if (!f && s) s = std::move(f);
    set.done_ticket = upto;
    set.last = s;
  }
  co_return s;
}

Task<Status> Cache::Impl::flush_node(Node& n, DirtySet* own) {
  std::shared_ptr<Volume> lower = n.volume();
  if (lower == nullptr) co_return Status{};
  Status first{};
  if (n.recovered.any()) first = co_await flush_set(n.recovered, *lower, own == nullptr);
  std::vector<DirtySet*> sets;
  if (own != nullptr) {
    sets.push_back(own);
  } else {
    std::lock_guard guard(n.mutex);
    for (auto& s : n.sets) sets.push_back(s.get());
  }
  for (DirtySet* set : sets) {
    Status s = co_await flush_set(*set, *lower, true);
    if (!s && first) first = std::move(s);
  }
  co_return first;
}

Task<Status> Cache::Impl::flush_everything() {
  std::vector<Node*> nodes;
  {
    std::lock_guard guard(mutex_);
    for (auto& n : nodes_) nodes.push_back(n.get());
  }
  Status first{};
  for (Node* n : nodes) {
    Status s = co_await flush_node(*n, nullptr);
    if (!s && first) first = std::move(s);
  }
  co_return first;
}

// ---- background ----------------------------------------------------------------------------------------------------

// A round soon: the tenant has half its dirty limit, or dirty pages hold frames that no view wants. Any thread; cheap
// when one is under way. May be called with locks held: it only posts.
void Cache::Impl::kick(DirtySet& set) {
  if (options.background == nullptr || closing.load(std::memory_order_acquire)) return;
  if (set.running.exchange(true, std::memory_order_acq_rel)) return;
  background_tasks.add();
  options.background->post([this, &set] { Reactor::current().spawn(run_set(&set)); });
}

Task<void> Cache::Impl::run_set(DirtySet* set) {
  {
    auto guard = co_await set->round.guard();
    Status s = co_await write_round(*set);
    (void)s;  // the pages stay dirty; whoever flushes learns it
  }
  set->running.store(false, std::memory_order_release);
  background_tasks.done();
}

// One timer while anything is dirty, none otherwise.
void Cache::Impl::start_ticker() {
  if (options.background == nullptr || closing.load(std::memory_order_acquire)) return;
  if (ticking.load(std::memory_order_relaxed) || ticking.exchange(true, std::memory_order_acq_rel)) return;
  background_tasks.add();
  options.background->post([this] { Reactor::current().spawn(tick()); });
}

Task<void> Cache::Impl::tick() {
  Reactor& reactor = Reactor::current();
  unsigned failures = 0;
  while (!closing.load(std::memory_order_acquire)) {
    {
      IoAwait sleep = reactor.sleep_for(options.dirty_expire_ns << std::min(failures, 5u));
      tick_sleep = &sleep;
      (void)co_await sleep;
      tick_sleep = nullptr;
    }
    if (closing.load(std::memory_order_acquire)) break;
    std::vector<DirtySet*> sets;
    {
      std::lock_guard guard(mutex_);
      for (auto& n : nodes_) {
        std::lock_guard node_guard(n->mutex);
        if (n->lower.expired()) continue;
        for (auto& s : n->sets)
          if (s->any()) sets.push_back(s.get());
        if (n->recovered.any()) sets.push_back(&n->recovered);
      }
    }
    if (sets.empty()) {
      ticking.store(false, std::memory_order_seq_cst);
      // Somebody may have dirtied a page after the look and before the store, and found us still ticking.
      bool more = false;
      {
        std::lock_guard guard(mutex_);
        for (auto& n : nodes_) {
          std::lock_guard node_guard(n->mutex);
          if (n->lower.expired()) continue;
          for (auto& s : n->sets) more |= s->any();
          more |= n->recovered.any();
        }
      }
      if (!more || ticking.exchange(true)) break;
      continue;
    }
    bool failed = false;
    for (DirtySet* set : sets) {
      auto guard = co_await set->round.guard();
      Status s = co_await write_round(*set);
      failed |= !s.has_value();
    }
    failures = failed ? failures + 1 : 0;
  }
  background_tasks.done();
}

Task<void> Cache::Impl::stop_background() {
  closing.store(true, std::memory_order_seq_cst);
  if (options.background != nullptr) {
    background_tasks.add();  // the message too: `this` must outlive it
    options.background->post([this] {
      if (tick_sleep != nullptr) Reactor::current().cancel(*tick_sleep);
      background_tasks.done();
    });
    co_await background_tasks.wait_idle();
  }
}

}  // namespace spillway
