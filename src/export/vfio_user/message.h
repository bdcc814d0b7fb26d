// The message parser: bytes from a client we do not trust -> one checked request. Pure; fuzzed (fuzz/vfio_message_fuzz).
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "src/export/vfio_user/protocol.h"

namespace spillway::vfio {

// Data of a request points into the message.
struct SetIrqs {
  IrqSet set;
  std::span<const std::byte> bools;  // kSetDataBool: one byte per vector
};
struct RegionRead {
  RegionAccess at;
};
struct RegionWrite {
  RegionAccess at;
  std::span<const std::byte> data;  // at.count bytes
};
struct Reset {};
struct GetRegionInfo {
  RegionInfo info;
};
struct GetIrqInfo {
  IrqInfo info;
};
struct GetInfo {
  DeviceInfo info;
};
// error: the errno to answer with; the stream itself is intact and goes on.
struct Refused {
  int error;
};
using Request = std::variant<Refused, Version, DmaMap, DmaUnmap, GetInfo, GetRegionInfo, GetIrqInfo, SetIrqs, RegionRead,
                             RegionWrite, Reset>;

// Whether the stream can go on after a message with this header: false ends the connection.
bool header_ok(const Header& h);

// `body`: the h.size - sizeof(Header) bytes after the header. `fds`: how many descriptors came with it.
Request parse(const Header& h, std::span<const std::byte> body, size_t fds);

}  // namespace spillway::vfio
