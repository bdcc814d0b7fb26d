// For tests of the cache, here and in tests/sim: a disk in memory that counts, delays and fails as told, and a cache
// on it with groups.
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "src/cache/cache.h"
#include "src/cache/impl.h"
#include "src/io/sim_reactor.h"
#include "src/volume/volume.h"

namespace spillway::cache::testing {

// A volume with a volatile cache of its own: `stable` is what a power cut would leave. Internally synchronised.
class TestDisk final : public Volume {
 public:
  explicit TestDisk(uint64_t size, uint32_t opt_io = 0) : Volume("test-disk", size, geometry(opt_io)), data_(size) {
    stable_ = data_;
  }
  std::string_view layer() const override { return "test"; }

  struct Request {
    char kind;  // r w f d z
    uint64_t offset, length;
    GroupId group;
    IoClass io_class;
  };
  std::function<uint64_t()> delay_ns;       // per request; null: at once
  uint64_t answer_ns = 0;                   // a read looks at the disk first and answers so much later
  uint64_t write_ns = 0;                    // a write waits so long before it changes anything
  std::set<uint64_t> bad_read, bad_write;   // pages
  bool bad_flush = false;

  std::vector<Request> take_log() {
    std::lock_guard g(mutex_);
    return std::exchange(log_, {});
  }
  uint64_t count(char kind) const {
    std::lock_guard g(mutex_);
    uint64_t n = 0;
    for (auto& r : log_) n += r.kind == kind;
    return n;
  }
  std::vector<std::byte> contents() const {
    std::lock_guard g(mutex_);
    return data_;
  }
  std::vector<std::byte> stable() const {
    std::lock_guard g(mutex_);
    return stable_;
  }
  void fill(uint64_t seed) {
    std::mt19937_64 r(seed);
    for (size_t i = 0; i + 8 <= data_.size(); i += 8) {
      const uint64_t v = r();
      std::memcpy(data_.data() + i, &v, 8);
    }
    stable_ = data_;
  }
  bool keep_log = true;
  bool keep_stable = true;  // false: flush does not copy; stable() means nothing

 protected:
  Task<Status> do_read(IoContext ctx, uint64_t offset, Iov iov) override {
    const uint64_t n = iov_length(iov);
    note('r', offset, n, ctx);
    co_await wait();
    Status s{};
    {
      std::lock_guard g(mutex_);
      if (hit(bad_read, offset, n)) s = fail(ErrorKind::kIo, "test-disk: read");
      else copy_to_iov(iov, 0, data_.data() + offset, n);
    }
    if (answer_ns != 0) co_await Reactor::current().sleep_for(answer_ns);
    co_return s;
  }
  Task<Status> do_write(IoContext ctx, uint64_t offset, Iov iov) override {
    const uint64_t n = iov_length(iov);
    note('w', offset, n, ctx);
    co_await wait();
    if (write_ns != 0) co_await Reactor::current().sleep_for(write_ns);
    std::lock_guard g(mutex_);
    if (hit(bad_write, offset, n)) co_return fail(ErrorKind::kIo, "test-disk: write");
    copy_from_iov(data_.data() + offset, iov, 0, n);
    if (ctx.fua) std::memcpy(stable_.data() + offset, data_.data() + offset, n);
    co_return Status{};
  }
  Task<Status> do_flush(IoContext ctx) override {
    note('f', 0, 0, ctx);
    std::vector<std::byte> now;
    if (keep_stable) now = contents();
    co_await wait();
    std::lock_guard g(mutex_);
    if (bad_flush) co_return fail(ErrorKind::kIo, "test-disk: flush");
    if (keep_stable) stable_ = std::move(now);
    co_return Status{};
  }
  Task<Status> do_discard(IoContext ctx, uint64_t offset, uint64_t length) override {
    note('d', offset, length, ctx);
    co_await wait();
    std::lock_guard g(mutex_);
    std::memset(data_.data() + offset, 0, length);
    co_return Status{};
  }
  Task<Status> do_write_zeroes(IoContext ctx, uint64_t offset, uint64_t length, bool) override {
    note('z', offset, length, ctx);
    co_await wait();
    std::lock_guard g(mutex_);
    std::memset(data_.data() + offset, 0, length);
    co_return Status{};
  }

 private:
  static Geometry geometry(uint32_t opt_io) {
    Geometry g;
    g.opt_io = opt_io;
    g.discard_granularity = 4096;
    return g;
  }
  Task<void> wait() {
    if (delay_ns) co_await Reactor::current().sleep_for(delay_ns());
  }
  void note(char kind, uint64_t offset, uint64_t length, const IoContext& ctx) {
    std::lock_guard g(mutex_);
    if (keep_log) log_.push_back({kind, offset, length, ctx.group, ctx.io_class});
  }
  static bool hit(const std::set<uint64_t>& bad, uint64_t offset, uint64_t length) {
    auto it = bad.lower_bound(offset / kPageSize);
    return it != bad.end() && *it * kPageSize < offset + length;
  }
  mutable std::mutex mutex_;
  std::vector<std::byte> data_, stable_;
  std::vector<Request> log_;
};

inline Task<Status> read_at(Volume& v, GroupId group, uint64_t offset, std::vector<std::byte>& to) {
  iovec one{to.data(), to.size()};
  IoContext ctx;
  ctx.group = group;
  co_return co_await v.read(ctx, offset, Iov(&one, 1));
}
inline Task<Status> write_at(Volume& v, GroupId group, uint64_t offset, const std::vector<std::byte>& from,
                             bool fua = false) {
  iovec one{const_cast<std::byte*>(from.data()), from.size()};
  IoContext ctx;
  ctx.group = group;
  ctx.fua = fua;
  co_return co_await v.write(ctx, offset, Iov(&one, 1));
}
inline Task<Status> flush_of(Volume& v, GroupId group) {
  IoContext ctx;
  ctx.group = group;
  co_return co_await v.flush(ctx);
}
inline std::vector<std::byte> bytes_of(uint64_t seed, size_t n) {
  std::vector<std::byte> b(n);
  std::mt19937_64 r(seed);
  for (size_t i = 0; i + 8 <= n; i += 8) {
    const uint64_t v = r();
    std::memcpy(b.data() + i, &v, 8);
  }
  return b;
}

}  // namespace spillway::cache::testing
