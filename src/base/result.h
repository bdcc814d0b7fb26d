// Result<T>: a value or an Error. No exceptions cross a folder or run on the I/O path.
//
// An Error is a kind (what callers branch on), an errno where the kernel gave one, and a context text
// ("volume fast: read 4096 at 65536: ..."). The text is on the heap, so that a Result stays two words
// and the success path never touches it. Mapped to virtio status, errno or exit code only at the edge.
#pragma once

#include <cerrno>
#include <cstdint>
#include <expected>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace spillway {

enum class ErrorKind : uint8_t {
  kInvalid,      // the caller's argument, a malformed config, image or message
  kOutOfRange,   // offset or length beyond the end
  kIo,           // the device failed this request (EIO, short read)
  kNoSpace,      // ENOSPC, EDQUOT
  kNoMemory,     // a charge or an allocation failed
  kNotFound,
  kExists,
  kBusy,         // in use, locked, try later
  kUnsupported,  // known, and refused by name
  kCorrupt,      // on-disk or in-memory structure fails its checks
  kPermission,
  kReadOnly,
  kTimeout,
  kCanceled,
  kDegraded,     // not enough redundancy left to do this safely
};

std::string_view to_string(ErrorKind kind);

// Thread-safety: a value type. Copying copies the text.
class [[nodiscard]] Error {
 public:
  explicit Error(ErrorKind kind, std::string context = {}, int sys = 0)
      : context_(context.empty() ? nullptr : std::make_unique<std::string>(std::move(context))),
        sys_(sys),
        kind_(kind) {}
  Error(const Error& o)
      : context_(o.context_ ? std::make_unique<std::string>(*o.context_) : nullptr),
        sys_(o.sys_),
        kind_(o.kind_) {}
  Error(Error&&) noexcept = default;
  Error& operator=(Error&&) noexcept = default;
  Error& operator=(const Error& o) { return *this = Error(o); }
  ~Error() = default;

  // From an errno (positive): picks the kind, adds strerror to the context.
  static Error from_errno(int err, std::string context);

  ErrorKind kind() const { return kind_; }
  // The errno to report at a POSIX edge: the kernel's own where there was one, else one that fits the kind.
  int to_errno() const;
  // "context: kind" in one line.
  std::string message() const;
  // The same error seen from one layer further up: "outer: inner".
  Error with_context(std::string_view outer) &&;

 private:
  std::unique_ptr<std::string> context_;
  int sys_ = 0;
  ErrorKind kind_;
};

template <class T>
using Result = std::expected<T, Error>;
using Status = Result<void>;

inline std::unexpected<Error> fail(ErrorKind kind, std::string context = {}) {
  return std::unexpected(Error(kind, std::move(context)));
}
inline std::unexpected<Error> fail(Error error) { return std::unexpected(std::move(error)); }
inline std::unexpected<Error> fail_errno(int err, std::string context) {
  return std::unexpected(Error::from_errno(err, std::move(context)));
}

}  // namespace spillway

// Our own mistake (never a guest's or a user's): prints and aborts; stays on in release builds.
#define SPILLWAY_ASSERT(cond)                                              \
  do {                                                                     \
    if (!(cond)) [[unlikely]]                                              \
      ::spillway::assertion_failed(#cond, __FILE__, __LINE__);             \
  } while (0)

namespace spillway {
[[noreturn]] void assertion_failed(const char* what, const char* file, int line);
}

// SPILLWAY_TRY(auto x, expr): x = value of the Result, or return its error. The co_ form is for coroutines.
#define SPILLWAY_CAT2(a, b) a##b
#define SPILLWAY_CAT(a, b) SPILLWAY_CAT2(a, b)
#define SPILLWAY_TRY_IMPL(tmp, decl, expr, ret)                   \
  auto tmp = (expr);                                              \
  if (!tmp) [[unlikely]]                                          \
    ret ::std::unexpected(::std::move(tmp).error());              \
  decl = ::std::move(*tmp)
#define SPILLWAY_TRY(decl, expr) SPILLWAY_TRY_IMPL(SPILLWAY_CAT(result_, __LINE__), decl, expr, return)
#define SPILLWAY_CO_TRY(decl, expr) \
  SPILLWAY_TRY_IMPL(SPILLWAY_CAT(result_, __LINE__), decl, expr, co_return)
#define SPILLWAY_CHECK_IMPL(tmp, expr, ret) \
  do {                                      \
    auto tmp = (expr);                      \
    if (!tmp) [[unlikely]]                  \
      ret ::std::unexpected(::std::move(tmp).error()); \
  } while (0)
// For Status: return its error, or go on.
#define SPILLWAY_CHECK(expr) SPILLWAY_CHECK_IMPL(SPILLWAY_CAT(status_, __LINE__), expr, return)
#define SPILLWAY_CO_CHECK(expr) SPILLWAY_CHECK_IMPL(SPILLWAY_CAT(status_, __LINE__), expr, co_return)
