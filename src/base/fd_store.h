// FdStore: descriptors and small state that outlive the worker (the holder keeps them, ARCHITECTURE "the holder").
//
// An entry is a name ("cache/frames0", "vhost/vm1/conn"), up to kMaxFds descriptors and a blob of at most
// kMaxBlob bytes. `put` replaces an entry of the same name as one step: after a kill -9 a successor sees the
// old entry whole or the new one whole. The worker's own copies of the descriptors stay its own.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/base/result.h"

namespace spillway {

// Thread-safety: all methods of an implementation may be called from any thread; they may block for a round
// trip to the holder (tens of microseconds): not for a hot path.
class FdStore {
 public:
  static constexpr size_t kMaxFds = 64;
  static constexpr size_t kMaxBlob = 64 * 1024;

  struct Entry {
    std::vector<Fd> fds;
    std::string blob;
  };

  virtual ~FdStore() = default;
  // Duplicates `fds` into the store. kInvalid over the limits.
  virtual Status put(const std::string& name, std::span<const int> fds, std::string_view blob) = 0;
  // Fresh duplicates of what is stored; kNotFound.
  virtual Result<Entry> get(const std::string& name) = 0;
  // Forgets the entry and closes the store's copies; success when there is none.
  virtual Status remove(const std::string& name) = 0;
  // Names that begin with `prefix`, sorted.
  virtual Result<std::vector<std::string>> list(const std::string& prefix) = 0;
};

// The store in this process: for tests, for the offline CLI, and inside the holder itself.
class MemoryFdStore : public FdStore {
 public:
  Status put(const std::string& name, std::span<const int> fds, std::string_view blob) override;
  Result<Entry> get(const std::string& name) override;
  Status remove(const std::string& name) override;
  Result<std::vector<std::string>> list(const std::string& prefix) override;

 private:
  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

}  // namespace spillway
