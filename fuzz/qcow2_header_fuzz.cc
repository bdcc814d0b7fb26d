// Header, extensions and snapshot table of a hostile qcow2 image, as bytes: nothing may crash or read beyond them, and
// what is accepted can be written and read again.
#include <cstdint>
#include <cstring>

#include "src/image/qcow2_format.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace spillway;
  if (size < 8 || size > 256 * kKiB) return 0;
  // The last 8 bytes say how long the file is.
  uint64_t file_size = 0;
  std::memcpy(&file_size, data + size - 8, 8);
  std::vector<std::byte> bytes(size - 8);
  if (!bytes.empty()) std::memcpy(bytes.data(), data, bytes.size());
  if (bytes.size() >= 4) qcow2::store32(bytes.data(), qcow2::kMagic);  // the magic is not worth finding
  (void)qcow2::header_bytes_needed(bytes);
  Result<qcow2::Header> h = qcow2::parse_header(bytes, file_size);
  if (!h) {
    if (h.error().message().find('\n') != std::string::npos) __builtin_trap();
    return 0;
  }
  uint64_t used = 0;
  for (uint64_t at : {uint64_t{0}, h->snapshots_offset}) {
    if (at > bytes.size()) continue;
    Result<std::vector<qcow2::Snapshot>> all = qcow2::parse_snapshots(std::span(bytes).subspan(at), *h, &used);
    if (all && used > bytes.size() - at) __builtin_trap();
  }
  Result<std::vector<std::byte>> out = qcow2::write_header(*h);
  if (!out) return 0;
  Result<qcow2::Header> again = qcow2::parse_header(*out, file_size);
  if (!again || again->size != h->size || again->l1_offset != h->l1_offset || again->backing_file != h->backing_file ||
      again->incompatible != h->incompatible)
    __builtin_trap();
  return 0;
}
