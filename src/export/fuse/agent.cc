#include "src/export/fuse/agent.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/falloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "src/export/fuse/format.h"

namespace spillway::fuse {

namespace {

struct Order {
  Agent::Op op;
  uint32_t count;
  uint64_t offset, length;
  int64_t pid;
  iovec ranges[Agent::kMaxRanges];
};
struct Outcome {
  int64_t result;  // >= 0, or -errno
};

int64_t or_errno(int64_t r) { return r >= 0 ? r : -errno; }

int64_t page_out(Order& o) {
  const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(o.pid), 0));
  if (pidfd < 0) return -errno;
  int64_t total = 0;
  for (uint32_t i = 0; i < o.count; ++i) {
    iovec& r = o.ranges[i];
    while (r.iov_len > 0) {
      const long done = ::syscall(SYS_process_madvise, pidfd, &r, 1, MADV_PAGEOUT, 0);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0 && (errno == EPERM || errno == EACCES || errno == ENOSYS)) {
        const int err = errno;
        ::close(pidfd);
        return -err;
      }
      if (done <= 0) break;  // unmapped meanwhile, or the process ended
      total += done;
      r.iov_base = static_cast<char*>(r.iov_base) + done;
      r.iov_len -= static_cast<size_t>(done);
    }
  }
  ::close(pidfd);
  return total;
}

int64_t invalidate(int channel, const Order& o) {
  struct {
    fuse_out_header head;
    fuse_notify_inval_inode_out body;
  } m{};
  m.head.len = sizeof m;
  m.head.error = FUSE_NOTIFY_INVAL_INODE;
  m.body.ino = static_cast<uint64_t>(o.pid);
  m.body.off = static_cast<int64_t>(o.offset);
  m.body.len = static_cast<int64_t>(o.length);
  const ssize_t n = ::write(channel, &m, sizeof m);
  return n < 0 && errno != ENOENT ? -errno : 0;  // ENOENT: the kernel has no such inode, so no pages
}

// Async-signal-safe from here on: it runs in the copy of a process that had threads.
[[noreturn]] void serve(int socket, int file, int channel) {
  ::prctl(PR_SET_NAME, "pmem-agent");
  ::signal(SIGINT, SIG_IGN);   // a terminal's ^C is for the daemon, which closes the socket
  ::signal(SIGPIPE, SIG_IGN);
  static Order o;
  for (;;) {
    const ssize_t n = ::recv(socket, &o, sizeof o, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n != sizeof o) ::_exit(0);
    const auto offset = static_cast<off64_t>(o.offset), length = static_cast<off64_t>(o.length);
    Outcome out{0};
    switch (o.op) {
      case Agent::Op::kSync: out.result = or_errno(::fdatasync(file)); break;
      case Agent::Op::kWriteBack:
        out.result = or_errno(::sync_file_range(
            file, offset, length, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER));
        break;
      case Agent::Op::kPageOut: out.result = page_out(o); break;
      case Agent::Op::kDrop: out.result = -::posix_fadvise(file, offset, length, POSIX_FADV_DONTNEED); break;
      case Agent::Op::kPunch:
        out.result = or_errno(::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length));
        break;
      case Agent::Op::kInvalidate: out.result = invalidate(channel, o); break;
    }
    if (::send(socket, &out, sizeof out, 0) < 0) ::_exit(0);
  }
}

}  // namespace

Status Agent::start() {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) return fail_errno(errno, "pmem agent");
  Fd ours(pair[0]), theirs(pair[1]);
  const pid_t child = ::fork();
  if (child < 0) return fail_errno(errno, "pmem agent: fork");
  if (child == 0) {
    const pid_t grandchild = ::fork();
    if (grandchild != 0) ::_exit(grandchild < 0 ? 1 : 0);
    // Everything but our own descriptors goes: sockets of guests must not live on here. They are moved up first, as
    // one may sit in the place of another.
    const int high = 1000;
    const int s = ::fcntl(theirs.get(), F_DUPFD, high), f = ::fcntl(file_, F_DUPFD, high);
    const int c = channel_ < 0 ? -1 : ::fcntl(channel_, F_DUPFD, high);
    if (s < 0 || f < 0 || (channel_ >= 0 && c < 0)) ::_exit(1);
    const int first = std::min(s, c < 0 ? f : std::min(f, c));
    const int last = std::max(s, std::max(f, c));
    ::syscall(SYS_close_range, 3u, static_cast<unsigned>(first - 1), 0);
    for (int fd = first; fd <= last; ++fd)
      if (fd != s && fd != f && fd != c) ::close(fd);
    ::syscall(SYS_close_range, static_cast<unsigned>(last + 1), ~0u, 0);
    serve(s, f, c);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {}
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return fail(ErrorKind::kNoMemory, "pmem agent: fork");
  socket_ = std::move(ours);
  return {};
}

Result<int64_t> Agent::call(Op op, uint64_t offset, uint64_t length, int64_t pid, std::span<const iovec> ranges) {
  SPILLWAY_ASSERT(ranges.size() <= kMaxRanges);
  std::lock_guard lock(mutex_);
  if (!socket_) SPILLWAY_CHECK(start());
  Order o{};
  o.op = op;
  o.count = static_cast<uint32_t>(ranges.size());
  o.offset = offset;
  o.length = length;
  o.pid = pid;
  std::copy(ranges.begin(), ranges.end(), o.ranges);
  Outcome out{};
  ssize_t n = ::send(socket_.get(), &o, sizeof o, MSG_NOSIGNAL);
  if (n == sizeof o) {
    do n = ::recv(socket_.get(), &out, sizeof out, 0);
    while (n < 0 && errno == EINTR);
  }
  if (n != sizeof out) {
    socket_.reset();  // somebody killed it: the next call starts another one
    return fail(ErrorKind::kIo, "pmem agent: gone");
  }
  if (out.result < 0) return fail_errno(static_cast<int>(-out.result), "pmem agent");
  return out.result;
}

void Agent::close() {
  // A call in progress holds the mutex; its thread sees the socket's end.
  if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
  std::lock_guard lock(mutex_);
  socket_.reset();
}

}  // namespace spillway::fuse
