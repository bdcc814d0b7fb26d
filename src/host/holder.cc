#include "src/host/holder.h"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#include <cstring>
#include <deque>
#include <memory>

#include <fmt/core.h>

#include "src/base/log.h"

namespace spillway {
namespace {

enum Op : uint8_t { kPut = 1, kGet, kRemove, kList, kReady, kRestarts };

struct Header {
  uint8_t op = 0;
  uint8_t status = 0;  // reply: an ErrorKind + 1, 0 = ok
  uint16_t name_length = 0;
  uint32_t blob_length = 0;
  uint32_t fd_count = 0;
};

constexpr size_t kMaxPacket = sizeof(Header) + 4096 + FdStore::kMaxBlob + 256 * 1024;
constexpr unsigned kMaxRestarts = 60;
constexpr int64_t kRestartWindowSeconds = 60;

struct Packet {
  Header header;
  std::string name, blob;
  std::vector<Fd> fds;
};

Status send_packet(int socket, const Header& h, std::string_view name, std::string_view blob,
                   std::span<const int> fds) {
  iovec iov[3] = {{const_cast<Header*>(&h), sizeof h},
                  {const_cast<char*>(name.data()), name.size()},
                  {const_cast<char*>(blob.data()), blob.size()}};
  msghdr msg{};
  msg.msg_iov = iov;
  msg.msg_iovlen = 3;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * FdStore::kMaxFds)] = {};
  if (!fds.empty()) {
    msg.msg_control = control;
    msg.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
  }
  ssize_t n;
  do {
    n = ::sendmsg(socket, &msg, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return fail_errno(errno, "holder socket: send");
  return {};
}

// kNotFound at the end of the stream.
Result<Packet> receive_packet(int socket, std::vector<char>& buffer) {
  buffer.resize(kMaxPacket);
  iovec iov{buffer.data(), buffer.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * FdStore::kMaxFds)];
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  ssize_t n;
  do {
    n = ::recvmsg(socket, &msg, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return fail_errno(errno, "holder socket: receive");
  if (n == 0) return fail(ErrorKind::kNotFound, "holder socket: closed");
  Packet p;
  for (cmsghdr* c = CMSG_FIRSTHDR(&msg); c != nullptr; c = CMSG_NXTHDR(&msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
      p.fds.emplace_back(fd);
    }
  }
  if ((msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0)
    return fail(ErrorKind::kInvalid, "holder socket: packet or descriptors truncated");
  if (static_cast<size_t>(n) < sizeof(Header)) return fail(ErrorKind::kInvalid, "holder socket: short packet");
  std::memcpy(&p.header, buffer.data(), sizeof(Header));
  if (sizeof(Header) + p.header.name_length + p.header.blob_length != static_cast<size_t>(n) ||
      p.header.fd_count != p.fds.size())
    return fail(ErrorKind::kInvalid, "holder socket: lengths do not add up");
  p.name.assign(buffer.data() + sizeof(Header), p.header.name_length);
  p.blob.assign(buffer.data() + sizeof(Header) + p.header.name_length, p.header.blob_length);
  return p;
}

// systemd's notification protocol (sd_notify(3)): one datagram; nothing when the variable is not set.
void notify_systemd(std::string_view state) {
  const char* path = ::getenv("NOTIFY_SOCKET");
  if (path == nullptr) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const size_t length = std::strlen(path);
  if (length == 0 || length >= sizeof address.sun_path) return;
  std::memcpy(address.sun_path, path, length);
  if (path[0] == '@') address.sun_path[0] = 0;
  Fd s(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (s)
    ::sendto(s.get(), state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address),
             static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length));
}

class Holder {
 public:
  explicit Holder(std::vector<std::string> argv) : argv_(std::move(argv)) {}

  int run() {
    sigset_t mask;
    sigemptyset(&mask);
    for (int s : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&mask, s);
    ::pthread_sigmask(SIG_BLOCK, &mask, &old_mask_);
    ::signal(SIGPIPE, SIG_IGN);
    Fd signals(::signalfd(-1, &mask, SFD_CLOEXEC));
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
      files.rlim_cur = files.rlim_max;
      ::setrlimit(RLIMIT_NOFILE, &files);
    }
    if (!signals || !start_worker()) return 1;
    for (;;) {
      pollfd fds[3] = {{socket_.get(), POLLIN, 0}, {signals.get(), POLLIN, 0}, {pidfd_.get(), POLLIN, 0}};
      if (::poll(fds, 3, -1) < 0 && errno != EINTR) return 1;
      if ((fds[0].revents & POLLIN) != 0) serve();
      if ((fds[1].revents & POLLIN) != 0) {
        signalfd_siginfo info;
        if (::read(signals.get(), &info, sizeof info) == sizeof info) {
          stopping_ = stopping_ || info.ssi_signo != SIGHUP;
          ::kill(pid_, static_cast<int>(info.ssi_signo));
        }
      }
      if ((fds[2].revents & POLLIN) != 0) {
        int code = 0;
        if (!worker_died(&code)) return code;
      }
    }
  }

 private:
  bool start_worker() {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) return failed("socketpair");
    socket_.reset(pair[0]);
    Fd theirs(pair[1]);
    const int size = 1 << 20;
    for (int fd : {socket_.get(), theirs.get()}) {
      ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
      ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    }
    auto args = argv_;
    args.push_back(fmt::format("--store-fd={}", theirs.get()));
    std::vector<char*> argv;
    for (auto& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    const pid_t holder = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) return failed("fork");
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != holder) ::_exit(1);
      ::fcntl(theirs.get(), F_SETFD, 0);
      ::pthread_sigmask(SIG_SETMASK, &old_mask_, nullptr);
      ::execv("/proc/self/exe", argv.data());
      ::_exit(127);
    }
    pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    if (!pidfd_) return failed("pidfd_open");
    return true;
  }
  static bool failed(const char* what) {
    log(LogLevel::kError, "holder", "{}: {}", what, std::strerror(errno));
    return false;
  }

  // True: restarted. False: *code is the exit code.
  bool worker_died(int* code) {
    int status = 0;
    if (::waitpid(pid_, &status, 0) != pid_) {
      *code = 1;
      return false;
    }
    if (stopping_ || !ready_ || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) {
      *code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      return false;
    }
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    deaths_.push_back(now.tv_sec);
    while (deaths_.front() < now.tv_sec - kRestartWindowSeconds) deaths_.pop_front();
    const std::string how = WIFSIGNALED(status) ? fmt::format("signal {}", WTERMSIG(status))
                                                : fmt::format("exit code {}", WEXITSTATUS(status));
    if (deaths_.size() > kMaxRestarts) {
      log(LogLevel::kError, "holder", "worker {} died by {}: {} deaths in {} s, giving up", pid_, how,
          deaths_.size(), kRestartWindowSeconds);
      *code = 1;
      return false;
    }
    ++restarts_;
    log(LogLevel::kWarn, "holder", "worker {} died by {}: restart {}", pid_, how, restarts_);
    if (!start_worker()) {
      *code = 1;
      return false;
    }
    return true;
  }

  void reply(ErrorKind kind, std::string_view text) {
    Header h;
    h.status = static_cast<uint8_t>(kind) + 1;
    h.blob_length = static_cast<uint32_t>(text.size());
    answer(h, text, {});
  }
  void answer(const Header& h, std::string_view blob, std::span<const int> fds) {
    if (auto s = send_packet(socket_.get(), h, {}, blob, fds); !s)
      log(LogLevel::kWarn, "holder", "{}", s.error().message());
  }

  void serve() {
    auto packet = receive_packet(socket_.get(), buffer_);
    if (!packet) {
      if (packet.error().kind() == ErrorKind::kInvalid) reply(ErrorKind::kInvalid, packet.error().message());
      else socket_.reset();  // the worker is gone; its pidfd says so too
      return;
    }
    Header ok;
    switch (packet->header.op) {
      case kPut: {
        std::vector<int> fds;
        for (auto& fd : packet->fds) fds.push_back(fd.get());
        auto s = store_.put(packet->name, fds, packet->blob);
        return s ? answer(ok, {}, {}) : reply(s.error().kind(), s.error().message());
      }
      case kGet: {
        auto e = store_.get(packet->name);
        if (!e) return reply(e.error().kind(), e.error().message());
        std::vector<int> fds;
        for (auto& fd : e->fds) fds.push_back(fd.get());
        ok.blob_length = static_cast<uint32_t>(e->blob.size());
        ok.fd_count = static_cast<uint32_t>(fds.size());
        return answer(ok, e->blob, fds);
      }
      case kRemove:
        (void)store_.remove(packet->name);
        return answer(ok, {}, {});
      case kList: {
        std::string all;
        const auto names = store_.list(packet->name);
        for (auto& name : *names) all += name + '\n';
        ok.blob_length = static_cast<uint32_t>(all.size());
        return answer(ok, all, {});
      }
      case kReady:
        if (!ready_) notify_systemd("READY=1");
        ready_ = true;
        return answer(ok, {}, {});
      case kRestarts: {
        const std::string n = fmt::format("{}", restarts_);
        ok.blob_length = static_cast<uint32_t>(n.size());
        return answer(ok, n, {});
      }
      default: return reply(ErrorKind::kUnsupported, "holder: unknown operation");
    }
  }

  std::vector<std::string> argv_;
  MemoryFdStore store_;
  std::vector<char> buffer_;
  Fd socket_, pidfd_;
  pid_t pid_ = -1;
  sigset_t old_mask_{};
  bool ready_ = false, stopping_ = false;
  uint64_t restarts_ = 0;
  std::deque<int64_t> deaths_;
};

}  // namespace

int run_holder(const std::vector<std::string>& worker_argv) { return Holder(worker_argv).run(); }

Result<RemoteFdStore::Reply> RemoteFdStore::call(uint8_t op, const std::string& name,
                                                 std::span<const int> fds, std::string_view blob) {
  if (name.size() > 1024 || blob.size() > kMaxBlob || fds.size() > kMaxFds)
    return fail(ErrorKind::kInvalid, fmt::format("fd store: {}: {} descriptors, {} bytes: over the limit", name,
                                                 fds.size(), blob.size()));
  Header h;
  h.op = op;
  h.name_length = static_cast<uint16_t>(name.size());
  h.blob_length = static_cast<uint32_t>(blob.size());
  h.fd_count = static_cast<uint32_t>(fds.size());
  std::lock_guard lock(mutex_);
  SPILLWAY_CHECK(send_packet(socket_.get(), h, name, blob, fds));
  std::vector<char> buffer;
  SPILLWAY_TRY(Packet p, receive_packet(socket_.get(), buffer));
  if (p.header.status != 0) return fail(static_cast<ErrorKind>(p.header.status - 1), std::move(p.blob));
  return Reply{std::move(p.blob), std::move(p.fds)};
}

Status RemoteFdStore::put(const std::string& name, std::span<const int> fds, std::string_view blob) {
  SPILLWAY_TRY([[maybe_unused]] Reply r, call(kPut, name, fds, blob));
  return {};
}
Result<FdStore::Entry> RemoteFdStore::get(const std::string& name) {
  SPILLWAY_TRY(Reply r, call(kGet, name, {}, {}));
  return Entry{std::move(r.fds), std::move(r.blob)};
}
Status RemoteFdStore::remove(const std::string& name) {
  SPILLWAY_TRY([[maybe_unused]] Reply r, call(kRemove, name, {}, {}));
  return {};
}
Result<std::vector<std::string>> RemoteFdStore::list(const std::string& prefix) {
  SPILLWAY_TRY(Reply r, call(kList, prefix, {}, {}));
  std::vector<std::string> names;
  for (size_t at = 0; at < r.blob.size();) {
    const size_t end = r.blob.find('\n', at);
    names.push_back(r.blob.substr(at, end - at));
    at = end + 1;
  }
  return names;
}
Status RemoteFdStore::ready() {
  SPILLWAY_TRY([[maybe_unused]] Reply r, call(kReady, {}, {}, {}));
  return {};
}
Result<uint64_t> RemoteFdStore::restarts() {
  SPILLWAY_TRY(Reply r, call(kRestarts, {}, {}, {}));
  return std::stoull(r.blob);
}

}  // namespace spillway
