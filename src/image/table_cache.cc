#include "src/image/table_cache.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#include <fmt/core.h>

namespace spillway::qcow2 {

Slice* Slice::make(uint64_t index, uint32_t bytes) {
  void* p = ::operator new(sizeof(Slice) + bytes, std::nothrow);
  if (p == nullptr) return nullptr;
  Slice* s = new (p) Slice;
  s->index = index;
  std::memset(static_cast<void*>(s->bytes()), 0, bytes);
  return s;
}

void SliceDelete::operator()(Slice* s) const noexcept {
  s->~Slice();
  ::operator delete(s);
}

TableCache::TableCache(uint32_t slice_bytes, uint64_t slices, uint64_t limit_bytes, Loader loader)
    : slice_bytes_(slice_bytes),
      limit_(std::max<uint64_t>(limit_bytes, 64 * uint64_t{slice_bytes})),
      loader_(std::move(loader)),
      top_(new Top(slices / kLeafSlices + 1)) {}

TableCache::~TableCache() {
  if (shrinker_) shrinker_.free();
  // No reader is left: the image ends with no request in flight.
  Top* top = top_.load();
  for (uint64_t i = 0; i < top->size; ++i) delete top->leaves[i].load();
  while (head_ != nullptr) {
    Slice* s = head_;
    head_ = s->next;
    SliceDelete()(s);
  }
  delete top;
}

Status TableCache::enrol(reclaim::Registry& registry, std::string_view name) {
  reclaim::Errc why{};
  shrinker_ = registry.alloc(reclaim::ShrinkerFlags::kNoBlock, name, &why);
  if (!shrinker_) return fail(ErrorKind::kNoMemory, fmt::format("shrinker {}: {}", name, reclaim::to_string(why)));
  shrinker_.set_count([this](const reclaim::ScanRequest&) { return count_report(); });
  shrinker_.set_scan([this](const reclaim::ScanRequest& r) { return shrink(r.nr_to_scan, ~uint64_t{0}); });
  why = shrinker_.register_();
  if (why != reclaim::Errc::kOk)
    return fail(ErrorKind::kNoMemory, fmt::format("shrinker {}: {}", name, reclaim::to_string(why)));
  announce();
  return {};
}

void TableCache::announce() {
  if (shrinker_) shrinker_.set_bit();
}

// Parks behind the loader of a slice. The spin lock is held on entry and released once we are queued.
struct TableCache::WaitLoad {
  TableCache& c;
  Loading& l;
  Waiter w;
  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> h) {
    w.handle = h;
    w.reactor = &Reactor::current();
    l.waiters.push(&w);
    c.spin_.unlock();
  }
  void await_resume() const noexcept {}
};

Task<Result<SlicePin>> TableCache::get(IoContext ctx, uint64_t index) {
  for (;;) {
    spin_.lock();
    Slice* s = nullptr;
    {
      reclaim::RcuGuard guard;
      s = find(index);
      if (s != nullptr) {
        ++s->pins;
        s->referenced.store(true, std::memory_order_relaxed);
      }
    }
    if (s != nullptr) {
      spin_.unlock();
      co_return SlicePin(this, s);
    }
    auto [it, mine] = loading_.try_emplace(index);
    if (mine) {
      spin_.unlock();
      break;
    }
    co_await WaitLoad{*this, it->second, {}};
  }
  Slice* s = Slice::make(index, slice_bytes_);
  Status status{};
  if (s == nullptr) status = fail(ErrorKind::kNoMemory, "image: no memory for a table");
  else status = co_await loader_(ctx, index, s->bytes());
  stats_.loads.fetch_add(1, std::memory_order_relaxed);
  spin_.lock();
  if (status) status = insert_locked(s);
  auto node = loading_.extract(index);
  spin_.unlock();
  node.mapped().waiters.wake_all();
  if (!status) {
    if (s != nullptr) SliceDelete()(s);
    co_return std::unexpected(std::move(status).error());
  }
  announce();
  co_return SlicePin(this, s);
}

Result<SlicePin> TableCache::put_new(uint64_t index) {
  Slice* s = Slice::make(index, slice_bytes_);
  if (s == nullptr) return fail(ErrorKind::kNoMemory, "image: no memory for a table");
  spin_.lock();
  Status status = insert_locked(s);
  spin_.unlock();
  if (!status) {
    SliceDelete()(s);
    return std::unexpected(std::move(status).error());
  }
  announce();
  return SlicePin(this, s);
}

// Pins it. Nobody else can have put it there: one loader a slice, and new tables have none.
Status TableCache::insert_locked(Slice* s) {
  Top* top = top_.load();
  SPILLWAY_ASSERT(s->index / kLeafSlices < top->size);
  auto& place = top->leaves[s->index / kLeafSlices];
  Leaf* leaf = place.load();
  if (leaf == nullptr) {
    leaf = new (std::nothrow) Leaf;
    if (leaf == nullptr) return fail(ErrorKind::kNoMemory, "image: no memory for a table");
    place.store(leaf);
  }
  SPILLWAY_ASSERT(leaf->slices[s->index % kLeafSlices].load() == nullptr);
  s->pins = 1;
  leaf->slices[s->index % kLeafSlices].store(s);
  list_add_tail(s);
  count_.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < 64 && bytes() > limit_ && head_ != s; ++i) {
    Slice* old = head_;
    if (old->pins == 0 && !old->dirty && !old->referenced.exchange(false, std::memory_order_relaxed)) {
      evict_locked(old);
      if (bytes() <= limit_) break;
    } else {
      list_remove(old);
      list_add_tail(old);
    }
  }
  return {};
}

void TableCache::evict_locked(Slice* s) {
  top_.load()->leaves[s->index / kLeafSlices].load()->slices[s->index % kLeafSlices].store(nullptr);
  list_remove(s);
  count_.fetch_sub(1, std::memory_order_relaxed);
  stats_.evictions.fetch_add(1, std::memory_order_relaxed);
  s->retire(sizeof(Slice) + slice_bytes_);
}

reclaim::ScanReport TableCache::shrink(uint64_t nr, uint64_t want) {
  reclaim::ScanReport report;
  std::lock_guard lock(spin_);
  nr = std::min(nr, count_.load(std::memory_order_relaxed));
  while (report.scanned < nr && report.freed_objects < want && head_ != nullptr) {
    Slice* s = head_;
    ++report.scanned;
    if (s->dirty) ++report.not_freed_dirty;
    else if (s->pins > 0) ++report.not_freed_pinned;
    else if (s->referenced.exchange(false, std::memory_order_relaxed)) ++report.not_freed_referenced;
    else {
      evict_locked(s);
      ++report.freed_objects;
      report.freed_bytes += sizeof(Slice) + slice_bytes_;
      continue;
    }
    list_remove(s);
    list_add_tail(s);
  }
  report.status = head_ == nullptr ? reclaim::ScanStatus::kEmpty : reclaim::ScanStatus::kProgress;
  return report;
}

reclaim::CountReport TableCache::count_report() const {
  const uint64_t all = count_.load(std::memory_order_relaxed), dirty = dirty_count_.load(std::memory_order_relaxed);
  if (all == 0) return reclaim::CountReport::empty();
  reclaim::CountReport r;
  r.objects = all - std::min(all, dirty);
  r.bytes = r.objects * (sizeof(Slice) + slice_bytes_);
  r.pinned_bytes = dirty * (sizeof(Slice) + slice_bytes_);
  return r;
}

void TableCache::grow(uint64_t slices) {
  spin_.lock();
  Top* old = top_.load();
  const uint64_t n = slices / kLeafSlices + 1;
  if (n <= old->size) {
    spin_.unlock();
    return;
  }
  Top* fresh = new Top(n);
  for (uint64_t i = 0; i < old->size; ++i) fresh->leaves[i].store(old->leaves[i].load());
  top_.store(fresh);
  spin_.unlock();
  old->retire();
}

void TableCache::mark_dirty(const SlicePin& pin) {
  std::lock_guard lock(spin_);
  if (pin->dirty) return;
  pin->dirty = true;
  dirty_.push_back(pin.get());
  dirty_count_.fetch_add(1, std::memory_order_relaxed);
}

std::vector<SlicePin> TableCache::take_dirty() {
  std::vector<SlicePin> all;
  std::lock_guard lock(spin_);
  all.reserve(dirty_.size());
  for (Slice* s : dirty_) {
    s->dirty = false;
    ++s->pins;
    all.emplace_back(this, s);
  }
  dirty_.clear();
  dirty_count_.store(0, std::memory_order_relaxed);
  return all;
}

void TableCache::unpin(Slice* s) {
  std::lock_guard lock(spin_);
  SPILLWAY_ASSERT(s->pins > 0);
  --s->pins;
}

void TableCache::list_add_tail(Slice* s) {
  s->next = nullptr;
  s->prev = tail_;
  (tail_ != nullptr ? tail_->next : head_) = s;
  tail_ = s;
}

void TableCache::list_remove(Slice* s) {
  (s->prev != nullptr ? s->prev->next : head_) = s->next;
  (s->next != nullptr ? s->next->prev : tail_) = s->prev;
  s->prev = s->next = nullptr;
}

}  // namespace spillway::qcow2
