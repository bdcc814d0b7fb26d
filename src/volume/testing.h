// What the tests of this folder share: patterns, whole-volume reads and writes as tasks.
#pragma once

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "src/volume/volume.h"

namespace spillway::testing_support {

inline std::vector<std::byte> random_bytes(uint64_t seed, size_t n) {
  std::vector<std::byte> b(n);
  std::mt19937_64 r(seed);
  for (size_t i = 0; i < n; i += 8) {
    const uint64_t v = r();
    std::memcpy(b.data() + i, &v, std::min<size_t>(8, n - i));
  }
  return b;
}

// The buffers are the caller's and outlive the task.
inline Task<Status> write_bytes(Volume& v, uint64_t offset, const std::vector<std::byte>& data, bool fua = false) {
  iovec iov{const_cast<std::byte*>(data.data()), data.size()};
  IoContext ctx;
  ctx.fua = fua;
  co_return co_await v.write(ctx, offset, Iov(&iov, 1));
}
inline Task<Result<std::vector<std::byte>>> read_bytes(Volume& v, uint64_t offset, size_t n) {
  std::vector<std::byte> data(n);
  iovec iov{data.data(), n};
  Status s = co_await v.read(IoContext{}, offset, Iov(&iov, 1));
  if (!s) co_return std::unexpected(std::move(s).error());
  co_return data;
}

}  // namespace spillway::testing_support
