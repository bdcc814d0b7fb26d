// virtio-pmem: the flush request and the configuration space. No I/O. Source: VIRTIO 1.3, 5.19.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/virtio/chain.h"

namespace spillway::virtio {

inline constexpr uint64_t kPmemFeatureShmemRegion = uint64_t{1} << 0;

struct PmemConfig {
  uint64_t start;  // guest-physical address of the range
  uint64_t size;   // bytes
};
static_assert(sizeof(PmemConfig) == 16);

struct PmemRequest {
  bool flush = false;              // false: not a flush; answer with an error
  std::byte* answer = nullptr;     // 4 bytes, any alignment, in one piece; null: no room for an answer
};

// The chain must not be `blocking`.
PmemRequest parse_pmem(const Chain& chain);
// Writes the answer; returns what to give Virtqueue::push as `written`.
uint32_t answer_pmem(const PmemRequest& request, bool ok);

}  // namespace spillway::virtio
