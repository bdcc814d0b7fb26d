#include "src/io/buffers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace spillway {

// Calls fn(address, length) for the pieces of [skip, skip + size); returns the bytes covered.
template <class Fn>
static size_t for_pieces(Iov iov, size_t skip, size_t size, Fn fn) {
  size_t done = 0;
  for (auto& v : iov) {
    if (done == size) break;
    if (skip >= v.iov_len) {
      skip -= v.iov_len;
      continue;
    }
    const size_t n = std::min(v.iov_len - skip, size - done);
    fn(static_cast<std::byte*>(v.iov_base) + skip, n, done);
    done += n;
    skip = 0;
  }
  return done;
}

size_t copy_from_iov(void* to, Iov iov, size_t skip, size_t size) {
  return for_pieces(iov, skip, size, [&](std::byte* p, size_t n, size_t at) {
    std::memcpy(static_cast<std::byte*>(to) + at, p, n);
  });
}

size_t copy_to_iov(Iov iov, size_t skip, const void* from, size_t size) {
  return for_pieces(iov, skip, size, [&](std::byte* p, size_t n, size_t at) {
    std::memcpy(p, static_cast<const std::byte*>(from) + at, n);
  });
}

void zero_iov(Iov iov, size_t skip, size_t size) {
  for_pieces(iov, skip, size, [](std::byte* p, size_t n, size_t) { std::memset(p, 0, n); });
}

bool iov_aligned(Iov iov, size_t alignment) {
  for (auto& v : iov)
    if (((reinterpret_cast<uintptr_t>(v.iov_base) | v.iov_len) & (alignment - 1)) != 0) return false;
  return true;
}

IovSlice::IovSlice(Iov iov, uint64_t skip, uint64_t length) {
  uint64_t done = 0;
  for (auto& v : iov) {
    if (done == length) break;
    if (skip >= v.iov_len) {
      skip -= v.iov_len;
      continue;
    }
    const uint64_t n = std::min<uint64_t>(v.iov_len - skip, length - done);
    const iovec piece{static_cast<std::byte*>(v.iov_base) + skip, static_cast<size_t>(n)};
    if (count_ == kInline) heap_.assign(inline_, inline_ + kInline);
    if (count_ < kInline) inline_[count_] = piece;
    else heap_.push_back(piece);
    ++count_;
    done += n;
    skip = 0;
  }
  SPILLWAY_ASSERT(done == length);
}

AlignedBuffer::AlignedBuffer(size_t size, size_t alignment) : size_(size) {
  void* p = nullptr;
  if (::posix_memalign(&p, alignment, size) == 0) data_ = static_cast<std::byte*>(p);
  else size_ = 0;
}
AlignedBuffer::AlignedBuffer(AlignedBuffer&& o) noexcept
    : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& o) noexcept {
  if (this != &o) {
    std::free(data_);
    data_ = std::exchange(o.data_, nullptr);
    size_ = std::exchange(o.size_, 0);
  }
  return *this;
}
AlignedBuffer::~AlignedBuffer() { std::free(data_); }

}  // namespace spillway
