// The vhost-user protocol as it is on the wire. Source: QEMU docs/interop/vhost-user.rst.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillway::vhost {

enum class Request : uint32_t {
  kGetFeatures = 1, kSetFeatures = 2, kSetOwner = 3, kResetOwner = 4, kSetMemTable = 5,
  kSetLogBase = 6, kSetLogFd = 7, kSetVringNum = 8, kSetVringAddr = 9, kSetVringBase = 10,
  kGetVringBase = 11, kSetVringKick = 12, kSetVringCall = 13, kSetVringErr = 14,
  kGetProtocolFeatures = 15, kSetProtocolFeatures = 16, kGetQueueNum = 17, kSetVringEnable = 18,
  kSendRarp = 19, kNetSetMtu = 20, kSetBackendReqFd = 21, kIotlbMsg = 22, kSetVringEndian = 23,
  kGetConfig = 24, kSetConfig = 25, kCreateCryptoSession = 26, kCloseCryptoSession = 27,
  kPostcopyAdvise = 28, kPostcopyListen = 29, kPostcopyEnd = 30, kGetInflightFd = 31,
  kSetInflightFd = 32, kGpuSetSocket = 33, kResetDevice = 34, kVringKick = 35,
  kGetMaxMemSlots = 36, kAddMemReg = 37, kRemMemReg = 38, kSetStatus = 39, kGetStatus = 40,
  kGetSharedObject = 41, kSetDeviceStateFd = 42, kCheckDeviceState = 43,
};
inline constexpr uint32_t kBackendConfigChange = 2;  // back-end -> front-end

struct Header {
  uint32_t request;
  uint32_t flags;
  uint32_t size;  // of the payload
};
static_assert(sizeof(Header) == 12);
inline constexpr uint32_t kVersion = 1, kVersionMask = 3, kFlagReply = 4, kFlagNeedReply = 8;

// Feature bits of vhost itself, and protocol features.
inline constexpr uint64_t kFeatureLogAll = uint64_t{1} << 26;
inline constexpr uint64_t kFeatureProtocol = uint64_t{1} << 30;
inline constexpr uint64_t kProtocolMq = 1 << 0, kProtocolReplyAck = 1 << 3, kProtocolBackendReq = 1 << 5,
                          kProtocolConfig = 1 << 9, kProtocolInflight = 1 << 12,
                          kProtocolResetDevice = 1 << 13, kProtocolMemSlots = 1 << 15,
                          kProtocolStatus = 1 << 16;
inline constexpr uint64_t kProtocolOffered = kProtocolMq | kProtocolReplyAck | kProtocolBackendReq |
                                             kProtocolConfig | kProtocolInflight | kProtocolResetDevice |
                                             kProtocolMemSlots | kProtocolStatus;

struct VringState {
  uint32_t index;
  uint32_t num;
};
struct VringAddr {
  uint32_t index;
  uint32_t flags;
  uint64_t desc;   // front-end's virtual addresses
  uint64_t used;
  uint64_t avail;
  uint64_t log;
};
// kick, call, err: low 8 bits the ring; this bit = no descriptor comes along.
inline constexpr uint64_t kVringNoFd = 1 << 8;

struct MemRegion {
  uint64_t guest;
  uint64_t size;
  uint64_t user;
  uint64_t offset;  // in the descriptor
};
inline constexpr unsigned kTableRegions = 8;  // SET_MEM_TABLE carries at most so many
inline constexpr unsigned kMaxMemSlots = 32;
struct MemTable {
  uint32_t count;
  uint32_t padding;
  MemRegion regions[kTableRegions];
};
struct SingleMemRegion {
  uint64_t padding;
  MemRegion region;
};

struct ConfigHead {
  uint32_t offset;
  uint32_t size;
  uint32_t flags;
};
inline constexpr unsigned kMaxConfig = 256;

struct Inflight {
  uint64_t mmap_size;
  uint64_t mmap_offset;
  uint16_t queues;
  uint16_t queue_size;
};

inline constexpr unsigned kMaxPayload = 4096;  // nothing we take is larger
inline constexpr unsigned kMaxMessageFds = 8;

}  // namespace spillway::vhost
