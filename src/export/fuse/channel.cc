#include "src/export/fuse/channel.h"

#include <fmt/core.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>

#include "src/base/log.h"

namespace spillway::fuse {

namespace {
constexpr long kFuseMagic = 0x65735546;
}

static Status detach_stale(const std::string& directory) {
  struct stat st{}, up{};
  if (::stat(directory.c_str(), &st) != 0) {
    if (errno == ENOENT) return {};
    if (errno != ENOTCONN && errno != ECONNABORTED)
      return fail_errno(errno, "pmem mount " + directory);
    log(LogLevel::kInfo, "pmem", "{}: a dead mount is detached", directory);
    if (::umount2(directory.c_str(), MNT_DETACH) != 0)
      return fail_errno(errno, "pmem mount " + directory + ": detach the dead mount");
    return detach_stale(directory);  // several may lie on each other
  }
  if (::stat((directory + "/..").c_str(), &up) == 0 && up.st_dev != st.st_dev)
    return fail(ErrorKind::kBusy, "pmem mount " + directory + ": a live file system is mounted there");
  return {};
}

Result<FuseChannel> FuseChannel::mount(const std::string& directory, uint32_t max_read) {
  SPILLWAY_CHECK(detach_stale(directory));
  std::error_code ec;
  std::filesystem::create_directories(directory, ec);
  if (ec) return fail_errno(ec.value(), "pmem mount: make " + directory);
  Fd fd(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
  if (!fd) return fail_errno(errno, "pmem mount: open /dev/fuse");
  const auto data = fmt::format("fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions,max_read={}",
                                fd.get(), ::geteuid(), ::getegid(), max_read);
  if (::mount("spillway", directory.c_str(), "fuse.spillway", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME,
              data.c_str()) != 0)
    return fail_errno(errno, "pmem mount " + directory);
  return FuseChannel(std::move(fd), directory);
}

Result<FuseChannel> FuseChannel::adopt(Fd fd, const std::string& directory) {
  pollfd p{fd.get(), POLLIN, 0};
  if (::poll(&p, 1, 0) < 0) return fail_errno(errno, "pmem mount " + directory + ": poll");
  if ((p.revents & POLLERR) != 0)
    return fail(ErrorKind::kNotFound, "pmem mount " + directory + ": the kept connection has been aborted");
  return FuseChannel(std::move(fd), directory);
}

bool FuseChannel::reply(uint64_t unique, int error, std::span<const iovec> payload) {
  std::array<iovec, 3> iov{};
  SPILLWAY_ASSERT(payload.size() < iov.size());
  fuse_out_header out{};
  out.unique = unique;
  out.error = -error;
  out.len = sizeof out;
  iov[0] = {&out, sizeof out};
  size_t n = 1;
  for (const iovec& piece : payload) {
    out.len += static_cast<uint32_t>(piece.iov_len);
    iov[n++] = piece;
  }
  for (;;) {
    const ssize_t done = ::writev(fd_.get(), iov.data(), static_cast<int>(n));
    if (done >= 0) return true;
    if (errno == EINTR) continue;
    if (errno != ENOENT && errno != ENODEV)  // those two: the request or the connection is gone
      LOG_LIMITED(LogLevel::kWarn, "pmem", "{}: answer refused by the kernel: {}", directory_, strerror(errno));
    return false;
  }
}

static Status notify(int fd, int code, const void* body, size_t size) {
  fuse_out_header out{};
  out.error = code;
  out.len = static_cast<uint32_t>(sizeof out + size);
  const iovec iov[2] = {{&out, sizeof out}, {const_cast<void*>(body), size}};
  if (::writev(fd, iov, size > 0 ? 2 : 1) < 0) return fail_errno(errno, fmt::format("fuse: notify {}", code));
  return {};
}

Status FuseChannel::notify_resend() { return notify(fd_.get(), kNotifyResend, nullptr, 0); }

Status FuseChannel::notify_inval(uint64_t node, uint64_t offset, uint64_t length) {
  fuse_notify_inval_inode_out body{};
  body.ino = node;
  body.off = static_cast<int64_t>(offset);
  body.len = static_cast<int64_t>(length);
  return notify(fd_.get(), FUSE_NOTIFY_INVAL_INODE, &body, sizeof body);
}

static Status write_setting(const std::string& path, uint64_t value) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd) return fail_errno(errno, path);
  const auto text = fmt::format("{}", value);
  if (::write(fd.get(), text.data(), text.size()) < 0) return fail_errno(errno, path);
  return {};
}

Status FuseChannel::tune(const BdiOptions& options) {
  struct stat st{};
  if (::stat(directory_.c_str(), &st) != 0) return fail_errno(errno, "pmem mount " + directory_);
  const auto bdi = fmt::format("/sys/class/bdi/{}:{}/", major(st.st_dev), minor(st.st_dev));
  SPILLWAY_CHECK(write_setting(bdi + "strict_limit", 0));
  SPILLWAY_CHECK(write_setting(bdi + "max_ratio", 100));
  if (options.dirty_max_bytes != 0) SPILLWAY_CHECK(write_setting(bdi + "max_bytes", options.dirty_max_bytes));
  return write_setting(bdi + "read_ahead_kb", options.read_ahead_kb);
}

Status FuseChannel::unmount() {
  // Both: the mount goes although somebody uses it, and no call on it waits for us any more, whoever else has a copy of
  // the descriptor.
  if (::umount2(directory_.c_str(), MNT_FORCE | MNT_DETACH) != 0 && errno != EINVAL && errno != ENOENT)
    return fail_errno(errno, "pmem unmount " + directory_);
  ::rmdir(directory_.c_str());
  return {};
}

}  // namespace spillway::fuse
