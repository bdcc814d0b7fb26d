// Words of the vfio-user protocol (QEMU docs/interop/vfio-user.rst) and of <linux/vfio.h> that it borrows.
// Everything is little-endian and naturally aligned; a message is a header and a body in one stream.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillway::vfio {

enum class Command : uint16_t {
  kVersion = 1,
  kDmaMap = 2,
  kDmaUnmap = 3,
  kGetInfo = 4,
  kGetRegionInfo = 5,
  kGetRegionIoFds = 6,
  kGetIrqInfo = 7,
  kSetIrqs = 8,
  kRegionRead = 9,
  kRegionWrite = 10,
  kDmaRead = 11,
  kDmaWrite = 12,
  kReset = 13,
};

inline constexpr uint32_t kFlagReply = 1, kFlagNoReply = 0x10, kFlagError = 0x20, kFlagTypeMask = 0xf;

struct Header {
  uint16_t id;
  uint16_t command;
  uint32_t size;  // of the message, this header included
  uint32_t flags;
  uint32_t error;
};
static_assert(sizeof(Header) == 16);

struct Version {
  uint16_t major, minor;
};
struct DmaMap {
  uint32_t argsz, flags;  // flags: 1 readable, 2 writable
  uint64_t offset, address, size;
};
struct DmaUnmap {
  uint32_t argsz, flags;
  uint64_t address, size;
};
struct DeviceInfo {
  uint32_t argsz, flags, regions, irqs;
};
struct RegionInfo {
  uint32_t argsz, flags, index, cap_offset;
  uint64_t size, offset;
};
struct SparseMmap {  // capability 1 of RegionInfo, with one area
  uint16_t id, version;
  uint32_t next, areas, reserved;
  uint64_t offset, size;
};
struct IrqInfo {
  uint32_t argsz, flags, index, count;
};
struct IrqSet {
  uint32_t argsz, flags, index, start, count;
};
struct RegionAccess {
  uint64_t offset;
  uint32_t region, count;
};
static_assert(sizeof(DmaMap) == 32 && sizeof(DmaUnmap) == 24 && sizeof(RegionInfo) == 32 && sizeof(SparseMmap) == 32 &&
              sizeof(IrqSet) == 20 && sizeof(RegionAccess) == 16);

inline constexpr uint32_t kUnmapAll = 2;
inline constexpr uint32_t kDeviceReset = 1, kDevicePci = 2;
inline constexpr uint32_t kRegionRead = 1, kRegionWrite = 2, kRegionMmap = 4, kRegionCaps = 8;
inline constexpr uint32_t kIrqEventfd = 1, kIrqMaskable = 2, kIrqAutomasked = 4, kIrqNoResize = 8;
inline constexpr uint32_t kSetDataNone = 1, kSetDataBool = 2, kSetDataEventfd = 4, kSetDataMask = 7;
inline constexpr uint32_t kSetMask = 8, kSetUnmask = 0x10, kSetTrigger = 0x20, kSetActionMask = 0x38;

inline constexpr uint32_t kRegionCount = 9, kIrqCount = 5;
inline constexpr uint32_t kRegionConfig = 7;
inline constexpr uint32_t kIrqIntx = 0, kIrqMsix = 2;

// Bounds of ours: what a client may send in one message.
inline constexpr uint32_t kMaxMessage = 16 * 1024;
inline constexpr uint32_t kMaxTransfer = 4096;
inline constexpr uint32_t kMaxFds = 8;
inline constexpr uint32_t kMaxDmaRegions = 256;

}  // namespace spillway::vfio
