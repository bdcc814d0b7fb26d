// The in-flight log: which requests of a ring were taken and not yet answered, in memory that outlives the worker (and,
// when the front-end keeps it, the holder too). Layout and update order: vhost-user specification, "Inflight I/O tracking".
//
// Per ring one region: a header, then one entry per descriptor. A request is marked when it is taken; a batch is linked
// through `next`, published in the used ring, then unmarked. A successor finds a published batch that is not yet unmarked by
// comparing used positions, and resubmits what is still marked in the order of `counter`.
//
// Owned by the ring's reactor while it runs. The front-end can write here too: nothing read back is used unchecked, and
// nothing is read back but on recovery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"
#include "src/virtio/virtqueue.h"

namespace spillway::vhost {

struct InflightSplitEntry {
  uint8_t inflight;
  uint8_t padding[5];
  uint16_t next;
  uint64_t counter;
};
struct InflightSplit {
  uint64_t features;
  uint16_t version;
  uint16_t desc_num;
  uint16_t last_batch_head;
  uint16_t used_idx;
};
struct InflightPackedEntry {
  uint8_t inflight;
  uint8_t padding;
  uint16_t next;
  uint16_t last;
  uint16_t num;
  uint64_t counter;
  uint16_t id;
  uint16_t flags;
  uint32_t len;
  uint64_t addr;
};
struct InflightPacked {
  uint64_t features;
  uint16_t version;
  uint16_t desc_num;
  uint16_t free_head;
  uint16_t old_free_head;
  uint16_t used_idx;
  uint16_t old_used_idx;
  uint8_t used_wrap;
  uint8_t old_used_wrap;
  uint8_t padding[7];
};
static_assert(sizeof(InflightSplitEntry) == 16 && sizeof(InflightSplit) == 16);
static_assert(sizeof(InflightPackedEntry) == 32 && sizeof(InflightPacked) == 32);

class InflightLog {
 public:
  // Bytes of one ring's region, a multiple of 64.
  static uint64_t region_size(unsigned queue_size, bool packed);

  // What a predecessor left, oldest first. `token` goes back into mark/publish.
  struct Left {
    uint16_t token = 0;                       // split: head
    std::vector<virtio::RawDesc> descs;       // packed
    uint64_t counter = 0;
  };
  struct Recovered {
    std::vector<Left> left;
    uint16_t next_avail = 0;  // as in RingConfig
    uint16_t next_used = 0;
  };

  InflightLog() = default;
  // `region` has region_size(n, packed) bytes. Fresh: forgets what it holds.
  static InflightLog fresh(std::byte* region, unsigned n, const virtio::RingConfig& ring);
  // Adopts what is there when it fits the ring; otherwise like fresh. `adopted`: the ring was running when its owner died, so
  // its positions come from the log and the used index; else a split ring's come from `ring` unless something is in flight.
  static InflightLog recover(std::byte* region, unsigned n, const virtio::RingConfig& ring, bool adopted,
                             Recovered* out);
  // Nothing is in flight and the ring stands still: the next start is a fresh one.
  void retire();

  // Takes a request: returns the token to give back. `chain_id`: head of a split chain.
  uint16_t mark(const virtio::Virtqueue& vq, uint16_t chain_id);
  // Around Virtqueue::publish of the batch `tokens`: before ... after.
  void before_publish(std::span<const uint16_t> tokens, const virtio::Virtqueue& vq);
  void after_publish(std::span<const uint16_t> tokens, const virtio::Virtqueue& vq);

 private:
  InflightSplit* split() const { return reinterpret_cast<InflightSplit*>(region_); }
  InflightSplitEntry* split_entries() const {
    return reinterpret_cast<InflightSplitEntry*>(region_ + sizeof(InflightSplit));
  }
  InflightPacked* packed_head() const { return reinterpret_cast<InflightPacked*>(region_); }
  InflightPackedEntry* packed_entries() const {
    return reinterpret_cast<InflightPackedEntry*>(region_ + sizeof(InflightPacked));
  }
  void recover_split(const virtio::RingConfig& ring, bool adopted, Recovered* out);
  void recover_packed(const virtio::RingConfig& ring, Recovered* out);
  void reset(const virtio::RingConfig& ring);

  std::byte* region_ = nullptr;
  uint16_t n_ = 0;
  bool packed_ = false;
  uint16_t last_batch_head_ = 0;        // split
  uint64_t counter_ = 0;
  uint16_t free_head_ = 0;              // packed: our own copies; the shared ones are written only
  std::vector<uint16_t> free_next_;     // packed: the free list
  std::vector<uint16_t> last_;          // packed: last entry of the request with this token
};

}  // namespace spillway::vhost
