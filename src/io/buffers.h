// Buffers: views on scattered memory (iovec arrays) and aligned memory for O_DIRECT.
//
// `Iov` is what the I/O interfaces take: a non-owning span of iovec. The memory may be a guest's: its contents may
// change while we read it, its addresses may not (the owner checked them). Layers that split a request cut it with
// `IovSlice`, which keeps up to four entries in place and allocates beyond.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"

namespace spillway {

using Iov = std::span<const iovec>;

inline uint64_t iov_length(Iov iov) {
  uint64_t n = 0;
  for (const iovec& v : iov) n += v.iov_len;
  return n;
}
// Copies min(length of iov - skip, size) bytes; returns how many. memcpy semantics.
size_t copy_from_iov(void* to, Iov iov, size_t skip, size_t size);
size_t copy_to_iov(Iov iov, size_t skip, const void* from, size_t size);
void zero_iov(Iov iov, size_t skip, size_t size);
// True when every entry's address and length are multiples of `alignment` (a power of two).
bool iov_aligned(Iov iov, size_t alignment);

// The part [skip, skip + length) of an iov. Thread-confined; must not outlive the memory it names.
class IovSlice {
 public:
  IovSlice(Iov iov, uint64_t skip, uint64_t length);
  IovSlice(const IovSlice&) = delete;
  IovSlice& operator=(const IovSlice&) = delete;
  operator Iov() const { return {data(), count_}; }
  Iov iov() const { return {data(), count_}; }

 private:
  const iovec* data() const { return count_ <= kInline ? inline_ : heap_.data(); }
  static constexpr size_t kInline = 4;
  iovec inline_[kInline];
  std::vector<iovec> heap_;
  size_t count_ = 0;
};

// Page-aligned memory, owned. Empty (data() == nullptr) when the allocation failed.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size, size_t alignment = 4096);
  AlignedBuffer(AlignedBuffer&& o) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& o) noexcept;
  ~AlignedBuffer();
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }
  iovec iov() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace spillway
