// Virtqueue: the device's side of one ring, split or packed, with indirect descriptors and event_idx.
//
// States: created (start) -> running -> broken (the driver broke a rule; nothing more is popped).
// The ring lies in memory that the driver (and on vhost-user the front-end) may change at any moment. So: every shared field is
// read exactly once per use, by one atomic load into a local, and only the local is checked and used; nothing that
// the device wrote is read back. Indices and lengths are checked against the ring's size and the memory table. A chain can
// have at most `size` descriptors, so a loop ends.
//
// Ordering, split ring (device's half of VIRTIO 1.3, 2.7.13): load-acquire of avail.idx pairs with the driver's store after
// its descriptors; store-release of used.idx pairs with the driver's load before it reads used elements. arm() and publish()
// are Dekker pairs with the driver (event index against ring index), hence a seq_cst fence between store and load.
//
// Thread-confined: one owner; moving it to another thread needs a hand-over that orders memory (a reactor message).
#pragma once

#include <cstdint>
#include <string>

#include "src/base/result.h"
#include "src/virtio/chain.h"
#include "src/virtio/guest_memory.h"
#include "src/virtio/ring_format.h"

namespace spillway::virtio {

// Sizes in bytes of the three areas of a ring of n entries; their alignment.
struct RingAreas {
  uint64_t desc, driver, device;
  static RingAreas of(unsigned n, bool packed);
  static constexpr uint64_t kDescAlign = 16;
  static constexpr uint64_t driver_align(bool packed) { return packed ? 4 : 2; }
  static constexpr uint64_t kDeviceAlign = 4;
};

struct RingConfig {
  uint16_t size = 0;             // 1..kMaxQueueSize; split: a power of two
  bool packed = false;
  bool event_idx = false;
  bool indirect = false;
  std::byte* desc = nullptr;     // descriptor area
  std::byte* driver = nullptr;   // avail ring / driver event suppression
  std::byte* device = nullptr;   // used ring / device event suppression
  // Positions. Split: free-running 16 bits. Packed: low 15 bits the slot, bit 15 the wrap counter.
  uint16_t next_avail = 0;
  uint16_t next_used = 0;
};

class Virtqueue {
 public:
  enum class Pop : uint8_t { kEmpty, kChain, kBroken };

  // `memory` must outlive the queue's use of it. kInvalid: the config breaks a rule.
  Status start(const RingConfig& config, const GuestMemory* memory);
  void set_memory(const GuestMemory* memory) { memory_ = memory; }

  // Takes the next request. At most `size` may be outstanding (popped and not pushed).
  Pop pop(Chain& chain) { return config_.packed ? pop_packed(chain) : pop_split(chain); }
  // True when pop would look at something; one load of shared memory.
  bool has_work() { return config_.packed ? packed_available() : split_available(); }

  // Completes a request: `written` bytes of its writable part are valid. Visible to the driver after publish().
  // `slots`: Chain::slots.
  void push(uint16_t id, uint16_t slots, uint32_t written) {
    if (config_.packed) push_packed(id, slots, written);
    else push_split(id, written);
  }
  unsigned unpublished() const { return unpublished_; }
  // Makes all pushed ones visible at once. True: the driver wants to be called.
  bool publish() { return config_.packed ? publish_packed() : publish_split(); }

  // Asks the driver for a kick with the next request. True: there is work already (and the queue is disarmed again).
  bool arm();
  // Kicks are not needed for now (a hint to the driver).
  void disarm();

  bool broken() const { return broken_ != nullptr; }
  // Why, with the number that was wrong.
  std::string reason() const;
  void mark_broken(const char* why, uint64_t value) {
    broken_ = why;
    broken_value_ = value;
  }

  uint16_t size() const { return config_.size; }
  bool packed() const { return config_.packed; }
  // As in RingConfig: where a successor goes on.
  uint16_t next_avail() const;
  uint16_t next_used() const;
  // next_used as it will be after publish().
  uint16_t pending_used() const;

  // In-flight recovery. Split: reads the chain of a head that is outstanding; packed: rebuilds it from descriptors that
  // a log kept. Counted as popped. kBroken as with pop.
  Pop reload_split(uint16_t head, Chain& chain);
  Pop reload_packed(std::span<const RawDesc> descs, Chain& chain);
  // The descriptors (packed, as read) of the chain that pop() gave last.
  std::span<const RawDesc> last_raw() const { return {raw_, raw_count_}; }
  void keep_raw(bool on) { keep_raw_ = on; }
  uint16_t outstanding() const { return outstanding_; }

 private:
  bool split_available();
  bool packed_available();
  Pop pop_split(Chain& chain);
  Pop pop_packed(Chain& chain);
  Pop walk_split(uint16_t head, Chain& chain);
  void prefetch_ahead(uint16_t ahead);
  Pop walk_packed_indirect(uint64_t addr, uint32_t len, Chain& chain);
  Pop walk_indirect(uint64_t addr, uint32_t len, Chain& chain);
  void push_split(uint16_t id, uint32_t written);
  void push_packed(uint16_t id, uint16_t slots, uint32_t written);
  bool publish_split();
  bool publish_packed();
  Pop broke(const char* why, uint64_t value) {
    mark_broken(why, value);
    return Pop::kBroken;
  }

  RingConfig config_;
  const GuestMemory* memory_ = nullptr;
  const char* broken_ = nullptr;
  uint64_t broken_value_ = 0;
  RegionHints hints_;
  uint32_t ahead_hint_ = 0;    // of prefetch_ahead
  uint16_t mask_ = 0;
  uint16_t next_avail_ = 0;    // split: free-running; packed: slot
  uint16_t avail_shadow_ = 0;  // split: avail.idx as last seen
  uint16_t next_used_ = 0;     // split: free-running, with unpublished; packed: slot, with unpublished
  uint16_t published_ = 0;     // split: used.idx as published; packed: slot of the first unpublished
  uint16_t unpublished_ = 0;
  uint16_t outstanding_ = 0;
  uint16_t packed_span_ = 0;   // slots between published_ and next_used_
  uint16_t first_flags_ = 0;   // packed: flags of the first unpublished element, written last
  bool avail_wrap_ = true;
  bool used_wrap_ = true;
  bool published_wrap_ = true;
  bool kicks_ = true;          // kicks are enabled in shared memory
  bool keep_raw_ = false;
  uint16_t raw_count_ = 0;
  RawDesc raw_[kMaxQueueSize];
};

}  // namespace spillway::virtio
