// Exit codes of the CLI, and the one line on stderr that goes with them.
#pragma once

#include <cstdio>

#include "src/base/result.h"

namespace spillway {

enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,
  kExitUsage = 2,
  kExitNotFound = 3,
  kExitBusy = 4,
  kExitDegraded = 5,
  kExitUnreachable = 6,
};

inline int exit_code_of(const Error& e) {
  switch (e.kind()) {
    case ErrorKind::kInvalid: return kExitUsage;
    case ErrorKind::kNotFound: return kExitNotFound;
    case ErrorKind::kBusy: return kExitBusy;
    case ErrorKind::kDegraded: return kExitDegraded;
    default: return kExitFailed;
  }
}

inline int report_error(const Error& e) {
  std::fprintf(stderr, "spillway: %s\n", e.message().c_str());
  return exit_code_of(e);
}

}  // namespace spillway
