#include "src/export/vfio_user/pci.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "src/export/vfio_user/protocol.h"
#include "src/virtio/pmem.h"

namespace spillway::vfio {

namespace {

constexpr uint64_t kFeatureVersion1 = uint64_t{1} << 32;

// Registers of the common configuration (VIRTIO 1.3, 4.1.4.3), sorted.
struct Register {
  uint8_t offset, width;
};
constexpr Register kCommon[] = {{0, 4},  {4, 4},  {8, 4},  {12, 4}, {16, 2}, {18, 2}, {20, 1}, {21, 1}, {22, 2}, {24, 2},
                                {26, 2}, {28, 2}, {30, 2}, {32, 4}, {36, 4}, {40, 4}, {44, 4}, {48, 4}, {52, 4}};
constexpr uint32_t kCommonSize = 56;
enum : uint32_t {
  kDeviceFeatureSelect = 0, kDeviceFeature = 4, kDriverFeatureSelect = 8, kDriverFeature = 12, kConfigVector = 16,
  kNumQueues = 18, kStatus = 20, kGeneration = 21, kQueueSelect = 22, kQueueSize = 24, kQueueVector = 26,
  kQueueEnable = 28, kQueueNotifyOff = 30, kQueueDesc = 32, kQueueDriver = 40, kQueueDevice = 48,
};

void put(uint8_t* at, uint64_t value, unsigned bytes) { std::memcpy(at, &value, bytes); }

uint8_t add_virtio_cap(uint8_t* c, uint8_t at, uint8_t type, uint8_t length, uint8_t bar, uint8_t id, uint64_t offset,
                       uint64_t size) {
  c[at] = 0x09;  // vendor specific
  c[at + 2] = length;
  c[at + 3] = type;
  c[at + 4] = bar;
  c[at + 5] = id;
  put(c + at + 8, offset & 0xffffffff, 4);
  put(c + at + 12, size & 0xffffffff, 4);
  if (type == 2) put(c + at + 16, 4, 4);  // notify_off_multiplier
  if (type == 8) {
    put(c + at + 16, offset >> 32, 4);
    put(c + at + 20, size >> 32, 4);
  }
  c[at + 1] = static_cast<uint8_t>(at + length);
  return static_cast<uint8_t>(at + length);
}

uint64_t set_half(uint64_t whole, bool high, uint64_t half) {
  return high ? (whole & 0xffffffff) | half << 32 : (whole & ~uint64_t{0xffffffff}) | half;
}

}  // namespace

uint64_t PciModel::offered_features() { return virtio::kPmemFeatureShmemRegion | kFeatureVersion1; }

void PciModel::init(DeviceState& s, uint64_t size, bool msix) {
  s = DeviceState{};
  s.magic = kStateMagic;
  s.version = kStateVersion;
  s.size = size;
  s.bar_msix = msix;
  uint8_t* c = s.config;
  put(c + 0x00, 0x1af4, 2);
  put(c + 0x02, 0x105b, 2);
  put(c + 0x06, 0x0010, 2);  // has capabilities
  c[0x08] = 1;
  c[0x0b] = 0xff;            // class: does not fit any
  put(c + 0x2c, 0x1af4, 2);
  put(c + 0x2e, 0x1100, 2);
  put(c + 0x18, 0x0c, 4);    // BAR 2: 64 bit, prefetchable
  c[0x34] = 0x40;
  uint8_t at = 0x40;
  at = add_virtio_cap(c, at, 1, 16, 0, 0, 0, kCommonSize);
  at = add_virtio_cap(c, at, 3, 16, 0, 0, kIsrOffset, 1);
  at = add_virtio_cap(c, at, 4, 16, 0, 0, kDeviceOffset, sizeof(virtio::PmemConfig));
  at = add_virtio_cap(c, at, 2, 20, 0, 0, kNotifyOffset, 4);
  const uint8_t last = at;
  at = add_virtio_cap(c, at, 8, 24, 2, 0, 0, size);
  if (msix) {
    c[at] = 0x11;
    put(c + at + 2, kMsixVectors - 1, 2);
    put(c + at + 4, 1, 4);          // table: BAR 1, offset 0
    put(c + at + 8, 0x800 | 1, 4);  // pending bits
  } else {
    c[last + 1] = 0;
    c[0x3d] = 1;  // INTA
  }
  s.queue.size = kQueueSizeMax;
  s.queue.vector = s.config_vector = kNoVector;
}

PciModel::PciModel(DeviceState& state, uint64_t size, bool)
    : s_(state), size_(size), bar_size_(std::max<uint64_t>(std::bit_ceil(size), 4096)) {}

void PciModel::reset_virtio() {
  s_.status = s_.isr = 0;
  s_.queue_select = 0;
  s_.device_feature_select = s_.driver_feature_select = 0;
  s_.driver_features = 0;
  s_.config_vector = kNoVector;
  s_.queue = QueueState{};
  s_.queue.size = kQueueSizeMax;
  s_.queue.vector = kNoVector;
}

uint64_t PciModel::region_size(uint32_t region) const {
  switch (region) {
    case 0: return kBar0Size;
    case 1: return s_.bar_msix ? kBar1Size : 0;
    case 2: return bar_size_;
    case kRegionConfig: return kConfigSize;
    default: return 0;
  }
}

// ---- configuration space ---------------------------------------------------------------------------------------

void PciModel::read_config(uint64_t offset, std::span<std::byte> out) const {
  std::memcpy(out.data(), s_.config + offset, out.size());
}

// Writable bits only; the rest of the space is constant. The client emulates BAR addresses and MSI-X itself; we keep
// what it writes so that it reads it back.
void PciModel::write_config(uint64_t offset, std::span<const std::byte> in) {
  const uint8_t msix = [&]() -> uint8_t {
    for (uint8_t at = s_.config[0x34]; at != 0; at = s_.config[at + 1])
      if (s_.config[at] == 0x11) return at;
    return 0;
  }();
  auto mask_of = [&](uint64_t at) -> uint8_t {
    if (at == 0x04) return 0x06;        // memory space, bus master
    if (at == 0x05) return 0x04;        // INTx disable
    if (at == 0x0c || at == 0x0d) return 0xff;
    if (at == 0x3c) return 0xff;        // interrupt line
    if (msix != 0 && at == msix + 3u) return 0xc0;
    const uint64_t bar_mask[3] = {~(kBar0Size - 1), ~(kBar1Size - 1), ~(bar_size_ - 1)};
    if (at >= 0x10 && at < 0x18) {
      if (at >= 0x14 && !s_.bar_msix) return 0;
      return static_cast<uint8_t>(bar_mask[(at - 0x10) / 4] >> (at % 4 * 8));
    }
    if (at >= 0x18 && at < 0x20) return static_cast<uint8_t>(bar_mask[2] >> ((at - 0x18) * 8));
    return 0;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    const uint8_t mask = mask_of(offset + i);
    uint8_t& byte = s_.config[offset + i];
    byte = static_cast<uint8_t>((byte & ~mask) | (std::to_integer<uint8_t>(in[i]) & mask));
  }
}

// ---- BAR 0 -----------------------------------------------------------------------------------------------------

uint64_t PciModel::common_register(uint32_t offset, uint32_t& width) const {
  const QueueState none{};
  const QueueState& q = s_.queue_select == 0 ? s_.queue : none;
  for (const Register& r : kCommon)
    if (r.offset == offset) width = r.width;
  auto half = [](uint64_t v, uint32_t select) { return select > 1 ? 0 : (v >> (select * 32)) & 0xffffffff; };
  switch (offset) {
    case kDeviceFeatureSelect: return s_.device_feature_select;
    case kDeviceFeature: return half(offered_features(), s_.device_feature_select);
    case kDriverFeatureSelect: return s_.driver_feature_select;
    case kDriverFeature: return half(s_.driver_features, s_.driver_feature_select);
    case kConfigVector: return s_.config_vector;
    case kNumQueues: return 1;
    case kStatus: return s_.status;
    case kGeneration: return 0;
    case kQueueSelect: return s_.queue_select;
    case kQueueSize: return q.size;
    case kQueueVector: return s_.queue_select == 0 ? q.vector : kNoVector;
    case kQueueEnable: return q.enabled;
    case kQueueNotifyOff: return 0;
    case kQueueDesc: return q.desc & 0xffffffff;
    case kQueueDesc + 4: return q.desc >> 32;
    case kQueueDriver: return q.driver & 0xffffffff;
    case kQueueDriver + 4: return q.driver >> 32;
    case kQueueDevice: return q.device & 0xffffffff;
    case kQueueDevice + 4: return q.device >> 32;
    default: return 0;
  }
}

void PciModel::write_status(uint8_t value, Effect& effect) {
  if (value == 0) {
    reset_virtio();
    effect.reset = true;
    return;
  }
  // Features can be agreed on once, and only all of what the device needs (VIRTIO 1.3, 2.2.2).
  if ((value & kStatusFeaturesOk) != 0 && (s_.status & kStatusFeaturesOk) == 0) {
    const bool ok = (s_.driver_features & ~offered_features()) == 0 && (s_.driver_features & kFeatureVersion1) != 0;
    if (!ok) value = static_cast<uint8_t>(value & ~kStatusFeaturesOk);
  }
  const bool was_ok = (s_.status & kStatusDriverOk) != 0;
  s_.status = value;
  effect.queue = !was_ok && (value & kStatusDriverOk) != 0;
}

void PciModel::write_common(uint32_t offset, uint64_t v, Effect& effect) {
  const bool settable = s_.queue_select == 0 && !s_.queue.enabled;  // the queue's layout is fixed once enabled
  QueueState& q = s_.queue;
  auto vector = [this](uint64_t wanted) {
    return s_.bar_msix && wanted < kMsixVectors ? static_cast<uint16_t>(wanted) : kNoVector;
  };
  switch (offset) {
    case kDeviceFeatureSelect: s_.device_feature_select = static_cast<uint32_t>(v); break;
    case kDriverFeatureSelect: s_.driver_feature_select = static_cast<uint32_t>(v); break;
    case kDriverFeature:
      if (s_.driver_feature_select < 2 && (s_.status & kStatusFeaturesOk) == 0)
        s_.driver_features = set_half(s_.driver_features, s_.driver_feature_select == 1, v);
      break;
    case kConfigVector: s_.config_vector = vector(v); break;
    case kStatus: write_status(static_cast<uint8_t>(v), effect); break;
    case kQueueSelect: s_.queue_select = static_cast<uint16_t>(v); break;
    case kQueueSize:
      if (settable && v != 0 && v <= kQueueSizeMax && std::has_single_bit(v)) q.size = static_cast<uint16_t>(v);
      break;
    case kQueueVector:
      if (s_.queue_select == 0) q.vector = vector(v);
      break;
    case kQueueEnable:
      if (settable && v == 1) {
        q.enabled = 1;
        effect.queue = true;
      }
      break;
    case kQueueDesc: case kQueueDesc + 4:
      if (settable) q.desc = set_half(q.desc, offset != kQueueDesc, v);
      break;
    case kQueueDriver: case kQueueDriver + 4:
      if (settable) q.driver = set_half(q.driver, offset != kQueueDriver, v);
      break;
    case kQueueDevice: case kQueueDevice + 4:
      if (settable) q.device = set_half(q.device, offset != kQueueDevice, v);
      break;
    default: break;
  }
}

bool PciModel::read(uint32_t region, uint64_t offset, std::span<std::byte> out) {
  const uint64_t size = region_size(region);
  if (out.empty() || offset >= size || out.size() > size - offset) return false;
  if (region == kRegionConfig) {
    read_config(offset, out);
    return true;
  }
  std::fill(out.begin(), out.end(), std::byte{0});
  if (region == 1) {
    std::memcpy(out.data(), s_.msix + offset, out.size());
    return true;
  }
  if (region != 0 || out.size() > 8) return false;  // the memory range is mapped, never read by message
  if (offset == kIsrOffset) {
    out[0] = std::byte{s_.isr};
    s_.isr = 0;  // read to clear
  } else if (offset >= kDeviceOffset && offset < kNotifyOffset) {
    const virtio::PmemConfig config{0, size_};
    const uint64_t at = offset - kDeviceOffset;
    if (at < sizeof config)
      std::memcpy(out.data(), reinterpret_cast<const char*>(&config) + at, std::min(out.size(), sizeof config - at));
  } else if (offset < kCommonSize) {
    for (const Register& r : kCommon) {  // every register that the access overlaps
      uint32_t width = 0;
      const uint64_t value = common_register(r.offset, width);
      for (uint32_t b = 0; b < r.width; ++b) {
        const uint64_t at = r.offset + b;
        if (at >= offset && at - offset < out.size()) out[at - offset] = static_cast<std::byte>(value >> (b * 8));
      }
    }
  }
  return true;
}

bool PciModel::write(uint32_t region, uint64_t offset, std::span<const std::byte> in, Effect& effect) {
  const uint64_t size = region_size(region);
  if (in.empty() || offset >= size || in.size() > size - offset) return false;
  if (region == kRegionConfig) {
    write_config(offset, in);
    return true;
  }
  if (region == 1) {
    std::memcpy(s_.msix + offset, in.data(), in.size());
    return true;
  }
  if (region != 0 || in.size() > 8) return false;
  if (offset >= kNotifyOffset) {
    effect.kick = offset == kNotifyOffset;
    return true;
  }
  if (offset >= kCommonSize) return true;  // isr and device configuration are read-only
  for (const Register& r : kCommon) {
    // Only whole registers: a driver must not write parts of one (VIRTIO 1.3, 4.1.3.1); 64 bits are two halves.
    if (r.offset < offset || r.offset + r.width > offset + in.size()) continue;
    uint64_t value = 0;
    std::memcpy(&value, in.data() + (r.offset - offset), r.width);
    write_common(r.offset, value, effect);
    if (effect.reset) break;
  }
  return true;
}

}  // namespace spillway::vfio
