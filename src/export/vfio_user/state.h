// DeviceState: all of a device that must survive the worker, in a memfd that the holder keeps. Plain data, changed in
// place; a kill -9 between two stores leaves a state that the next message or a re-scan of the ring repairs:
//   - requests of the ring are idempotent (flush), so a successor starts again at the used index in guest memory;
//   - a message is answered from `reply` when it was handled and perhaps not answered (see server.cc).
#pragma once

#include <cstdint>
#include <type_traits>

namespace spillway::vfio {

inline constexpr uint32_t kStateMagic = 0x53504d31;  // "SPM1"
inline constexpr uint32_t kConfigSize = 256;
inline constexpr uint32_t kMsixVectors = 2;
inline constexpr uint16_t kQueueSizeMax = 128;
inline constexpr uint16_t kNoVector = 0xffff;

inline constexpr uint32_t kStateVersion = 2;
inline constexpr uint32_t kTaking = 1, kTaken = 2, kTakenBare = 3;

struct QueueState {
  uint16_t size, vector, enabled, reserved;
  uint64_t desc, driver, device;  // guest addresses
};

struct DeviceState {
  uint32_t magic, version;
  uint64_t size;  // of the memory range: a successor refuses another
  // PCI
  uint8_t config[kConfigSize];
  uint8_t msix[4096];  // table and pending bits as the client wrote them
  uint8_t bar_msix;    // the device was built with MSI-X (else INTx)
  // virtio common configuration
  uint8_t status, isr, reserved;
  uint16_t queue_select, config_vector;
  uint32_t device_feature_select, driver_feature_select;
  uint64_t driver_features;
  QueueState queue;
  // The message in work.
  uint32_t versioned;      // VERSION has been agreed on
  uint32_t reply_pending;  // 1: `reply` belongs to message `reply_id` and may not have been sent
  uint16_t reply_id;
  uint16_t reply_fd;       // 1: the backing's descriptor goes with it
  uint32_t reply_size;
  uint8_t reply[8192];
  // A message with descriptors is taken out of the socket before it is handled (server.cc). 0: none; kTaking: perhaps taken;
  // kTaken: with descriptors; kTakenBare: they were the next message's.
  uint32_t taking;
  uint16_t taking_id, reserved2;
};
static_assert(std::is_trivially_copyable_v<DeviceState>);

}  // namespace spillway::vfio
