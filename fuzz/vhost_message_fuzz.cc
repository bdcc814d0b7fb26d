// A sequence of vhost-user messages (issue 4). Record: request, flags, descriptors (low 4 bits memory, high 4 bits
// eventfds), payload length (1 byte), payload. Length of the header is true unless flags has bit 7.
#include "fuzz/vhost.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static spillway::vhost::FuzzServer server;
  std::vector<spillway::vhost::FuzzMessage> messages;
  size_t at = 0;
  while (at + 4 <= size && messages.size() < 64) {
    spillway::vhost::FuzzMessage m;
    m.head.request = data[at];
    m.head.flags = data[at + 1] & 0x0f;
    m.memory_fds = data[at + 2] & 7;
    m.event_fds = data[at + 2] >> 4 & 7;
    const size_t n = std::min<size_t>(data[at + 3], size - at - 4);
    m.payload.assign(reinterpret_cast<const char*>(data) + at + 4, n);
    m.head.size = static_cast<uint32_t>(n) + ((data[at + 1] & 0x80) != 0 ? 13 : 0);
    at += 4 + n;
    messages.push_back(std::move(m));
  }
  server.run(messages);
  return 0;
}
