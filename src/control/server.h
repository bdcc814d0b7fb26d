// The control socket: one JSON object a line, one reply a line.
//   {"command": "status", "args": {...}}  ->  {"ok": true, "result": ...}
//                                          |  {"ok": false, "kind": "not found", "error": "one line"}
// Thread-safety: confined to the reactor it was started on. At most kMaxConnections at once, a request line of at most
// kMaxLine bytes; over that the connection is closed with an error line.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "src/base/fd.h"
#include "src/io/reactor.h"
#include "src/io/sync.h"

namespace spillway {

using ControlHandler =
    std::function<Task<Result<nlohmann::json>>(const std::string& command, const nlohmann::json& args)>;

class ControlServer {
 public:
  static constexpr size_t kMaxLine = 256 * 1024;
  static constexpr unsigned kMaxConnections = 32;

  ControlServer(Fd listener, ControlHandler handler);
  // Accepts until stop(). Spawn on the reactor that shall run the commands.
  Task<void> run();
  // Own reactor only. run() ends when the last connection has.
  void stop();

 private:
  Task<void> serve(Fd connection);
  Fd listener_;
  ControlHandler handler_;
  bool stopping_ = false;
  unsigned connections_ = 0;
  AsyncCounter active_;
};

// Client side, blocking: for the CLI. kNotFound when no daemon listens; otherwise the daemon's own error.
Result<nlohmann::json> control_call(const std::string& socket, const std::string& command,
                                    const nlohmann::json& args);

}  // namespace spillway
