// Mapping: one mmap of a descriptor that a front-end sent (guest memory, an in-flight log).
// Owned; unmapped with its last owner. Thread-confined, like any value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "src/base/fd.h"
#include "src/base/result.h"

namespace spillway::vhost {

class Mapping {
 public:
  Mapping() = default;
  // Maps [offset, offset + size) of `fd` shared. kInvalid when the file is shorter than that (touching it would be fatal).
  static Result<Mapping> create(int fd, uint64_t offset, uint64_t size);
  Mapping(Mapping&& o) noexcept { swap(o); }
  Mapping& operator=(Mapping&& o) noexcept {
    Mapping(std::move(o)).swap(*this);
    return *this;
  }
  ~Mapping();
  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }
  // The file is not plain memory: a touch may wait for whoever serves it.
  bool blocking() const { return blocking_; }
  // Somebody cut the file short and a page was replaced by zeros (see sigbus.h).
  bool torn() const;

 private:
  void swap(Mapping& o) noexcept {
    std::swap(base_, o.base_);
    std::swap(length_, o.length_);
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    std::swap(blocking_, o.blocking_);
    std::swap(guard_, o.guard_);
  }
  void* base_ = nullptr;
  size_t length_ = 0;
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  bool blocking_ = false;
  int guard_ = -1;
};

}  // namespace spillway::vhost
