// Small file pieces of the pressure sources, apart so that they can be tested.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace spillway::reclaim {

class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& o) noexcept : fd_(std::exchange(o.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& o) noexcept;
  ~UniqueFd() { reset(); }
  int get() const noexcept { return fd_; }
  void reset() noexcept;

 private:
  int fd_;
};

/// Whole text of a small (procfs, sysfs, cgroupfs) file; at most 1 MiB.
std::optional<std::string> read_text(const std::string& path);
/// `key value`, `key: value kB`, also with a prefix before the key (`Node 0 MemFree: 1 kB`): bytes.
std::optional<std::uint64_t> field_of(std::string_view text, std::string_view key);
/// A file that holds one number, or "max".
std::optional<std::uint64_t> number_of(const std::string& path);
std::optional<std::string> base64_decode(std::string_view in);

}  // namespace spillway::reclaim
