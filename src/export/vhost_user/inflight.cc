#include "src/export/vhost_user/inflight.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "src/base/units.h"

namespace spillway::vhost {

namespace {
// Stores stay in program order for whoever reads after this process died: on x86 the compiler alone could reorder them,
// elsewhere the release fence keeps the order for another CPU.
void order() { std::atomic_thread_fence(std::memory_order_release); }

uint16_t load_used_idx(const virtio::RingConfig& ring) {
  using u16 = uint16_t __attribute__((may_alias));
  return __atomic_load_n(reinterpret_cast<const u16*>(ring.device + 2), __ATOMIC_ACQUIRE);
}
constexpr uint16_t kWrapBit = 1 << 15;

// The used positions of a packed log, now and before the batch that is being published, change with one store: a kill between
// two of their fields would leave a position that never was.
void store_positions(InflightPacked* h, uint16_t used, uint16_t old_used) {
  static_assert(offsetof(InflightPacked, used_idx) == 16 && offsetof(InflightPacked, padding) == 22);
  using u64 = uint64_t __attribute__((may_alias));
  const auto index = [](uint16_t p) { return uint64_t{static_cast<uint16_t>(p & ~kWrapBit)}; };
  const auto wrap = [](uint16_t p) { return uint64_t{(p & kWrapBit) != 0}; };
  __atomic_store_n(reinterpret_cast<u64*>(reinterpret_cast<std::byte*>(h) + 16),
                   index(used) | index(old_used) << 16 | wrap(used) << 32 | wrap(old_used) << 40, __ATOMIC_RELEASE);
}
}  // namespace

uint64_t InflightLog::region_size(unsigned queue_size, bool packed) {
  return packed ? align_up(sizeof(InflightPacked) + sizeof(InflightPackedEntry) * queue_size, 64)
                : align_up(sizeof(InflightSplit) + sizeof(InflightSplitEntry) * queue_size, 64);
}

void InflightLog::reset(const virtio::RingConfig& ring) {
  std::memset(region_, 0, region_size(n_, packed_));
  counter_ = 0;
  if (!packed_) {
    split()->version = 1;
    split()->used_idx = load_used_idx(ring);
    order();
    split()->desc_num = n_;
    return;
  }
  InflightPacked* h = packed_head();
  free_head_ = 0;
  free_next_.resize(n_);
  last_.assign(n_, 0);
  for (uint16_t i = 0; i < n_; ++i) {
    free_next_[i] = static_cast<uint16_t>(i + 1);
    packed_entries()[i].next = free_next_[i];
  }
  h->version = 1;
  store_positions(h, ring.next_used, ring.next_used);
  order();
  h->desc_num = n_;
}

InflightLog InflightLog::fresh(std::byte* region, unsigned n, const virtio::RingConfig& ring) {
  InflightLog log;
  log.region_ = region;
  log.n_ = static_cast<uint16_t>(n);
  log.packed_ = ring.packed;
  log.reset(ring);
  return log;
}

InflightLog InflightLog::recover(std::byte* region, unsigned n, const virtio::RingConfig& ring,
                                 bool adopted, Recovered* out) {
  InflightLog log;
  log.region_ = region;
  log.n_ = static_cast<uint16_t>(n);
  log.packed_ = ring.packed;
  out->next_avail = ring.next_avail;
  out->next_used = ring.next_used;
  const uint16_t had = ring.packed ? log.packed_head()->desc_num : log.split()->desc_num;
  if (had != n) {
    log.reset(ring);
    // A ring that stood still has answered all it took.
    if (adopted && !ring.packed) out->next_avail = ring.next_used;
  }
  else if (ring.packed) log.recover_packed(ring, out);
  else log.recover_split(ring, adopted, out);
  return log;
}

void InflightLog::recover_split(const virtio::RingConfig& ring, bool adopted, Recovered* out) {
  InflightSplit* h = split();
  const uint16_t used = load_used_idx(ring);
  const auto unfinished = static_cast<uint16_t>(used - h->used_idx);
  if (unfinished > n_) {  // the ring was made anew since: the log is of another life
    reset(ring);
    return;
  }
  uint16_t head = h->last_batch_head;
  for (uint16_t i = 0; i < unfinished && head < n_; ++i) {
    split_entries()[head].inflight = 0;
    head = split_entries()[head].next;
  }
  order();
  h->used_idx = used;
  for (uint16_t i = 0; i < n_; ++i) {
    const InflightSplitEntry& e = split_entries()[i];
    if (e.inflight == 1) out->left.push_back({i, {}, e.counter});
    counter_ = std::max(counter_, e.counter + 1);
  }
  std::sort(out->left.begin(), out->left.end(),
            [](const Left& a, const Left& b) { return a.counter < b.counter; });
  out->next_used = used;
  if (adopted || !out->left.empty()) out->next_avail = static_cast<uint16_t>(used + out->left.size());
}

// A packed ring keeps no position that the device could read: a log that holds one is right, whatever the front-end says (QEMU
// says where the ring began when it comes back after a loss). One that does not was retired or is new.
void InflightLog::recover_packed(const virtio::RingConfig& ring, Recovered* out) {
  InflightPacked* h = packed_head();
  InflightPackedEntry* entries = packed_entries();
  struct Copy {
    uint16_t used_idx, old_used_idx, free_head, old_free_head;
    bool used_wrap, old_used_wrap;
  } c{h->used_idx, h->old_used_idx, h->free_head, h->old_free_head, h->used_wrap != 0, h->old_used_wrap != 0};
  if (c.used_idx >= n_ || c.old_used_idx >= n_) {
    reset(ring);
    return;
  }
  if (c.used_idx != c.old_used_idx || c.used_wrap != c.old_used_wrap) {
    // Died between before_publish and after_publish. The first element's flags are written last. As long as they are not, its slot
    // says "available in that lap" and the driver cannot touch it. Any other value: the batch was visible, and the driver may have
    // put the slot to new use meanwhile.
    using u16 = uint16_t __attribute__((may_alias));
    const uint16_t flags = __atomic_load_n(
        reinterpret_cast<const u16*>(ring.desc + 16u * c.old_used_idx + 14), __ATOMIC_ACQUIRE);
    const bool visible = ((flags & virtio::kDescUsed) != 0) == c.old_used_wrap ||
                         ((flags & virtio::kDescAvail) != 0) != c.old_used_wrap;
    if (visible) {
      // The chains that joined the free list in this batch: from its new head to its old one.
      uint16_t at = c.free_head;
      for (uint16_t i = 0; i < n_ && at < n_ && at != c.old_free_head; ++i) {
        entries[at].inflight = 0;
        at = entries[at].next;
      }
    } else {
      c.used_idx = c.old_used_idx;
      c.used_wrap = c.old_used_wrap;
    }
  }
  order();
  out->next_used = static_cast<uint16_t>(c.used_idx | (c.used_wrap ? kWrapBit : 0));
  store_positions(h, out->next_used, out->next_used);
  // Requests still marked, each a list of entries from its head. An entry belongs to one request at most. The marks stay as
  // they are, so that a kill from here on leaves them to the next successor.
  last_.assign(n_, 0);
  free_next_.assign(n_, n_);
  std::vector<bool> taken(n_, false);
  unsigned slots = 0;
  for (uint16_t i = 0; i < n_; ++i) {
    if (entries[i].inflight != 1) continue;
    Left left{i, {}, entries[i].counter};
    counter_ = std::max(counter_, left.counter + 1);
    const uint16_t num = entries[i].num;
    std::vector<uint16_t> own;
    uint16_t at = i;
    for (uint16_t k = 0; k < num && at < n_ && !taken[at]; ++k) {
      taken[at] = true;
      own.push_back(at);
      const InflightPackedEntry& e = entries[at];
      left.descs.push_back({e.addr, e.len, e.id, e.flags});
      at = e.next;
    }
    if (num == 0 || own.size() != num || slots + num > n_) {  // somebody scribbled here
      for (uint16_t o : own) taken[o] = false;
      entries[i].inflight = 0;
      continue;
    }
    for (size_t k = 0; k + 1 < own.size(); ++k) free_next_[own[k]] = own[k + 1];
    last_[i] = own.back();
    slots += num;
    out->left.push_back(std::move(left));
  }
  std::sort(out->left.begin(), out->left.end(),
            [](const Left& a, const Left& b) { return a.counter < b.counter; });
  unsigned at = c.used_idx + slots;
  bool wrap = c.used_wrap;
  if (at >= n_) {
    at -= n_;
    wrap = !wrap;
  }
  out->next_avail = static_cast<uint16_t>(at | (wrap ? kWrapBit : 0));
  // All others are free, in any order.
  free_head_ = n_;
  for (uint16_t i = n_; i-- > 0;) {
    if (taken[i]) continue;
    free_next_[i] = entries[i].next = free_head_;
    free_head_ = i;
  }
  h->free_head = h->old_free_head = free_head_;
}

void InflightLog::retire() {
  if (region_ == nullptr) return;
  if (packed_) packed_head()->desc_num = 0;
  else split()->desc_num = 0;
}

uint16_t InflightLog::mark(const virtio::Virtqueue& vq, uint16_t chain_id) {
  if (!packed_) {
    InflightSplitEntry& e = split_entries()[chain_id];
    e.counter = counter_++;
    order();
    e.inflight = 1;
    return chain_id;
  }
  const auto raw = vq.last_raw();
  const uint16_t head = free_head_;  // enough are free: no more descriptors are outstanding than there are entries
  uint16_t last = head;
  for (const virtio::RawDesc& d : raw) {
    SPILLWAY_ASSERT(free_head_ < n_);
    last = free_head_;
    InflightPackedEntry& e = packed_entries()[free_head_];
    e.addr = d.addr, e.len = d.len, e.id = d.id, e.flags = d.flags;
    free_head_ = free_next_[free_head_];
  }
  InflightPackedEntry& e = packed_entries()[head];
  e.num = static_cast<uint16_t>(raw.size());
  e.last = last;
  e.counter = counter_++;
  last_[head] = last;
  order();
  e.inflight = 1;
  packed_head()->free_head = free_head_;
  order();
  packed_head()->old_free_head = free_head_;
  return head;
}

void InflightLog::before_publish(std::span<const uint16_t> tokens, const virtio::Virtqueue& vq) {
  if (!packed_) {
    for (uint16_t t : tokens) {
      split_entries()[t].next = last_batch_head_;
      last_batch_head_ = t;
    }
    split()->last_batch_head = last_batch_head_;
    order();
    return;
  }
  InflightPacked* h = packed_head();
  for (uint16_t t : tokens) {
    free_next_[last_[t]] = free_head_;
    packed_entries()[last_[t]].next = free_head_;
    free_head_ = t;
  }
  h->free_head = free_head_;
  store_positions(h, vq.pending_used(), vq.next_used());
  order();
}

void InflightLog::after_publish(std::span<const uint16_t> tokens, const virtio::Virtqueue& vq) {
  order();
  if (!packed_) {
    for (uint16_t t : tokens) split_entries()[t].inflight = 0;
    order();
    split()->used_idx = vq.next_used();
    return;
  }
  InflightPacked* h = packed_head();
  for (uint16_t t : tokens) packed_entries()[t].inflight = 0;
  order();
  h->old_free_head = free_head_;
  store_positions(h, vq.next_used(), vq.next_used());
}

}  // namespace spillway::vhost
