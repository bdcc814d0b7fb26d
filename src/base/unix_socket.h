// Listening and connecting on UNIX stream sockets. Any thread.
#pragma once

#include <string>

#include "src/base/fd.h"
#include "src/base/result.h"

namespace spillway {

// A non-blocking=false, close-on-exec listener with the given mode. A stale socket file (nobody accepts) is replaced;
// a live one is kBusy; another kind of file is kExists. The text names the path.
Result<Fd> listen_unix(const std::string& path, unsigned mode = 0660);
// kBusy / kExists as above when `path` could not be listened on; touches nothing.
Status check_listen_unix(const std::string& path);
// kNotFound when nobody listens there.
Result<Fd> connect_unix(const std::string& path);

}  // namespace spillway
