// Shared by the two descriptor fuzzers: the input is guest memory; byte 0 sets the options, byte 1 the position.
// Every request found is parsed as virtio-blk and as virtio-pmem, and answered; what the parsers point at is touched, so
// that AddressSanitizer sees an address outside of guest memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "src/virtio/blk.h"
#include "src/virtio/pmem.h"
#include "src/virtio/virtqueue.h"

namespace spillway::virtio {

inline void fuzz_queue(const uint8_t* data, size_t size, bool packed) {
  constexpr uint64_t kMemory = 8192;
  constexpr uint16_t kEntries = 16;
  if (size < 2) return;
  // Two regions of exact size on the heap, guest addresses 0 and 0x1000 (adjacent), so that pieces cross an edge.
  auto* low = static_cast<std::byte*>(std::aligned_alloc(64, kMemory / 2));
  auto* high = static_cast<std::byte*>(std::aligned_alloc(64, kMemory / 2));
  std::memset(low, 0, kMemory / 2);
  std::memset(high, 0, kMemory / 2);
  const size_t n = std::min<size_t>(size - 2, kMemory);
  std::memcpy(low, data + 2, std::min<size_t>(n, kMemory / 2));
  if (n > kMemory / 2) std::memcpy(high, data + 2 + kMemory / 2, n - kMemory / 2);
  auto memory = GuestMemory::create({{0, kMemory / 2, 0x10000, low, false},
                                     {kMemory / 2, kMemory / 2, 0x10000 + kMemory / 2, high, (data[0] & 8) != 0},
                                     {0x100000, 4096, 0x200000, nullptr, false}});
  RingConfig config;
  config.size = kEntries;
  config.packed = packed;
  config.event_idx = (data[0] & 1) != 0;
  config.indirect = (data[0] & 2) != 0;
  config.desc = low;
  config.driver = low + 256;
  config.device = low + 512;
  config.next_avail = packed ? static_cast<uint16_t>((data[1] & 15) | (data[1] & 0x80) << 8) : data[1];
  config.next_used = config.next_avail;
  Virtqueue queue;
  static Chain chain;
  if (queue.start(config, &*memory)) {
    queue.keep_raw(packed);
    for (int i = 0; i < 64; ++i) {
      const auto popped = queue.pop(chain);
      if (popped == Virtqueue::Pop::kBroken) break;
      if (popped == Virtqueue::Pop::kEmpty) {
        if (!queue.arm()) break;
        continue;
      }
      const uint16_t id = chain.id, slots = chain.slots;
      uint32_t written = 0;
      if (!chain.blocking) {
        const PmemRequest pmem = parse_pmem(chain);
        if ((data[0] & 16) != 0) written = answer_pmem(pmem, true);
        BlkRequest request;
        parse_blk(chain, request);
        if (request.op == BlkOp::kRead || request.op == BlkOp::kGetId) {
          zero_iov(request.iov(), 0, request.length);
          written = static_cast<uint32_t>(request.length);
        } else if (request.op == BlkOp::kDiscard || request.op == BlkOp::kWriteZeroes) {
          std::array<BlkRange, kBlkMaxRanges> ranges;
          unsigned count;
          BlkStatus answer;
          parse_blk_ranges(request, ranges, &count, &answer);
        } else if (request.op == BlkOp::kWrite) {
          char sink[256];
          copy_from_iov(sink, request.iov(), 0, sizeof sink);
        }
        if (request.status != nullptr) *request.status = std::byte{0};
      }
      queue.push(id, slots, written);
      if ((data[0] & 4) != 0) queue.publish();
    }
    queue.publish();
  }
  std::free(low);
  std::free(high);
}

}  // namespace spillway::virtio
