#include "src/virtio/blk.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace spillway::virtio {

namespace {

// struct virtio_blk_req's head and a discard segment, as on the wire.
struct Head {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
struct Segment {
  uint64_t sector;
  uint32_t sectors;
  uint32_t flags;
};
static_assert(sizeof(Head) == 16 && sizeof(Segment) == 16);

constexpr uint32_t kTypeIn = 0, kTypeOut = 1, kTypeFlush = 4, kTypeGetId = 8, kTypeDiscard = 11,
                   kTypeWriteZeroes = 13;
constexpr uint64_t kMaxSector = UINT64_MAX / 512;

// Removes the first `n` bytes; returns the first entry left. The caller knows that so many are there.
iovec* drop_front(iovec* v, iovec* end, size_t n) {
  while (v != end && n >= v->iov_len) n -= v++->iov_len;
  if (v != end && n > 0) {
    v->iov_base = static_cast<std::byte*>(v->iov_base) + n;
    v->iov_len -= n;
  }
  return v;
}

BlkOp op_of(uint32_t type) {
  switch (type) {
    case kTypeIn: return BlkOp::kRead;
    case kTypeOut: return BlkOp::kWrite;
    case kTypeFlush: return BlkOp::kFlush;
    case kTypeGetId: return BlkOp::kGetId;
    case kTypeDiscard: return BlkOp::kDiscard;
    case kTypeWriteZeroes: return BlkOp::kWriteZeroes;
    default: return BlkOp::kUnknown;
  }
}

}  // namespace

void parse_blk(Chain& chain, BlkRequest& request) {
  request = BlkRequest{};
  iovec* const out_begin = chain.iov + chain.readable;
  iovec* out_end = chain.iov + chain.count;
  if (chain.writable_bytes == 0) return;  // no room for a status
  if (chain.outside) {
    // Pieces are missing; the status byte is known only if the last piece present is the last of the chain, which
    // cannot be told. A request with its status in a buffer of one byte (every driver's layout) still gets its answer.
    if (out_end != out_begin && out_end[-1].iov_len == 1)
      request.status = static_cast<std::byte*>(out_end[-1].iov_base);
    return;
  }
  // The status is the last writable byte.
  while (out_end != out_begin && out_end[-1].iov_len == 0) --out_end;
  iovec& last = out_end[-1];
  request.status = static_cast<std::byte*>(last.iov_base) + (last.iov_len - 1);
  if (--last.iov_len == 0) --out_end;

  Head head;
  if (chain.readable_bytes < sizeof head) return;
  iovec* in = chain.iov;
  iovec* const in_end = chain.iov + chain.readable;
  uint64_t half[2];
  if (in->iov_len >= sizeof head) std::memcpy(half, in->iov_base, sizeof head);
  else copy_from_iov(half, {in, in_end}, 0, sizeof head);
  asm volatile("" : "+r"(half[0]), "+r"(half[1]));  // from here on the locals only
  head = std::bit_cast<Head>(half);
  if (in->iov_len == sizeof head) ++in;
  else in = drop_front(in, in_end, sizeof head);

  request.op = op_of(head.type);
  const bool to_guest = request.op == BlkOp::kRead || request.op == BlkOp::kGetId;
  request.data = to_guest ? out_begin : in;
  request.data_count = static_cast<uint32_t>(to_guest ? out_end - out_begin : in_end - in);
  request.length = to_guest ? chain.writable_bytes - 1 : chain.readable_bytes - sizeof head;
  if (request.op == BlkOp::kRead || request.op == BlkOp::kWrite) {
    if (head.sector > kMaxSector || request.length == 0 || request.length % kSectorSize != 0)
      request.op = BlkOp::kBad;
    else
      request.offset = head.sector * kSectorSize;
  }
}

bool parse_blk_ranges(const BlkRequest& request, std::array<BlkRange, kBlkMaxRanges>& ranges,
                      unsigned* count, BlkStatus* answer) {
  *count = 0;
  *answer = BlkStatus::kIoError;
  if (request.length == 0 || request.length % sizeof(Segment) != 0 ||
      request.length / sizeof(Segment) > kBlkMaxRanges)
    return false;
  const auto n = static_cast<unsigned>(request.length / sizeof(Segment));
  Segment segments[kBlkMaxRanges];
  copy_from_iov(segments, request.iov(), 0, request.length);
  asm volatile("" : "+m"(segments));
  const bool zeroes = request.op == BlkOp::kWriteZeroes;
  for (unsigned i = 0; i < n; ++i) {
    const Segment& s = segments[i];
    // VIRTIO 1.3, 5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
    if ((s.flags & ~1u) != 0 || (!zeroes && s.flags != 0)) {
      *answer = BlkStatus::kUnsupported;
      return false;
    }
    if (s.sectors == 0 || s.sectors > kBlkMaxRangeSectors || s.sector > kMaxSector) return false;
    ranges[i] = {s.sector * kSectorSize, uint64_t{s.sectors} * kSectorSize, (s.flags & 1) != 0};
  }
  *count = n;
  return true;
}

BlkDevice BlkDevice::of(const Volume& volume, bool read_only, bool write_cache, uint32_t queues) {
  const Geometry& g = volume.geometry();
  BlkDevice d;
  d.features = kBlkFeatureSegMax | kBlkFeatureBlkSize | kBlkFeatureTopology | kBlkFeatureMq;
  BlkConfig& c = d.config;
  c.capacity = volume.size() / kSectorSize;
  c.seg_max = 126;  // with head and status the 128 entries of a usual queue
  c.blk_size = g.block_size;
  const uint32_t physical = std::max(g.physical_block_size, g.block_size);
  c.physical_block_exp = static_cast<uint8_t>(std::countr_zero(std::bit_floor(physical) / g.block_size));
  c.min_io_size = static_cast<uint16_t>(std::min<uint32_t>(g.min_io / g.block_size, UINT16_MAX));
  c.opt_io_size = g.opt_io / g.block_size;
  c.num_queues = static_cast<uint16_t>(queues);
  if (read_only || g.read_only) {
    d.features |= kBlkFeatureReadOnly;
    return d;
  }
  d.features |= kBlkFeatureFlush | kBlkFeatureWriteZeroes;
  if (write_cache) {
    d.features |= kBlkFeatureConfigWce;
    c.writeback = 1;
  }
  c.max_write_zeroes_sectors = kBlkMaxRangeSectors;
  c.max_write_zeroes_seg = kBlkMaxRanges;
  if (g.discard_granularity != 0) {
    d.features |= kBlkFeatureDiscard;
    c.max_discard_sectors = kBlkMaxRangeSectors;
    c.max_discard_seg = kBlkMaxRanges;
    c.discard_sector_alignment = std::max(g.discard_granularity, g.block_size) / kSectorSize;
    c.write_zeroes_may_unmap = 1;
  }
  return d;
}

}  // namespace spillway::virtio
