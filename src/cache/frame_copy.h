// Copies between frames and guests. A guest may read and write one block at once (such requests have no order), so two
// of our threads may copy from and to a frame at the same time: the bytes may tear, nothing else can go wrong. That
// race is legal; TSAN is told so here and nowhere else.
#pragma once

#include <cstddef>
#include <cstring>

#include "src/io/buffers.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPILLWAY_CACHE_TSAN 1
#endif
#endif

namespace spillway::cache {

#ifdef SPILLWAY_CACHE_TSAN
__attribute__((no_sanitize("thread"), noinline)) inline void frame_copy(void* to, const void* from, size_t n) {
  auto* a = static_cast<volatile char*>(to);
  auto* b = static_cast<const volatile char*>(from);
  for (size_t i = 0; i < n; ++i) a[i] = b[i];
}
#else
inline void frame_copy(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }
#endif

template <class Fn>
inline void iov_pieces(Iov iov, uint64_t skip, size_t n, Fn fn) {
  for (auto& v : iov) {
    if (n == 0) return;
    if (skip >= v.iov_len) {
      skip -= v.iov_len;
      continue;
    }
    const size_t now = std::min<size_t>(v.iov_len - skip, n);
    fn(static_cast<std::byte*>(v.iov_base) + skip, now);
    n -= now;
    skip = 0;
  }
}
inline void frame_to_iov(Iov iov, uint64_t skip, const std::byte* frame, size_t n) {
  iov_pieces(iov, skip, n, [&](std::byte* p, size_t k) {
    frame_copy(p, frame, k);
    frame += k;
  });
}
inline void frame_from_iov(std::byte* frame, Iov iov, uint64_t skip, size_t n) {
  iov_pieces(iov, skip, n, [&](std::byte* p, size_t k) {
    frame_copy(frame, p, k);
    frame += k;
  });
}

}  // namespace spillway::cache
