// What tests of images share: files in a folder of their own, a leaf that records writes for power cuts, and a model
// of what an image must read as.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <fmt/core.h>

#include "src/image/image.h"
#include "src/image/qcow2.h"
#include "src/io/reactor.h"
#include "src/volume/file/file.h"
#include "src/volume/memory/memory.h"

namespace spillway::image_testing {

class TempDir {
 public:
  TempDir() {
    std::string t = std::filesystem::temp_directory_path() / "spillway-image-XXXXXX";
    path_ = ::mkdtemp(t.data());
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Output of a shell command; `*code` = exit status.
inline std::string shell(const std::string& command, int* code = nullptr) {
  std::string out;
  FILE* p = ::popen((command + " 2>&1").c_str(), "r");
  char buffer[4096];
  while (size_t n = std::fread(buffer, 1, sizeof buffer, p)) out.append(buffer, n);
  const int status = ::pclose(p);
  if (code != nullptr) *code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return out;
}
inline bool have_qemu() {
  static const bool have = ::system("qemu-img --version >/dev/null 2>&1 && qemu-io --version >/dev/null 2>&1") == 0;
  return have;
}

inline Result<VolumePtr> file_volume(const std::string& path, bool read_only = false, uint64_t create = 0) {
  FileOptions o;
  o.path = path;
  o.read_only = read_only;
  o.direct = false;
  o.create_size = create;
  return open_file(path, std::move(o));
}

// Opens what images name, next to them, as the daemon's composition root does: one volume a file, loops refused.
class Opener {
 public:
  explicit Opener(std::string folder) : folder_(std::move(folder)) {}
  Task<Result<VolumePtr>> open(std::string path, bool read_only, Qcow2Options options = {},
                               std::vector<std::string> chain = {}) {
    SPILLWAY_CO_CHECK(check_chain(chain, path));
    chain.push_back(path);
    SPILLWAY_CO_TRY(VolumePtr file, file_volume(path, read_only));
    options.read_only = read_only;
    if (!options.resolver)
      options.resolver = [this, path, chain](ImageReference r) { return resolve(path, chain, std::move(r)); };
    co_return co_await open_qcow2(path, std::move(file), std::move(options));
  }
  Task<Result<VolumePtr>> resolve(std::string image, std::vector<std::string> chain, ImageReference r) {
    SPILLWAY_CO_TRY(std::string path, resolve_image_path(image, r.name, {folder_}));
    if (r.role == ImageReference::Role::kDataFile) co_return file_volume(path, !r.writable);
    if (auto it = shared_.find(path); it != shared_.end()) co_return it->second;
    ImageFormat format = ImageFormat::kRaw;
    if (!r.format.empty()) {
      SPILLWAY_CO_TRY(format, parse_image_format(r.format));
    } else {
      SPILLWAY_CO_TRY(VolumePtr file, file_volume(path, true));
      SPILLWAY_CO_TRY(format, co_await probe_format(file));
    }
    VolumePtr v;
    if (format == ImageFormat::kRaw) {
      SPILLWAY_CO_TRY(v, file_volume(path, true));
    } else {
      Qcow2Options defaults;
      SPILLWAY_CO_TRY(v, co_await open(path, true, defaults, chain));
    }
    shared_[path] = v;
    co_return v;
  }
  std::map<std::string, VolumePtr> shared_;

 private:
  std::string folder_;
};

inline Task<Result<std::vector<std::byte>>> read_all(VolumePtr v, uint64_t most = ~uint64_t{0}) {
  std::vector<std::byte> data(std::min(v->size(), most));
  for (uint64_t at = 0; at < data.size();) {
    const uint64_t n = std::min<uint64_t>(data.size() - at, 1 << 20);
    const iovec iov{&data[at], n};
    SPILLWAY_CO_CHECK(co_await v->read(IoContext{}, at, Iov(&iov, 1)));
    at += n;
  }
  co_return data;
}
inline Task<Status> write_at(VolumePtr v, uint64_t offset, std::vector<std::byte> data, bool fua = false) {
  const iovec iov{data.data(), data.size()};
  IoContext ctx;
  ctx.fua = fua;
  co_return co_await v->write(ctx, offset, Iov(&iov, 1));
}
inline std::vector<std::byte> filled(uint64_t n, int value) { return std::vector<std::byte>(n, static_cast<std::byte>(value)); }

#define ASSERT_OK(expr)                                     \
  do {                                                      \
    auto ok_ = (expr);                                      \
    ASSERT_TRUE(ok_.has_value()) << ok_.error().message();  \
  } while (0)

// A disk that remembers every write since a moment, and what a power cut may leave of it: everything before the last
// flush that had completed, and of what came later any subset of its sectors.
class RecordingVolume final : public Volume {
 public:
  RecordingVolume(uint64_t size, uint32_t block_size = 512)
      : Volume("recording", size, [&] {
          Geometry g;
          g.block_size = block_size;
          g.discard_granularity = 4096;
          return g;
        }()), data_(size) {}
  std::string_view layer() const override { return "recording"; }

  struct Event {
    enum class Kind { kWrite, kFlushDone, kMark } kind;
    uint64_t offset = 0;
    std::vector<std::byte> bytes;
    uint64_t mark = 0;
  };
  // Call when the state on the disk is stable.
  void start() {
    base_ = data_;
    events_.clear();
  }
  void mark(uint64_t id) { events_.push_back({Event::Kind::kMark, 0, {}, id}); }
  const std::vector<Event>& events() const { return events_; }
  // The disk after a cut behind event `upto`; `*stable_mark` = last mark before it.
  std::vector<std::byte> after_cut(size_t upto, uint64_t seed, uint64_t* last_mark) const {
    std::mt19937_64 random(seed);
    std::vector<std::byte> disk = base_;
    disk.resize(data_.size());
    size_t stable = 0;
    for (size_t i = 0; i < upto; ++i) {
      if (events_[i].kind == Event::Kind::kFlushDone) stable = i;
      if (events_[i].kind == Event::Kind::kMark) *last_mark = events_[i].mark;
    }
    const int mode = static_cast<int>(random() % 4);  // all, none, whole writes at random, sectors at random
    for (size_t i = 0; i < upto; ++i) {
      const Event& e = events_[i];
      if (e.kind != Event::Kind::kWrite) continue;
      const bool whole = random() % 2 == 0;
      for (uint64_t k = 0; k < e.bytes.size(); k += 512) {
        const bool lands = i < stable || mode == 0 || (mode == 2 && whole) || (mode == 3 && random() % 2 == 0);
        if (lands) std::memcpy(&disk[e.offset + k], &e.bytes[k], 512);
      }
    }
    return disk;
  }

 protected:
  Task<Status> do_read(IoContext, uint64_t offset, Iov iov) override {
    copy_to_iov(iov, 0, &data_[offset], iov_length(iov));
    return Task<Status>::ready({});
  }
  Task<Status> do_write(IoContext, uint64_t offset, Iov iov) override {
    std::vector<std::byte> bytes(iov_length(iov));
    copy_from_iov(bytes.data(), iov, 0, bytes.size());
    put(offset, std::move(bytes));
    return Task<Status>::ready({});
  }
  // Only what was written before the flush began is stable when it is over.
  Task<Status> do_flush(IoContext) override {
    events_.push_back({Event::Kind::kFlushDone, 0, {}, 0});
    return Task<Status>::ready({});
  }
  Task<Status> do_write_zeroes(IoContext, uint64_t offset, uint64_t length, bool) override {
    put(offset, std::vector<std::byte>(length));
    return Task<Status>::ready({});
  }
  Task<Status> do_resize(uint64_t size) override {
    data_.resize(size);
    set_size(size);
    return Task<Status>::ready({});
  }

 private:
  void put(uint64_t offset, std::vector<std::byte> bytes) {
    std::memcpy(&data_[offset], bytes.data(), bytes.size());
    events_.push_back({Event::Kind::kWrite, offset, std::move(bytes), 0});
  }
  std::vector<std::byte> data_, base_;
  std::vector<Event> events_;
};

}  // namespace spillway::image_testing
