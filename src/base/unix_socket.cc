#include "src/base/unix_socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>

#include <fmt/core.h>

namespace spillway {

static Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof a.sun_path)
    return fail(ErrorKind::kInvalid, fmt::format("socket {}: a path has 1 to {} bytes", path, sizeof a.sun_path - 1));
  std::memcpy(a.sun_path, path.data(), path.size());
  return a;
}

Result<Fd> connect_unix(const std::string& path) {
  SPILLWAY_TRY(sockaddr_un a, address_of(path));
  Fd s(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!s) return fail_errno(errno, "socket");
  if (::connect(s.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) != 0) {
    if (errno == ECONNREFUSED || errno == ENOENT)
      return fail(ErrorKind::kNotFound, fmt::format("socket {}: nobody listens", path));
    return fail_errno(errno, fmt::format("socket {}", path));
  }
  return s;
}

Status check_listen_unix(const std::string& path) {
  SPILLWAY_TRY([[maybe_unused]] sockaddr_un a, address_of(path));
  struct stat st{};
  if (::lstat(path.c_str(), &st) != 0) {
    const auto slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
    if (::access(folder.c_str(), W_OK | X_OK) != 0)
      return fail_errno(errno, fmt::format("socket {}: folder {}", path, folder));
    return {};
  }
  if (!S_ISSOCK(st.st_mode))
    return fail(ErrorKind::kExists, fmt::format("socket {}: a file that is no socket is there", path));
  if (connect_unix(path))
    return fail(ErrorKind::kBusy, fmt::format("socket {}: already in use by a running process", path));
  return {};
}

Result<Fd> listen_unix(const std::string& path, unsigned mode) {
  SPILLWAY_TRY(sockaddr_un a, address_of(path));
  SPILLWAY_CHECK(check_listen_unix(path));
  ::unlink(path.c_str());
  Fd s(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!s) return fail_errno(errno, "socket");
  // The mode is set before anybody can connect: bind makes the file, listen opens it.
  if (::bind(s.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) != 0 || ::chmod(path.c_str(), mode) != 0 ||
      ::listen(s.get(), 64) != 0)
    return fail_errno(errno, fmt::format("socket {}", path));
  return s;
}

}  // namespace spillway
