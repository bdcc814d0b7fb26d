// A hostile qcow2 file: opened, read, mapped, written, checked and repaired. Nothing may crash, hang or reach beyond
// the file. Input: the file's first bytes; the rest of the (sparse) file is zeros, up to the length in the last byte.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "src/base/log.h"
#include "src/image/qcow2.h"
#include "src/image/qcow2_format.h"
#include "src/io/sim_reactor.h"
#include "src/volume/memory/memory.h"

namespace spillway {
namespace {

Task<void> use(VolumePtr image, bool writes) {
  std::vector<std::byte> buffer(128 * kKiB);
  const uint64_t size = image->size();
  // Beginning, middle and end; sizes in a hostile header may be anything.
  const uint64_t places[] = {0, 64 * kKiB, align_down(size / 2, 512), size - std::min<uint64_t>(size, 128 * kKiB)};
  for (uint64_t at : places) {
    if (at >= size) continue;
    const uint64_t n = std::min<uint64_t>(buffer.size(), size - at);
    const iovec v{buffer.data(), n};
    Status s = co_await image->read(IoContext{}, at, Iov(&v, 1));
    (void)s;
    if (!writes) continue;
    const iovec w{buffer.data(), std::min<uint64_t>(n, 4096)};
    s = co_await image->write(IoContext{}, at, Iov(&w, 1));
    s = co_await image->discard(IoContext{}, at, n);
    s = co_await image->write_zeroes(IoContext{}, at, n, true);
    s = co_await image->write(IoContext{}, at, Iov(&w, 1));
    s = co_await image->flush(IoContext{});
  }
  if (size > 0) {
    auto status = co_await image->block_status(0, std::min<uint64_t>(size, kMiB));
    (void)status;
  }
  Status s = co_await image->close();
  (void)s;
}

}  // namespace
}  // namespace spillway

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace spillway;
  if (size < 104 || size > 256 * kKiB) return 0;
  set_log_level(LogLevel::kError);
  SimReactor reactor;
  const uint64_t length = align_up(size, 512) + uint64_t{data[size - 1]} % 8 * 64 * kKiB;
  Result<VolumePtr> file = make_memory("fuzz", length, 512);
  if (!file) return 0;
  std::vector<std::byte> bytes(align_up(size, 512));
  std::memcpy(bytes.data(), data, size);
  qcow2::store32(bytes.data(), qcow2::kMagic);  // the magic is not worth finding
  const iovec v{bytes.data(), bytes.size()};
  auto put = [&] { return reactor.block_on((*file)->write(IoContext{}, 0, Iov(&v, 1))).has_value(); };
  if (!put()) return 0;
  VolumePtr backing = *make_memory("backing", 64 * kKiB, 512);
  for (bool read_only : {true, false}) {
    Qcow2Options o;
    o.read_only = read_only;
    o.backing = o.data_file = backing;
    o.l2_cache_bytes = o.refcount_cache_bytes = 64 * kKiB;
    auto image = reactor.block_on(open_qcow2("fuzz", *file, o));
    if (image) reactor.block_on(use(*image, !read_only));
  }
  auto info = reactor.block_on(image_info(*file, ImageFormat::kQcow2));
  if (info) (void)info_to_json("fuzz", 0, *info);
  if (!put()) return 0;
  auto report = reactor.block_on(check_qcow2(*file, Qcow2Repair::kAll));
  (void)report;
  return 0;
}
