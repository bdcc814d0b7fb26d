#include "src/volume/file/file.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <thread>
#include <utility>

#include "src/base/log.h"
#include "src/io/reactor.h"

namespace spillway {
namespace {

struct Probe {
  bool block_device = false;
  uint64_t size = 0;
  uint32_t memory_alignment = 1;
  Geometry geometry;
};

class FileVolume final : public Volume {
 public:
  FileVolume(std::string name, const Probe& probe, Fd fd, std::string path, bool direct)
      : Volume(std::move(name), align_up(probe.size, probe.geometry.block_size), probe.geometry),
        fd_(std::move(fd)),
        path_(std::move(path)),
        memory_alignment_(probe.memory_alignment),
        direct_(direct),
        block_device_(probe.block_device),
        bytes_(probe.size) {}

  // The locks go now, not when the kernel lets go of the file: a request that io_uring has just completed may hold it
  // for a moment, and who opens the image next would find it busy.
  ~FileVolume() override {
    struct flock l{};
    l.l_type = F_UNLCK;
    l.l_whence = SEEK_SET;
    (void)::fcntl(fd_.get(), F_OFD_SETLK, &l);
  }

  std::string_view layer() const override { return "file"; }
  std::string to_text() const override {
    return fmt::format("path: {}\ncache: {}\nkind: {}\nbounced: {}\n", path_,
                       direct_ ? "none (O_DIRECT)" : "host page cache",
                       block_device_ ? "block device" : "regular file",
                       bounced_.load(std::memory_order_relaxed));
  }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    if (fits(iov)) return transfer(false, offset, iov, 0);
    return bounce_read(offset, iov);
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    const uint32_t rwf = ctx.fua ? RWF_DSYNC : 0;
    if (fits(iov)) return transfer(true, offset, iov, rwf);
    return bounce_write(offset, iov, rwf);
  }
  Task<Status> do_flush(IoContext) override {
    const int r = co_await Reactor::current().fsync(fd_.get(), true);
    if (r < 0) co_return fail_errno(-r, fmt::format("disk {}: flush", name()));
    co_return Status{};
  }
  Task<Status> do_discard(IoContext, uint64_t offset, uint64_t length) override {
    const int r = co_await Reactor::current().fallocate(
        fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (r < 0) co_return fail_errno(-r, fmt::format("disk {}: discard {} at {}", name(), length, offset));
    co_return Status{};
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) override;
  Task<Result<std::vector<Extent>>> do_block_status(uint64_t offset, uint64_t length) override;
  Task<Status> do_resize(uint64_t new_size) override;

 private:
  bool fits(Iov iov) const { return !direct_ || iov_aligned(iov, memory_alignment_); }
  Task<Status> transfer(bool write, uint64_t offset, Iov iov, uint32_t rwf);
  Task<Status> bounce_read(uint64_t offset, Iov iov);
  Task<Status> bounce_write(uint64_t offset, Iov iov, uint32_t rwf);

  static constexpr uint64_t kBounce = kMiB;

  Fd fd_;
  std::string path_;
  uint32_t memory_alignment_;
  bool direct_;
  bool block_device_;
  std::atomic<uint64_t> bytes_;  // of the file, not rounded to blocks; relaxed: only the tail's zeros depend on it
  std::atomic<uint64_t> bounced_{0};
};

// Goes on after a short transfer; zero bytes is the end of the file, which is an error but in the last block.
Task<Status> FileVolume::transfer(bool write, uint64_t offset, Iov iov, uint32_t rwf) {
  Reactor& reactor = Reactor::current();
  const uint64_t length = iov_length(iov);
  uint64_t done = 0;
  {
    int r;  // the usual case: all at once
    if (iov.size() <= IOV_MAX) {
      if (write) r = co_await reactor.writev(fd_.get(), iov, offset, rwf);
      else r = co_await reactor.readv(fd_.get(), iov, offset, rwf);
      if (r == static_cast<int64_t>(length)) co_return Status{};
      if (r > 0) done = static_cast<uint64_t>(r);
      if (r < 0 && r != -EINTR && r != -EAGAIN)
        co_return fail_errno(-r, fmt::format("disk {}: {} {} at {}", name(), write ? "write" : "read",
                                             length, offset));
    }
  }
  while (done < length) {
    const IovSlice rest(iov, done, length - done);
    Iov part = rest.iov();
    if (part.size() > IOV_MAX) part = part.first(IOV_MAX);
    int r;
    if (write) r = co_await reactor.writev(fd_.get(), part, offset + done, rwf);
    else r = co_await reactor.readv(fd_.get(), part, offset + done, rwf);
    if (r == -EINTR || r == -EAGAIN) continue;
    if (r < 0)
      co_return fail_errno(-r, fmt::format("disk {}: {} {} at {}", name(), write ? "write" : "read",
                                           length, offset));
    if (r == 0) {
      if (!write && offset + done >= bytes_.load(std::memory_order_relaxed)) {
        zero_iov(iov, done, length - done);
        co_return Status{};
      }
      co_return fail(ErrorKind::kIo, fmt::format("disk {}: short {}: {} of {} at {}", name(),
                                                 write ? "write" : "read", done, length, offset));
    }
    done += static_cast<uint64_t>(r);
    // After the end inside a sector O_DIRECT cannot go on from an unaligned offset.
    if (direct_ && !write && !is_aligned(offset + done, geometry().block_size)) {
      if (offset + done < bytes_.load(std::memory_order_relaxed)) {
        done = align_down(done, geometry().block_size);
        if (static_cast<uint64_t>(r) >= geometry().block_size) continue;
        co_return fail(ErrorKind::kIo, fmt::format("disk {}: short read: {} of {} at {}", name(), done, length, offset));
      }
      zero_iov(iov, done, length - done);
      co_return Status{};
    }
  }
  co_return Status{};
}

Task<Status> FileVolume::bounce_read(uint64_t offset, Iov iov) {
  bounced_.fetch_add(1, std::memory_order_relaxed);
  const uint64_t length = iov_length(iov);
  AlignedBuffer buffer(std::min(length, kBounce));
  if (!buffer) co_return fail(ErrorKind::kNoMemory, fmt::format("disk {}: bounce buffer", name()));
  for (uint64_t done = 0; done < length;) {
    const iovec v{buffer.data(), static_cast<size_t>(std::min(length - done, kBounce))};
    Status s = co_await transfer(false, offset + done, Iov(&v, 1), 0);
    if (!s) co_return s;
    copy_to_iov(iov, done, buffer.data(), v.iov_len);
    done += v.iov_len;
  }
  co_return Status{};
}

Task<Status> FileVolume::bounce_write(uint64_t offset, Iov iov, uint32_t rwf) {
  bounced_.fetch_add(1, std::memory_order_relaxed);
  const uint64_t length = iov_length(iov);
  AlignedBuffer buffer(std::min(length, kBounce));
  if (!buffer) co_return fail(ErrorKind::kNoMemory, fmt::format("disk {}: bounce buffer", name()));
  for (uint64_t done = 0; done < length;) {
    const iovec v{buffer.data(), static_cast<size_t>(std::min(length - done, kBounce))};
    copy_from_iov(buffer.data(), iov, done, v.iov_len);
    Status s = co_await transfer(true, offset + done, Iov(&v, 1), rwf);
    if (!s) co_return s;
    done += v.iov_len;
  }
  co_return Status{};
}

Task<Status> FileVolume::do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool unmap) {
  Reactor& reactor = Reactor::current();
  const int modes[2] = {FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE};
  for (int mode : modes) {
    if (mode == modes[0] && !unmap) continue;
    const int r = co_await reactor.fallocate(fd_.get(), mode, offset, length);
    if (r == 0) {
      if (!ctx.fua) co_return Status{};
      co_return co_await do_flush(ctx);
    }
    if (r != -EOPNOTSUPP && r != -EINVAL)
      co_return fail_errno(-r, fmt::format("disk {}: write zeroes {} at {}", name(), length, offset));
  }
  co_return co_await Volume::do_write_zeroes(ctx, offset, length, unmap);
}

Task<Result<std::vector<Extent>>> FileVolume::do_block_status(uint64_t offset, uint64_t length) {
  using R = Result<std::vector<Extent>>;
  std::vector<Extent> all;
  const uint64_t end = offset + length;
  const uint32_t block = geometry().block_size;
  uint64_t at = offset;
  while (at < end) {
    const off_t data = block_device_ ? static_cast<off_t>(at) : ::lseek(fd_.get(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno != ENXIO) {  // the file system cannot tell: all is data
      all.push_back({at, end - at, Extent::Kind::kData});
      break;
    }
    const uint64_t first = data < 0 ? end : std::min(end, align_down(static_cast<uint64_t>(data), block));
    if (first > at) all.push_back({at, first - at, Extent::Kind::kHole});
    if (first >= end) break;
    const off_t hole = block_device_ ? static_cast<off_t>(end) : ::lseek(fd_.get(), static_cast<off_t>(first), SEEK_HOLE);
    const uint64_t last = hole < 0 ? end : std::min(end, align_up(static_cast<uint64_t>(hole), block));
    all.push_back({first, std::max(last, first + block) - first, Extent::Kind::kData});
    at = std::max(last, first + block);
  }
  return Task<R>::ready(R(std::move(all)));
}

Task<Status> FileVolume::do_resize(uint64_t new_size) {
  if (block_device_) {
    uint64_t now = 0;
    if (::ioctl(fd_.get(), BLKGETSIZE64, &now) != 0)
      return Task<Status>::ready(fail_errno(errno, fmt::format("disk {}: BLKGETSIZE64", name())));
    if (new_size > now)
      return Task<Status>::ready(fail(ErrorKind::kNoSpace, fmt::format("disk {}: device has {} bytes, asked for {}",
                                                                       name(), now, new_size)));
  } else if (::ftruncate(fd_.get(), static_cast<off_t>(new_size)) != 0) {
    return Task<Status>::ready(fail_errno(errno, fmt::format("disk {}: grow to {}", name(), new_size)));
  }
  bytes_.store(new_size, std::memory_order_relaxed);
  set_size(new_size);
  return Task<Status>::ready(Status{});
}

// QEMU's protocol (block/file-posix): byte 100 + p is read-locked by who uses permission p, 200 + p by who does not
// share it; after taking its own, each looks for a conflicting one. p: 0 consistent read, 1 write, 3 resize.
Status take_image_lock(int fd, bool write, const std::string& what) {
  const auto set = [fd](int byte) {
    struct flock l{};
    l.l_type = F_RDLCK;
    l.l_whence = SEEK_SET;
    l.l_start = byte;
    l.l_len = 1;
    return ::fcntl(fd, F_OFD_SETLK, &l) == 0;
  };
  const auto held = [fd](int byte) {
    struct flock l{};
    l.l_type = F_WRLCK;
    l.l_whence = SEEK_SET;
    l.l_start = byte;
    l.l_len = 1;
    return ::fcntl(fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK;
  };
  const auto busy = [&] {
    return fail(ErrorKind::kBusy, fmt::format("{}: in use by another program{}", what, write ? "" : " that writes it"));
  };
  const int uses_read[] = {0}, uses_write[] = {0, 1, 3};
  for (int p : write ? std::span<const int>(uses_write) : std::span<const int>(uses_read))
    if (!set(100 + p)) return errno == EAGAIN || errno == EACCES ? Status(busy()) : fail_errno(errno, what + ": lock");
  for (int p : {1, 3})
    if (!set(200 + p)) return busy();
  for (int p : write ? std::span<const int>(uses_write) : std::span<const int>(uses_read))
    if (held(200 + p)) return busy();
  for (int p : {1, 3})
    if (held(100 + p)) return busy();
  return {};
}

uint64_t read_queue_value(dev_t dev, const char* what) {
  const std::string dir = fmt::format("/sys/dev/block/{}:{}", major(dev), minor(dev));
  for (const char* up : {"/queue/", "/../queue/"}) {
    if (std::FILE* f = std::fopen((dir + up + what).c_str(), "re"); f != nullptr) {
      unsigned long long v = 0;
      const int n = std::fscanf(f, "%llu", &v);
      std::fclose(f);
      if (n == 1) return v;
    }
  }
  return 0;
}

Result<Probe> probe_file(int fd, const std::string& what, bool direct) {
  Probe p;
  struct statx sx{};
  unsigned mask = STATX_BASIC_STATS;
#ifdef STATX_DIOALIGN
  mask |= STATX_DIOALIGN;
#endif
  if (::statx(fd, "", AT_EMPTY_PATH, mask, &sx) != 0) return fail_errno(errno, what);
  uint32_t offset_alignment = 512;
  if (S_ISBLK(sx.stx_mode)) {
    const dev_t dev = makedev(sx.stx_rdev_major, sx.stx_rdev_minor);
    int logical = 512;
    unsigned physical = 4096;
    p.block_device = true;
    if (::ioctl(fd, BLKGETSIZE64, &p.size) != 0) return fail_errno(errno, what + ": BLKGETSIZE64");
    if (::ioctl(fd, BLKSSZGET, &logical) == 0) offset_alignment = static_cast<uint32_t>(logical);
    if (::ioctl(fd, BLKPBSZGET, &physical) == 0) p.geometry.physical_block_size = physical;
    p.geometry.discard_granularity = static_cast<uint32_t>(read_queue_value(dev, "discard_granularity"));
    p.geometry.rotational = read_queue_value(dev, "rotational") != 0;
    p.geometry.min_io = static_cast<uint32_t>(read_queue_value(dev, "minimum_io_size"));
    p.geometry.opt_io = static_cast<uint32_t>(read_queue_value(dev, "optimal_io_size"));
    p.size = align_down(p.size, std::max(offset_alignment, 512u));
  } else if (S_ISREG(sx.stx_mode)) {
    p.size = sx.stx_size;
    p.geometry.discard_granularity = std::max(sx.stx_blksize, 512u);
    p.geometry.rotational =
        read_queue_value(makedev(sx.stx_dev_major, sx.stx_dev_minor), "rotational") != 0;
  } else {
    return fail(ErrorKind::kInvalid, what + ": neither a regular file nor a block device");
  }
  p.memory_alignment = direct ? 512 : 1;
#ifdef STATX_DIOALIGN
  if (direct && (sx.stx_mask & STATX_DIOALIGN) != 0 && sx.stx_dio_offset_align != 0) {
    offset_alignment = std::max(p.block_device ? offset_alignment : 512u, sx.stx_dio_offset_align);
    p.memory_alignment = sx.stx_dio_mem_align;
  }
#endif
  p.geometry.block_size = offset_alignment;
  p.geometry.physical_block_size = std::max(p.geometry.physical_block_size, offset_alignment);
  return p;
}

}  // namespace

Result<VolumePtr> open_file(std::string name, FileOptions options) {
  const std::string what = fmt::format("disk {}: {}", name, options.path);
  Fd fd = std::move(options.fd);
  bool direct = options.direct;
  if (!fd) {
    struct stat st{};
    const bool exists = ::stat(options.path.c_str(), &st) == 0;
    int flags = O_CLOEXEC | (options.read_only ? O_RDONLY : O_RDWR);
    if (exists && S_ISBLK(st.st_mode) && !options.read_only) flags |= O_EXCL;  // not while mounted
    if (!exists && options.create_size > 0 && !options.read_only) flags |= O_CREAT;
    fd.reset(::open(options.path.c_str(), flags | (direct ? O_DIRECT : 0), 0600));
    if (!fd && errno == EINVAL && direct) {
      if (!options.buffered_fallback)
        return fail(ErrorKind::kUnsupported, what + ": the file system has no O_DIRECT");
      log(LogLevel::kWarn, "volume", "{}: the file system has no O_DIRECT, using its page cache", what);
      direct = false;
      fd.reset(::open(options.path.c_str(), flags, 0600));
    }
    if (!fd) return fail_errno(errno, what);
    if ((flags & O_CREAT) != 0 && ::ftruncate(fd.get(), static_cast<off_t>(options.create_size)) != 0)
      return fail_errno(errno, what);
  } else {
    direct = (::fcntl(fd.get(), F_GETFL) & O_DIRECT) != 0;
  }
  SPILLWAY_TRY(Probe probe, probe_file(fd.get(), what, direct));
  probe.geometry.read_only = options.read_only;
  if (options.block_size != 0) {
    if (options.block_size < probe.geometry.block_size)
      return fail(ErrorKind::kInvalid, fmt::format("{}: block size {} is below the device's {}", what,
                                                   options.block_size, probe.geometry.block_size));
    probe.geometry.block_size = options.block_size;
    probe.geometry.physical_block_size = std::max(probe.geometry.physical_block_size, options.block_size);
  }
  if (probe.geometry.block_size > 4096 || (probe.geometry.block_size & (probe.geometry.block_size - 1)) != 0)
    return fail(ErrorKind::kUnsupported, fmt::format("{}: logical blocks of {}", what, probe.geometry.block_size));
  if (probe.size == 0) return fail(ErrorKind::kInvalid, what + ": is empty");
  if (options.lock) {
    constexpr uint32_t kPauseMs = 5;
    Status locked = take_image_lock(fd.get(), !options.read_only, what);
    for (uint32_t ms = 0; !locked && locked.error().kind() == ErrorKind::kBusy && ms < options.lock_wait_ms;
         ms += kPauseMs) {
      std::this_thread::sleep_for(std::chrono::milliseconds(kPauseMs));
      locked = take_image_lock(fd.get(), !options.read_only, what);
    }
    SPILLWAY_CHECK(std::move(locked));
  }
  return std::make_shared<FileVolume>(std::move(name), probe, std::move(fd), std::move(options.path), direct);
}

}  // namespace spillway
