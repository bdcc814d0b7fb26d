#include "src/control/server.h"

#include <poll.h>
#include <sys/socket.h>

#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/base/unix_socket.h"

namespace spillway {

using nlohmann::json;

ControlServer::ControlServer(Fd listener, ControlHandler handler)
    : listener_(std::move(listener)), handler_(std::move(handler)) {}

void ControlServer::stop() {
  stopping_ = true;
  ::shutdown(listener_.get(), SHUT_RDWR);  // wakes the pending accept with EINVAL
}

Task<void> ControlServer::run() {
  Reactor& reactor = Reactor::current();
  while (!stopping_) {
    const int fd = co_await reactor.accept(listener_.get());
    if (fd < 0) {
      if (stopping_) break;
      LOG_LIMITED(LogLevel::kWarn, "control", "accept: errno {}", -fd);
      co_await reactor.sleep_for(100'000'000);  // out of descriptors: try again later, not at once
      continue;
    }
    Fd connection(fd);
    if (connections_ >= kMaxConnections) {
      LOG_LIMITED(LogLevel::kWarn, "control", "more than {} connections: one refused", kMaxConnections);
      continue;
    }
    ++connections_;
    active_.add();
    reactor.spawn(serve(std::move(connection)));
  }
  co_await active_.wait_idle();
}

static std::string error_line(const Error& e) {
  json j{{"ok", false}, {"kind", std::string(to_string(e.kind()))}, {"error", e.message()}};
  return j.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

static Task<bool> send_all(int fd, const std::string& text) {
  size_t sent = 0;
  while (sent < text.size()) {
    iovec v{const_cast<char*>(text.data()) + sent, text.size() - sent};
    msghdr msg{};
    msg.msg_iov = &v;
    msg.msg_iovlen = 1;
    const int n = co_await Reactor::current().sendmsg(fd, &msg, MSG_NOSIGNAL);
    if (n <= 0) co_return false;
    sent += static_cast<size_t>(n);
  }
  co_return true;
}

Task<void> ControlServer::serve(Fd connection) {
  Reactor& reactor = Reactor::current();
  std::string pending;
  std::vector<char> buffer(16384);
  for (bool open = true; open;) {
    size_t end = pending.find('\n');
    if (end == std::string::npos) {
      if (pending.size() > kMaxLine) {
        Error too_long(ErrorKind::kInvalid, "control: request line too long");
        const std::string line = error_line(too_long);
        co_await send_all(connection.get(), line);
        break;
      }
      iovec v{buffer.data(), buffer.size()};
      msghdr msg{};
      msg.msg_iov = &v;
      msg.msg_iovlen = 1;
      const int n = co_await reactor.recvmsg(connection.get(), &msg, 0);
      if (n <= 0) break;
      pending.append(buffer.data(), static_cast<size_t>(n));
      continue;
    }
    const std::string line = pending.substr(0, end);
    pending.erase(0, end + 1);
    std::string reply;
    json request = json::parse(line, nullptr, false);
    if (request.is_discarded() || !request.is_object() || !request.contains("command") ||
        !request["command"].is_string()) {
      Error bad(ErrorKind::kInvalid, "control: a request is a JSON object with a \"command\"");
      reply = error_line(bad);
    } else {
      const std::string command = request["command"];
      json args = json::object();
      if (request.contains("args") && request["args"].is_object()) args = request["args"];
      Result<json> result = co_await handler_(command, args);
      if (result) {
        json ok{{"ok", true}, {"result", std::move(*result)}};
        reply = ok.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
      } else {
        reply = error_line(result.error());
      }
    }
    open = co_await send_all(connection.get(), reply);
  }
  connection.reset();
  --connections_;
  active_.done();
}

static ErrorKind kind_named(const std::string& name) {
  for (int k = 0; k <= static_cast<int>(ErrorKind::kDegraded); ++k)
    if (to_string(static_cast<ErrorKind>(k)) == name) return static_cast<ErrorKind>(k);
  return ErrorKind::kIo;
}

Result<json> control_call(const std::string& socket, const std::string& command, const json& args) {
  SPILLWAY_TRY(Fd fd, connect_unix(socket));
  const std::string line = json{{"command", command}, {"args", args}}.dump() + "\n";
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t n = ::send(fd.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail_errno(errno, "control socket: send");
    sent += static_cast<size_t>(n);
  }
  std::string reply;
  char buffer[65536];
  while (reply.find('\n') == std::string::npos) {
    const ssize_t n = ::recv(fd.get(), buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail_errno(errno, "control socket: receive");
    if (n == 0) return fail(ErrorKind::kCanceled, "control socket: the daemon went away before it answered");
    reply.append(buffer, static_cast<size_t>(n));
  }
  json j = json::parse(reply, nullptr, false);
  if (j.is_discarded() || !j.is_object() || !j.contains("ok"))
    return fail(ErrorKind::kCorrupt, "control socket: the reply is no JSON object");
  if (!j["ok"].get<bool>()) return fail(kind_named(j.value("kind", "")), j.value("error", "unknown error"));
  return j["result"];
}

}  // namespace spillway
