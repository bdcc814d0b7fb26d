#include "src/virtio/virtqueue.h"

#include <atomic>
#include <cstring>

#include <fmt/core.h>

namespace spillway::virtio {

namespace {

// Shared memory is accessed by these only; the types may alias whatever lies there.
using u16 = uint16_t __attribute__((may_alias));
using u32 = uint32_t __attribute__((may_alias));
using u64 = uint64_t __attribute__((may_alias));

uint16_t load16(const std::byte* p) {
  return __atomic_load_n(reinterpret_cast<const u16*>(p), __ATOMIC_RELAXED);
}
uint16_t load16_acquire(const std::byte* p) {
  return __atomic_load_n(reinterpret_cast<const u16*>(p), __ATOMIC_ACQUIRE);
}
void store16(std::byte* p, uint16_t v) {
  __atomic_store_n(reinterpret_cast<u16*>(p), v, __ATOMIC_RELAXED);
}
void store16_release(std::byte* p, uint16_t v) {
  __atomic_store_n(reinterpret_cast<u16*>(p), v, __ATOMIC_RELEASE);
}
uint32_t load32(const std::byte* p) {
  return __atomic_load_n(reinterpret_cast<const u32*>(p), __ATOMIC_RELAXED);
}
void store64(std::byte* p, uint64_t v) {
  __atomic_store_n(reinterpret_cast<u64*>(p), v, __ATOMIC_RELAXED);
}

// Sixteen bytes read once into a local that the compiler cannot read again from the source. Any alignment.
template <class Desc>
Desc load_desc(const std::byte* p) {
  uint64_t half[2];
  std::memcpy(half, p, sizeof half);
  asm volatile("" : "+r"(half[0]), "+r"(half[1])::"memory");
  return std::bit_cast<Desc>(half);
}

// VIRTIO 1.3, 2.7.10: has the index moved past `event` on its way from `old_index` to `new_index`?
bool passed(uint16_t event, uint16_t new_index, uint16_t old_index) {
  return static_cast<uint16_t>(new_index - event - 1) < static_cast<uint16_t>(new_index - old_index);
}

constexpr uint16_t kWrapBit = 1 << 15;

// The driver orders requests of different queues through its own view of the ring, which ThreadSanitizer cannot connect with
// ours (another mapping, another process). One atomic stands for the driver there; otherwise this is nothing.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPILLWAY_TSAN 1
#endif
#endif
#if defined(SPILLWAY_TSAN) || defined(__SANITIZE_THREAD__)
std::atomic<uint32_t> g_driver{0};
void driver_saw() { g_driver.fetch_add(1, std::memory_order_acq_rel); }
void driver_acted() { g_driver.load(std::memory_order_acquire); }
#else
void driver_saw() {}
void driver_acted() {}
#endif

}  // namespace

RingAreas RingAreas::of(unsigned n, bool packed) {
  if (packed) return {uint64_t{16} * n, 4, 4};
  return {uint64_t{16} * n, 6 + uint64_t{2} * n, 6 + uint64_t{8} * n};
}

Status Virtqueue::start(const RingConfig& config, const GuestMemory* memory) {
  const unsigned n = config.size;
  if (n == 0 || n > kMaxQueueSize || (!config.packed && (n & (n - 1)) != 0))
    return fail(ErrorKind::kInvalid, fmt::format("ring size {}", n));
  auto misaligned = [](const std::byte* p, uint64_t to) {
    return p == nullptr || reinterpret_cast<uintptr_t>(p) % to != 0;
  };
  if (misaligned(config.desc, RingAreas::kDescAlign) ||
      misaligned(config.driver, RingAreas::driver_align(config.packed)) ||
      misaligned(config.device, RingAreas::kDeviceAlign))
    return fail(ErrorKind::kInvalid, "ring address missing or misaligned");
  if (config.packed && ((config.next_avail & ~kWrapBit) >= n || (config.next_used & ~kWrapBit) >= n))
    return fail(ErrorKind::kInvalid, fmt::format("ring position {:#x}/{:#x} outside of {} slots",
                                                 config.next_avail, config.next_used, n));
  config_ = config;
  memory_ = memory;
  broken_ = nullptr;
  hints_ = {};
  ahead_hint_ = 0;
  mask_ = static_cast<uint16_t>(n - 1);
  unpublished_ = outstanding_ = packed_span_ = 0;
  kicks_ = true;
  if (config.packed) {
    next_avail_ = config.next_avail & ~kWrapBit;
    avail_wrap_ = (config.next_avail & kWrapBit) != 0;
    next_used_ = published_ = config.next_used & ~kWrapBit;
    used_wrap_ = published_wrap_ = (config.next_used & kWrapBit) != 0;
  } else {
    next_avail_ = avail_shadow_ = config.next_avail;
    next_used_ = published_ = config.next_used;
  }
  disarm();
  return {};
}

uint16_t Virtqueue::next_avail() const {
  return config_.packed ? static_cast<uint16_t>(next_avail_ | (avail_wrap_ ? kWrapBit : 0)) : next_avail_;
}

uint16_t Virtqueue::next_used() const {
  return config_.packed ? static_cast<uint16_t>(published_ | (published_wrap_ ? kWrapBit : 0)) : published_;
}

uint16_t Virtqueue::pending_used() const {
  return config_.packed ? static_cast<uint16_t>(next_used_ | (used_wrap_ ? kWrapBit : 0)) : next_used_;
}

std::string Virtqueue::reason() const {
  return broken_ == nullptr ? std::string("not broken") : fmt::format("{} ({})", broken_, broken_value_);
}

// ---- split ---------------------------------------------------------------------------------------------------

bool Virtqueue::split_available() {
  if (avail_shadow_ != next_avail_) return true;
  avail_shadow_ = load16_acquire(config_.driver + 2);  // pairs with the driver's release of avail.idx
  driver_acted();
  return avail_shadow_ != next_avail_;
}

// The driver's stores are in another CPU's cache: start their transfer while the requests before are served. What is
// read here decides nothing but what is fetched, so it may be anything.
void Virtqueue::prefetch_ahead(uint16_t ahead) {
  const auto head_at = [this](unsigned distance) {
    return load16(config_.driver + 4 + 2 * ((next_avail_ + distance) & mask_));
  };
  if (ahead > 4) {
    const uint16_t head = head_at(4);
    if (head < config_.size) {  // a request's descriptors mostly follow one another
      __builtin_prefetch(config_.desc + 16u * head);
      __builtin_prefetch(config_.desc + 16u * head + 32);
    }
  }
  if (ahead > 2) {
    const uint16_t head = head_at(2);
    if (head >= config_.size) return;
    using u64 = uint64_t __attribute__((may_alias));
    const uint64_t addr =
        __atomic_load_n(reinterpret_cast<const u64*>(config_.desc + 16u * head), __ATOMIC_RELAXED);
    const GuestRegion* r = memory_->find(addr, ahead_hint_);
    if (r != nullptr && r->host != nullptr && !r->blocking) __builtin_prefetch(r->host + (addr - r->guest), 1);
  }
}

Virtqueue::Pop Virtqueue::pop_split(Chain& chain) {
  if (broken_ != nullptr) return Pop::kBroken;
  if (!split_available()) return Pop::kEmpty;
  const auto ahead = static_cast<uint16_t>(avail_shadow_ - next_avail_);
  if (ahead > config_.size) return broke("avail index too far ahead", ahead);
  if (outstanding_ >= config_.size) return broke("more requests outstanding than ring entries", outstanding_);
  const uint16_t head = load16(config_.driver + 4 + 2 * (next_avail_ & mask_));
  prefetch_ahead(ahead);
  ++next_avail_;
  ++outstanding_;
  return walk_split(head, chain);
}

Virtqueue::Pop Virtqueue::reload_split(uint16_t head, Chain& chain) {
  if (outstanding_ >= config_.size) return broke("more requests outstanding than ring entries", outstanding_);
  ++outstanding_;
  return walk_split(head, chain);
}

Virtqueue::Pop Virtqueue::walk_split(uint16_t head, Chain& chain) {
  chain.clear();
  chain.id = head;
  if (head >= config_.size) return broke("descriptor index out of range", head);
  uint16_t index = head;
  for (unsigned seen = 0;; ++seen) {
    if (seen >= config_.size) return broke("descriptor chain loops, head", head);
    const auto d = load_desc<SplitDesc>(config_.desc + 16u * index);
    if (d.flags & kDescIndirect) {
      if (!config_.indirect) return broke("indirect descriptor was not negotiated, head", head);
      if (d.flags & kDescNext) return broke("indirect descriptor with a next one, head", head);
      return walk_indirect(d.addr, d.len, chain);
    }
    if (const char* why = chain.add(*memory_, hints_, d.addr, d.len, d.flags & kDescWrite))
      return broke(why, head);
    if (!(d.flags & kDescNext)) return Pop::kChain;
    index = d.next;
    if (index >= config_.size) return broke("descriptor index out of range", index);
  }
}

Virtqueue::Pop Virtqueue::walk_indirect(uint64_t addr, uint32_t len, Chain& chain) {
  if (len == 0 || len % 16 != 0 || len / 16 > kMaxQueueSize)
    return broke("length of an indirect table", len);
  const unsigned n = len / 16;
  const std::byte* table = memory_->translate_guest(addr, len, 1);
  if (table == nullptr) {  // the request cannot even be read: it fails alone
    chain.outside = true;
    return Pop::kChain;
  }
  unsigned index = 0;
  for (unsigned seen = 0;; ++seen) {
    if (seen >= n) return broke("indirect chain loops, table of", n);
    const auto d = load_desc<SplitDesc>(table + 16u * index);
    if (d.flags & kDescIndirect) return broke("indirect descriptor inside an indirect table", index);
    if (const char* why = chain.add(*memory_, hints_, d.addr, d.len, d.flags & kDescWrite))
      return broke(why, index);
    if (!(d.flags & kDescNext)) return Pop::kChain;
    index = d.next;
    if (index >= n) return broke("index out of an indirect table", index);
  }
}

void Virtqueue::push_split(uint16_t id, uint32_t written) {
  store64(config_.device + 4 + 8u * (next_used_ & mask_), uint64_t{written} << 32 | id);
  ++next_used_;
  ++unpublished_;
  --outstanding_;
}

bool Virtqueue::publish_split() {
  if (unpublished_ == 0) return false;
  const uint16_t old = published_;
  published_ = next_used_;
  unpublished_ = 0;
  driver_saw();
  store16_release(config_.device + 2, published_);  // after the elements
  // Dekker with the driver: it stores used_event (or flags), then looks at used.idx; we the other way round.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (config_.event_idx) return passed(load16(config_.driver + 4 + 2u * config_.size), published_, old);
  return (load16(config_.driver) & kAvailNoInterrupt) == 0;
}

// ---- packed --------------------------------------------------------------------------------------------------

bool Virtqueue::packed_available() {
  // acquire: pairs with the driver's release store of the flags of the chain's first descriptor.
  const uint16_t flags = load16_acquire(config_.desc + 16u * next_avail_ + 14);
  driver_acted();
  return ((flags & kDescAvail) != 0) == avail_wrap_ && ((flags & kDescUsed) != 0) != avail_wrap_;
}

Virtqueue::Pop Virtqueue::pop_packed(Chain& chain) {
  if (broken_ != nullptr) return Pop::kBroken;
  if (!packed_available()) return Pop::kEmpty;
  chain.clear();
  raw_count_ = 0;
  uint16_t slot = next_avail_;
  bool wrap = avail_wrap_;
  unsigned seen = 0;
  for (;;) {
    if (++seen + outstanding_ > config_.size)
      return broke("descriptor chain longer than what is left of the ring", seen);
    const auto d = load_desc<PackedDesc>(config_.desc + 16u * slot);
    if (++slot == config_.size) {
      slot = 0;
      wrap = !wrap;
    }
    chain.id = d.id;
    if (keep_raw_) raw_[raw_count_++] = {d.addr, d.len, d.id, d.flags};
    if (d.flags & kDescIndirect) {
      if (!config_.indirect) return broke("indirect descriptor was not negotiated, id", d.id);
      if (seen > 1 || (d.flags & kDescNext)) return broke("indirect descriptor inside a chain, id", d.id);
      if (walk_packed_indirect(d.addr, d.len, chain) == Pop::kBroken) return Pop::kBroken;
      break;
    }
    if (const char* why = chain.add(*memory_, hints_, d.addr, d.len, d.flags & kDescWrite))
      return broke(why, d.id);
    if (!(d.flags & kDescNext)) break;
  }
  chain.slots = static_cast<uint16_t>(seen);
  next_avail_ = slot;
  avail_wrap_ = wrap;
  outstanding_ = static_cast<uint16_t>(outstanding_ + seen);
  return Pop::kChain;
}

Virtqueue::Pop Virtqueue::reload_packed(std::span<const RawDesc> descs, Chain& chain) {
  chain.clear();
  if (descs.empty() || descs.size() + outstanding_ > config_.size)
    return broke("descriptors of an in-flight request", descs.size());
  for (const RawDesc& d : descs) {
    chain.id = d.id;
    if (d.flags & kDescIndirect) {
      if (!config_.indirect || descs.size() > 1) return broke("indirect descriptor in flight, id", d.id);
      if (walk_packed_indirect(d.addr, d.len, chain) == Pop::kBroken) return Pop::kBroken;
      break;
    }
    if (const char* why = chain.add(*memory_, hints_, d.addr, d.len, d.flags & kDescWrite))
      return broke(why, d.id);
  }
  chain.slots = static_cast<uint16_t>(descs.size());
  outstanding_ = static_cast<uint16_t>(outstanding_ + descs.size());
  return Pop::kChain;
}

// In a packed ring the entries of an indirect table follow one another; only the write flag counts.
Virtqueue::Pop Virtqueue::walk_packed_indirect(uint64_t addr, uint32_t len, Chain& chain) {
  if (len == 0 || len % 16 != 0 || len / 16 > kMaxQueueSize)
    return broke("length of an indirect table", len);
  const std::byte* table = memory_->translate_guest(addr, len, 1);
  if (table == nullptr) {
    chain.outside = true;
    return Pop::kChain;
  }
  for (unsigned i = 0; i < len / 16; ++i) {
    const auto d = load_desc<PackedDesc>(table + 16u * i);
    if (d.flags & kDescIndirect) return broke("indirect descriptor inside an indirect table", i);
    if (const char* why = chain.add(*memory_, hints_, d.addr, d.len, d.flags & kDescWrite))
      return broke(why, i);
  }
  return Pop::kChain;
}

void Virtqueue::push_packed(uint16_t id, uint16_t slots, uint32_t written) {
  std::byte* d = config_.desc + 16u * next_used_;
  uint16_t flags = used_wrap_ ? kDescAvail | kDescUsed : 0;
  if (written > 0) flags |= kDescWrite;
  __atomic_store_n(reinterpret_cast<u32*>(d + 8), written, __ATOMIC_RELAXED);
  store16(d + 12, id);
  // The first one's flags come last (publish): the driver takes used elements in ring order.
  if (unpublished_++ == 0) first_flags_ = flags;
  else store16_release(d + 14, flags);
  next_used_ = static_cast<uint16_t>(next_used_ + slots);
  if (next_used_ >= config_.size) {
    next_used_ = static_cast<uint16_t>(next_used_ - config_.size);
    used_wrap_ = !used_wrap_;
  }
  packed_span_ = static_cast<uint16_t>(packed_span_ + slots);
  outstanding_ = static_cast<uint16_t>(outstanding_ - slots);
}

bool Virtqueue::publish_packed() {
  if (unpublished_ == 0) return false;
  driver_saw();
  store16_release(config_.desc + 16u * published_ + 14, first_flags_);
  const uint16_t span = packed_span_;
  published_ = next_used_;
  published_wrap_ = used_wrap_;
  unpublished_ = packed_span_ = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);  // Dekker, as in publish_split
  const uint32_t event = load32(config_.driver);         // offset and flags in one read
  const auto flags = static_cast<uint16_t>(event >> 16);
  if (flags == kEventDisable) return false;
  if (!config_.event_idx || flags != kEventDesc) return true;
  // The event offset in the driver's terms: a slot of the lap that its wrap counter names.
  auto offset = static_cast<uint16_t>(event & ~kWrapBit & 0xffff);
  const bool wrap = (event & kWrapBit) != 0;
  const auto at = static_cast<uint16_t>(published_);
  int32_t distance = int32_t{at} - offset;  // slots from the event to where we are now
  if (wrap != published_wrap_) distance += config_.size;
  return distance > 0 && distance <= span;
}

// ---- kicks ---------------------------------------------------------------------------------------------------

bool Virtqueue::arm() {
  if (broken_ != nullptr) return false;
  if (config_.packed) {
    if (config_.event_idx) {
      store16(config_.device, next_avail());
      store16_release(config_.device + 2, kEventDesc);  // after the offset
    } else {
      store16(config_.device + 2, kEventEnable);
    }
  } else if (config_.event_idx) {
    store16(config_.device + 4 + 8u * config_.size, next_avail_);
  } else {
    store16(config_.device, 0);
  }
  kicks_ = true;
  // Dekker with the driver: it makes a request available, then looks at the event fields; we the other way round.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!has_work()) return false;
  disarm();
  return true;
}

void Virtqueue::disarm() {
  if (!kicks_) return;
  kicks_ = false;
  if (config_.packed) store16(config_.device + 2, kEventDisable);
  else if (!config_.event_idx) store16(config_.device, kUsedNoNotify);
  // split with event_idx: the event index stays behind, which is enough.
}

}  // namespace spillway::virtio
