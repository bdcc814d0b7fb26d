// The PCI model: any sequence of reads and writes of any region, size and place. Nothing outside of the state may be
// touched (the sanitizers watch), constant fields stay, and the queue obeys the driver's limits.
#include <cstring>
#include <vector>

#include "src/base/result.h"
#include "src/export/vfio_user/pci.h"
#include "src/export/vfio_user/protocol.h"

using namespace spillway::vfio;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const bool msix = (data[0] & 1) != 0;
  const uint64_t range = uint64_t{2 << 20} * (1 + data[1]);
  DeviceState state;
  PciModel::init(state, range, msix);
  DeviceState fresh = state;
  PciModel pci(state, range, msix);
  data += 2;
  size -= 2;
  // {u8 region and direction, u8 length, u16 offset} then the data of a write
  while (size >= 4) {
    const bool write = (data[0] & 0x80) != 0;
    const uint32_t region = data[0] & 0x0f;
    const size_t length = data[1];
    uint16_t offset = 0;
    std::memcpy(&offset, data + 2, sizeof offset);
    data += 4;
    size -= 4;
    if (write) {
      if (size < length) break;
      const std::vector<std::byte> in(reinterpret_cast<const std::byte*>(data),
                                      reinterpret_cast<const std::byte*>(data) + length);
      data += length;
      size -= length;
      Effect effect;
      if (pci.write(region, offset, in, effect)) SPILLWAY_ASSERT(offset + length <= pci.region_size(region));
    } else {
      std::vector<std::byte> out(length);
      if (pci.read(region, offset, out)) SPILLWAY_ASSERT(offset + length <= pci.region_size(region));
    }
    SPILLWAY_ASSERT(state.queue.size != 0 && state.queue.size <= kQueueSizeMax && state.queue.enabled <= 1);
    SPILLWAY_ASSERT(state.queue.vector == kNoVector || state.queue.vector < kMsixVectors);
    SPILLWAY_ASSERT(state.size == range && state.magic == kStateMagic);
    SPILLWAY_ASSERT(std::memcmp(state.config + 0x20, fresh.config + 0x20, 0x1c) == 0);  // up to the interrupt line
    SPILLWAY_ASSERT(std::memcmp(state.config, fresh.config, 4) == 0);
  }
  return 0;
}
