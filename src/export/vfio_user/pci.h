// The device as PCI and virtio-pci see it: configuration space, the registers of BAR 0, the MSI-X table of BAR 1.
// Pure: works on a DeviceState, touches no guest memory and no descriptor. Fuzzed (fuzz/vfio_config_fuzz).
//
//   BAR 0, 16 KiB: common 0x0, isr 0x1000, device 0x2000, notify 0x3000 (multiplier 4)
//   BAR 1,  4 KiB: MSI-X table 0x0, pending bits 0x800
//   BAR 2/3, 64 bit, prefetchable: the memory range, a power of two; its shared-memory capability has the true size
//
// Source: VIRTIO 1.3, 4.1 and 5.19; PCI Local Bus 3.0, 6.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "src/export/vfio_user/state.h"

namespace spillway::vfio {

inline constexpr uint64_t kBar0Size = 0x4000, kBar1Size = 0x1000;
inline constexpr uint64_t kIsrOffset = 0x1000, kDeviceOffset = 0x2000, kNotifyOffset = 0x3000;

inline constexpr uint8_t kStatusDriverOk = 4, kStatusFeaturesOk = 8, kStatusNeedsReset = 0x40, kStatusFailed = 0x80;

// What the owner has to do after an access.
struct Effect {
  bool reset = false;      // the driver wrote status 0
  bool kick = false;       // the queue was notified
  bool queue = false;      // the queue was enabled, or the driver became ready
};

class PciModel {
 public:
  // `state` outlives the model. init: a new device; otherwise the state is a predecessor's.
  PciModel(DeviceState& state, uint64_t size, bool msix);
  static void init(DeviceState& state, uint64_t size, bool msix);

  // False: outside of the region, or not of 1, 2, 4 or 8 bytes (configuration space: anything inside).
  // Accesses need not be aligned to registers: they are taken byte by byte where they do not match one.
  bool read(uint32_t region, uint64_t offset, std::span<std::byte> out);
  bool write(uint32_t region, uint64_t offset, std::span<const std::byte> in, Effect& effect);

  // virtio reset: everything but PCI.
  void reset_virtio();
  // Size of the region as the client sees it; 0: there is none.
  uint64_t region_size(uint32_t region) const;
  uint64_t bar_size() const { return bar_size_; }
  static uint64_t offered_features();

 private:
  void read_config(uint64_t offset, std::span<std::byte> out) const;
  void write_config(uint64_t offset, std::span<const std::byte> in);
  uint64_t common_register(uint32_t offset, uint32_t& width) const;
  void write_common(uint32_t offset, uint64_t value, Effect& effect);
  void write_status(uint8_t value, Effect& effect);

  DeviceState& s_;
  const uint64_t size_, bar_size_;
};

}  // namespace spillway::vfio
