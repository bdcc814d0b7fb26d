// Descriptor parsing of a packed ring in hostile memory (issue 4).
#include "fuzz/virtq.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  spillway::virtio::fuzz_queue(data, size, true);
  return 0;
}
