// ExtentWatch: keeps disks that tenants write free of extents shared with another tenant's files (P6): at the start, when
// sharing is refused or undone, and again every `extent_check_s`, since a reflink can be made at any time.
//
// Thread-confined to the main reactor; FIEMAP runs on the blocking pool.
#pragma once

#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/control/config.h"
#include "src/host/extents.h"
#include "src/io/blocking_pool.h"

namespace spillway {

class ExtentWatch {
 public:
  ExtentWatch(const Config& config, BlockingPool& pool) : config_(config), pool_(pool) {}

  // Looks once. With `unshare` in the config shared extents are copied; what is left is in the result: for each a
  // disk of the config (its name) and a line for a person. An error: a file could not be asked or unshared.
  struct Finding {
    std::string disk;
    std::string text;
  };
  Task<Result<std::vector<Finding>>> look();
  // The exports of the config that write this disk.
  std::vector<std::string> writers_of(const std::string& disk) const;

 private:
  std::vector<std::string> disks_below(const std::string& volume) const;
  Result<std::vector<Finding>> look_blocking() const;
  const Config& config_;
  BlockingPool& pool_;
};

}  // namespace spillway
