// qcow2 on disk: header, extensions, table entries. Pure functions over bytes; nothing here does I/O.
// Source: QEMU docs/interop/qcow2.txt. All integers are big-endian.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/base/units.h"

namespace spillway::qcow2 {

inline constexpr uint32_t kMagic = 0x514649fb;  // "QFI\xfb"
inline constexpr uint32_t kHeaderV2 = 72, kHeaderV3 = 104;
inline constexpr uint32_t kMinClusterBits = 9, kMaxClusterBits = 21;
inline constexpr uint32_t kMinExtendedClusterBits = 14;
inline constexpr uint64_t kMaxL1Bytes = 32 * kMiB;        // as QEMU
inline constexpr uint64_t kMaxRefTableBytes = 8 * kMiB;   // as QEMU
inline constexpr uint32_t kMaxSnapshots = 65536;
inline constexpr uint64_t kMaxSnapshotBytes = 64 * kMiB;  // as QEMU
inline constexpr uint32_t kMaxBackingName = 1023;
inline constexpr uint32_t kSubclusters = 32;

enum Incompatible : uint64_t {
  kDirty = 1, kCorrupt = 2, kExternalData = 4, kCompressionType = 8, kExtendedL2 = 16,
  kKnownIncompatible = 31,
};
enum Compatible : uint64_t { kLazyRefcounts = 1 };
enum Autoclear : uint64_t { kBitmaps = 1, kRawExternalData = 2 };

// Table entries.
inline constexpr uint64_t kCopied = uint64_t{1} << 63;      // refcount is exactly one: may be written in place
inline constexpr uint64_t kCompressed = uint64_t{1} << 62;
inline constexpr uint64_t kZeroFlag = 1;                    // standard L2 entry, v3
inline constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;
inline constexpr uint64_t kL1Reserved = 0x7f000000000001ff;
inline constexpr uint64_t kL2Reserved = 0x3f000000000001fe;  // of a standard entry; bit 0 is the zero flag
inline constexpr uint64_t kRefTableReserved = 0x1ff;

// Where fields stand that are updated in place.
inline constexpr uint64_t kFieldSize = 24, kFieldL1Size = 36, kFieldL1Offset = 40, kFieldRefTable = 48,
                          kFieldIncompatible = 72, kFieldAutoclear = 88;

struct Header {
  uint32_t version = 3;
  uint32_t cluster_bits = 16;
  uint64_t size = 0;
  uint32_t l1_size = 0;  // entries
  uint64_t l1_offset = 0;
  uint64_t reftable_offset = 0;
  uint32_t reftable_clusters = 0;
  uint32_t snapshots = 0;
  uint64_t snapshots_offset = 0;
  uint64_t incompatible = 0, compatible = 0, autoclear = 0;
  uint32_t refcount_order = 4;
  uint32_t header_length = kHeaderV3;
  uint8_t compression = 0;
  std::string backing_file, backing_format, data_file;

  uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
  bool extended_l2() const { return (incompatible & kExtendedL2) != 0; }
  bool external_data() const { return (incompatible & kExternalData) != 0; }
  bool data_raw() const { return external_data() && (autoclear & kRawExternalData) != 0; }
  uint32_t l2_entry_size() const { return extended_l2() ? 16 : 8; }
  uint64_t l2_entries() const { return cluster_size() / l2_entry_size(); }
  uint64_t bytes_per_l2() const { return l2_entries() << cluster_bits; }
  uint32_t refcount_bits() const { return 1u << refcount_order; }
  uint64_t refblock_entries() const { return (cluster_size() * 8) >> refcount_order; }
  uint64_t reftable_entries() const { return (uint64_t{reftable_clusters} << cluster_bits) / 8; }
  uint64_t subcluster_size() const { return extended_l2() ? cluster_size() / kSubclusters : cluster_size(); }
};

// How much of the file parse_header needs: the first cluster, once cluster_bits is known. 0: not a qcow2 header.
uint64_t header_bytes_needed(std::span<const std::byte> first_sector);
// Every check that needs the header alone and the file's length. `bytes`: the first cluster (or the whole file).
// kUnsupported: a feature by name. kInvalid / kCorrupt: what is wrong, in one line.
Result<Header> parse_header(std::span<const std::byte> bytes, uint64_t file_size);
// One cluster: header, extensions, backing file name. kInvalid when it does not fit.
Result<std::vector<std::byte>> write_header(const Header& h);

struct Snapshot {
  uint64_t l1_offset = 0;
  uint32_t l1_size = 0;
  std::string id, name;
  uint64_t vm_state_size = 0;
  uint64_t virtual_size = 0;  // of the image then
  uint32_t date_s = 0, date_ns = 0;
  uint64_t vm_clock_ns = 0;
  bool has_virtual_size = false;
};
// The table in `bytes` (which may be longer). `used` = its length.
Result<std::vector<Snapshot>> parse_snapshots(std::span<const std::byte> bytes, const Header& h, uint64_t* used);

// A compressed cluster's descriptor: where its bytes lie.
struct CompressedSpan {
  uint64_t offset = 0;
  uint64_t length = 0;  // an upper bound: whole sectors
};
inline CompressedSpan compressed_span(uint64_t entry, uint32_t cluster_bits) {
  const uint32_t shift = 62 - (cluster_bits - 8);
  CompressedSpan s;
  s.offset = entry & ((uint64_t{1} << shift) - 1);
  const uint64_t sectors = ((entry & (kCompressed - 1)) >> shift) + 1;
  s.length = sectors * 512 - (s.offset & 511);
  return s;
}

// Refcount `i` of a table of 1 << order bits each.
uint64_t get_refcount(const std::byte* table, uint64_t i, uint32_t order);
void set_refcount(std::byte* table, uint64_t i, uint32_t order, uint64_t value);

inline uint16_t load16(const void* p) {
  uint16_t v;
  __builtin_memcpy(&v, p, 2);
  return __builtin_bswap16(v);
}
inline uint32_t load32(const void* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return __builtin_bswap32(v);
}
inline uint64_t load64(const void* p) {
  uint64_t v;
  __builtin_memcpy(&v, p, 8);
  return __builtin_bswap64(v);
}
inline void store16(void* p, uint16_t v) {
  v = __builtin_bswap16(v);
  __builtin_memcpy(p, &v, 2);
}
inline void store32(void* p, uint32_t v) {
  v = __builtin_bswap32(v);
  __builtin_memcpy(p, &v, 4);
}
inline void store64(void* p, uint64_t v) {
  v = __builtin_bswap64(v);
  __builtin_memcpy(p, &v, 8);
}

}  // namespace spillway::qcow2
