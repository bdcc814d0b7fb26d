#include "src/base/fd_store.h"

#include <fmt/core.h>

namespace spillway {

static Status dup_all(std::span<const int> fds, std::vector<Fd>& out) {
  for (int fd : fds) {
    Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy) return fail_errno(errno, fmt::format("fd store: dup of descriptor {}", fd));
    out.push_back(std::move(copy));
  }
  return {};
}

Status MemoryFdStore::put(const std::string& name, std::span<const int> fds, std::string_view blob) {
  if (fds.size() > kMaxFds || blob.size() > kMaxBlob)
    return fail(ErrorKind::kInvalid, fmt::format("fd store: {}: {} descriptors, {} bytes: over the limit",
                                                 name, fds.size(), blob.size()));
  Entry entry;
  SPILLWAY_CHECK(dup_all(fds, entry.fds));
  entry.blob = blob;
  std::lock_guard lock(mutex_);
  entries_.insert_or_assign(name, std::move(entry));
  return {};
}

Result<FdStore::Entry> MemoryFdStore::get(const std::string& name) {
  std::lock_guard lock(mutex_);
  auto it = entries_.find(name);
  if (it == entries_.end()) return fail(ErrorKind::kNotFound, "fd store: " + name);
  Entry copy;
  std::vector<int> raw;
  for (auto& fd : it->second.fds) raw.push_back(fd.get());
  SPILLWAY_CHECK(dup_all(raw, copy.fds));
  copy.blob = it->second.blob;
  return copy;
}

Status MemoryFdStore::remove(const std::string& name) {
  std::lock_guard lock(mutex_);
  entries_.erase(name);
  return {};
}

Result<std::vector<std::string>> MemoryFdStore::list(const std::string& prefix) {
  std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (auto it = entries_.lower_bound(prefix);
       it != entries_.end() && it->first.compare(0, prefix.size(), prefix) == 0; ++it)
    names.push_back(it->first);
  return names;
}

}  // namespace spillway
