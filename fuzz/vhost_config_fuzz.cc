// GET_CONFIG and SET_CONFIG payloads (issue 4). Byte 0: which; the rest is the payload.
#include "fuzz/vhost.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static spillway::vhost::FuzzServer server;
  if (size == 0) return 0;
  spillway::vhost::FuzzMessage m;
  m.head = {data[0] % 2 == 0 ? 24u : 25u, 1, static_cast<uint32_t>(size - 1)};
  m.payload.assign(reinterpret_cast<const char*>(data) + 1, size - 1);
  server.run({m});
  return 0;
}
