#include "src/volume/memory/memory.h"

#include <fmt/core.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace spillway {
namespace {

Geometry memory_geometry(uint32_t block_size) {
  Geometry g;
  g.block_size = block_size;
  g.physical_block_size = std::max(block_size, kPageSize);
  g.discard_granularity = kPageSize;
  return g;
}

class MemoryVolume final : public Volume {
 public:
  MemoryVolume(std::string name, uint64_t size, uint32_t block_size, std::byte* base, uint64_t capacity)
      : Volume(std::move(name), size, memory_geometry(block_size)), base_(base), capacity_(capacity) {}
  ~MemoryVolume() override { ::munmap(base_, capacity_); }

  std::string_view layer() const override { return "memory"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    for (const iovec& v : iov) {
      std::memcpy(v.iov_base, base_ + offset, v.iov_len);
      offset += v.iov_len;
    }
    return Task<Status>::ready();
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    for (const iovec& v : iov) {
      std::memcpy(base_ + offset, v.iov_base, v.iov_len);
      offset += v.iov_len;
    }
    return Task<Status>::ready();
  }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    return do_write_zeroes(ctx, offset, length, true);
  }
  Task<Status> do_write_zeroes(IoContext, uint64_t offset, uint64_t length, bool may_unmap) override {
    const uint64_t end = offset + length;
    const uint64_t first = align_up(offset, kPageSize), last = align_down(end, kPageSize);
    if (!may_unmap || first >= last) {
      std::memset(base_ + offset, 0, length);
    } else {
      std::memset(base_ + offset, 0, first - offset);
      std::memset(base_ + last, 0, end - last);
      ::madvise(base_ + first, last - first, MADV_DONTNEED);
    }
    return Task<Status>::ready();
  }
  Task<Status> do_resize(uint64_t new_size) override {
    if (new_size > capacity_)
      return Task<Status>::ready(fail(ErrorKind::kNoSpace, fmt::format("disk {}: {} bytes reserved, asked for {}",
                                                                       name(), capacity_, new_size)));
    set_size(new_size);
    return Task<Status>::ready();
  }

 private:
  std::byte* base_;
  uint64_t capacity_;
};

}  // namespace

Result<VolumePtr> make_memory(std::string name, uint64_t size, uint32_t block_size) {
  if (block_size < 512 || block_size > 4096 || (block_size & (block_size - 1)) != 0)
    return fail(ErrorKind::kInvalid, fmt::format("disk {}: block size {}", name, block_size));
  if (size == 0 || !is_aligned(size, block_size))
    return fail(ErrorKind::kInvalid, fmt::format("disk {}: size {} is no multiple of {}", name, size, block_size));
  const uint64_t capacity = align_up(std::max(size > (kTiB << 2) ? size : size * 8, 64 * kMiB), kPageSize);
  void* base = ::mmap(nullptr, capacity, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return fail_errno(errno, fmt::format("disk {}: {} bytes of memory", name, size));
  return std::make_shared<MemoryVolume>(std::move(name), size, block_size, static_cast<std::byte*>(base), capacity);
}

}  // namespace spillway
