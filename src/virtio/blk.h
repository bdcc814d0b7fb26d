// virtio-blk: requests parsed out of chains, and the configuration space. No I/O.
// Source: VIRTIO 1.3, 5.2. A request is read once into a local; what the guest changes later has no effect.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "src/io/buffers.h"
#include "src/virtio/chain.h"
#include "src/virtio/ring_format.h"
#include "src/volume/volume.h"

namespace spillway::virtio {

inline constexpr uint64_t kBlkFeatureSizeMax = feature_bit(1);
inline constexpr uint64_t kBlkFeatureSegMax = feature_bit(2);
inline constexpr uint64_t kBlkFeatureReadOnly = feature_bit(5);
inline constexpr uint64_t kBlkFeatureBlkSize = feature_bit(6);
inline constexpr uint64_t kBlkFeatureFlush = feature_bit(9);
inline constexpr uint64_t kBlkFeatureTopology = feature_bit(10);
inline constexpr uint64_t kBlkFeatureConfigWce = feature_bit(11);
inline constexpr uint64_t kBlkFeatureMq = feature_bit(12);
inline constexpr uint64_t kBlkFeatureDiscard = feature_bit(13);
inline constexpr uint64_t kBlkFeatureWriteZeroes = feature_bit(14);

enum class BlkStatus : uint8_t { kOk = 0, kIoError = 1, kUnsupported = 2 };

enum class BlkOp : uint8_t {
  kRead, kWrite, kFlush, kDiscard, kWriteZeroes, kGetId,
  kUnknown,   // answered kUnsupported
  kBad,       // answered kIoError
};

inline constexpr unsigned kBlkIdBytes = 20;
inline constexpr unsigned kBlkMaxRanges = 32;        // of one discard or write zeroes request
inline constexpr uint32_t kBlkMaxRangeSectors = 256 * 1024 * 1024 / 512;

struct BlkRange {
  uint64_t offset = 0;  // bytes
  uint64_t length = 0;
  bool unmap = false;
};

struct BlkRequest {
  BlkOp op = BlkOp::kBad;
  uint64_t offset = 0;             // bytes; read, write
  uint64_t length = 0;             // data bytes
  std::byte* status = nullptr;     // where the answer goes; null: it lies outside of guest memory
  const iovec* data = nullptr;     // points into the chain (entries cut in place)
  uint32_t data_count = 0;
  Iov iov() const { return {data, data_count}; }
};

// Cuts header and status off the chain (its iov entries change) and fills `request`. The chain must not be `blocking`.
// Never fails: what cannot be served has op kUnknown or kBad.
void parse_blk(Chain& chain, BlkRequest& request);

// The ranges of a discard or write zeroes request, read once. False: the request breaks a rule and is answered with
// `*answer`.
bool parse_blk_ranges(const BlkRequest& request, std::array<BlkRange, kBlkMaxRanges>& ranges,
                      unsigned* count, BlkStatus* answer);

// struct virtio_blk_config up to and with the write zeroes fields; the rest of a longer read is zero.
struct __attribute__((packed)) BlkConfig {
  uint64_t capacity;           // 512-byte sectors
  uint32_t size_max;
  uint32_t seg_max;
  uint16_t cylinders;
  uint8_t heads;
  uint8_t sectors;
  uint32_t blk_size;
  uint8_t physical_block_exp;
  uint8_t alignment_offset;
  uint16_t min_io_size;        // logical blocks
  uint32_t opt_io_size;        // logical blocks
  uint8_t writeback;
  uint8_t unused0;
  uint16_t num_queues;
  uint32_t max_discard_sectors;
  uint32_t max_discard_seg;
  uint32_t discard_sector_alignment;
  uint32_t max_write_zeroes_sectors;
  uint32_t max_write_zeroes_seg;
  uint8_t write_zeroes_may_unmap;
  uint8_t unused1[3];
};
static_assert(sizeof(BlkConfig) == 60);
inline constexpr unsigned kBlkConfigWceOffset = 32;
static_assert(offsetof(BlkConfig, writeback) == kBlkConfigWceOffset);

// What the device offers for a volume (V3). `write_cache`: the guest may have a volatile cache at all.
struct BlkDevice {
  uint64_t features = 0;
  BlkConfig config{};
  static BlkDevice of(const Volume& volume, bool read_only, bool write_cache, uint32_t queues);
};

}  // namespace spillway::virtio
