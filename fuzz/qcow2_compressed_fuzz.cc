// Compressed clusters as a hostile image has them: exactly a cluster comes out, or an error. Also what we compress comes
// back. Input: a byte of shape (algorithm, cluster size, or "compress this"), then the data.
#include <cstdint>
#include <cstring>

#include "src/image/compress.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace spillway;
  if (size < 1 || size > 256 * kKiB) return 0;
  const auto type = (data[0] & 1) != 0 ? Qcow2Compression::kZstd : Qcow2Compression::kZlib;
  const uint64_t cluster = uint64_t{512} << (data[0] >> 1 & 7);
  const std::span<const std::byte> in(reinterpret_cast<const std::byte*>(data + 1), size - 1);
  std::vector<std::byte> out(cluster);
  if ((data[0] & 0x80) == 0) {
    (void)qcow2::decompress(type, in, out);
    return 0;
  }
  std::vector<std::byte> plain(cluster);
  if (!in.empty()) std::memcpy(plain.data(), in.data(), std::min<uint64_t>(in.size(), cluster));
  Result<std::vector<std::byte>> packed = qcow2::compress(type, plain);
  if (!packed || packed->size() > cluster) __builtin_trap();
  if (packed->empty()) return 0;  // no smaller
  packed->resize(packed->size() + 511);  // whole sectors are read: what follows is somebody else's
  if (!qcow2::decompress(type, *packed, out) || out != plain) __builtin_trap();
  return 0;
}
