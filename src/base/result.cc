#include "src/base/result.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace spillway {

std::string_view to_string(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalid: return "invalid";
    case ErrorKind::kOutOfRange: return "out of range";
    case ErrorKind::kIo: return "I/O error";
    case ErrorKind::kNoSpace: return "no space";
    case ErrorKind::kNoMemory: return "no memory";
    case ErrorKind::kNotFound: return "not found";
    case ErrorKind::kExists: return "exists";
    case ErrorKind::kBusy: return "busy";
    case ErrorKind::kUnsupported: return "unsupported";
    case ErrorKind::kCorrupt: return "corrupt";
    case ErrorKind::kPermission: return "permission denied";
    case ErrorKind::kReadOnly: return "read-only";
    case ErrorKind::kTimeout: return "timed out";
    case ErrorKind::kCanceled: return "canceled";
    case ErrorKind::kDegraded: return "degraded";
  }
  return "unknown";
}

static ErrorKind kind_of(int err) {
  switch (err) {
    case EINVAL: case ENAMETOOLONG: case ENOTDIR: case EISDIR: case EPROTO: case EBADMSG:
      return ErrorKind::kInvalid;
    case ENOSPC: case EDQUOT: case EFBIG: return ErrorKind::kNoSpace;
    case ENOMEM: case ENOBUFS: return ErrorKind::kNoMemory;
    case ENOENT: case ENXIO: case ENODEV: return ErrorKind::kNotFound;
    case EEXIST: case EADDRINUSE: return ErrorKind::kExists;
    case EBUSY: case EAGAIN: case ETXTBSY: return ErrorKind::kBusy;
    case EOPNOTSUPP: case ENOSYS: return ErrorKind::kUnsupported;
    case EACCES: case EPERM: return ErrorKind::kPermission;
    case EROFS: return ErrorKind::kReadOnly;
    case ETIMEDOUT: case ETIME: return ErrorKind::kTimeout;
    case ECANCELED: return ErrorKind::kCanceled;
    case ERANGE: case EOVERFLOW: return ErrorKind::kOutOfRange;
    default: return ErrorKind::kIo;
  }
}

Error Error::from_errno(int err, std::string context) {
  if (!context.empty()) context += ": ";
  context += std::strerror(err);
  return Error(kind_of(err), std::move(context), err);
}

int Error::to_errno() const {
  if (sys_ != 0) return sys_;
  switch (kind_) {
    case ErrorKind::kInvalid: return EINVAL;
    case ErrorKind::kOutOfRange: return EINVAL;
    case ErrorKind::kIo: case ErrorKind::kCorrupt: case ErrorKind::kDegraded: return EIO;
    case ErrorKind::kNoSpace: return ENOSPC;
    case ErrorKind::kNoMemory: return ENOMEM;
    case ErrorKind::kNotFound: return ENOENT;
    case ErrorKind::kExists: return EEXIST;
    case ErrorKind::kBusy: return EBUSY;
    case ErrorKind::kUnsupported: return EOPNOTSUPP;
    case ErrorKind::kPermission: return EPERM;
    case ErrorKind::kReadOnly: return EROFS;
    case ErrorKind::kTimeout: return ETIMEDOUT;
    case ErrorKind::kCanceled: return ECANCELED;
  }
  return EIO;
}

std::string Error::message() const {
  if (!context_) return std::string(to_string(kind_));
  return *context_;
}

Error Error::with_context(std::string_view outer) && {
  std::string text(outer);
  text += ": ";
  text += context_ ? *context_ : std::string(to_string(kind_));
  return Error(kind_, std::move(text), sys_);
}

void assertion_failed(const char* what, const char* file, int line) {
  std::fprintf(stderr, "spillway: assertion failed: %s (%s:%d)\n", what, file, line);
  std::abort();
}

}  // namespace spillway
