#include <array>
#include <cstdlib>

#include "src/io/task.h"

// Under AddressSanitizer every frame comes from the heap, so that a use after the end is seen.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPILLWAY_PLAIN_FRAMES 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(SPILLWAY_PLAIN_FRAMES)
#define SPILLWAY_PLAIN_FRAMES 1
#endif
#ifndef SPILLWAY_PLAIN_FRAMES
#define SPILLWAY_PLAIN_FRAMES 0
#endif

namespace spillway {
namespace {

constexpr std::size_t kGranule = 64;
constexpr std::size_t kClasses = 64;           // up to 4 KiB
constexpr std::size_t kMaxFreePerClass = 1024;  // bounds what an uneven producer/consumer pair can pile up

struct FreeFrame {
  FreeFrame* next;
};

struct FrameCache {
  std::array<FreeFrame*, kClasses> head{};
  std::array<std::size_t, kClasses> count{};
  ~FrameCache() {
    for (auto* f : head)
      while (f != nullptr) {
        auto* next = f->next;
        std::free(f);
        f = next;
      }
    head.fill(nullptr);
    count.fill(kMaxFreePerClass);  // frames freed later in thread exit go straight to the heap
  }
};

thread_local FrameCache t_cache;

constexpr std::size_t class_of(std::size_t size) { return (size + kGranule - 1) / kGranule - 1; }

}  // namespace

void* frame_alloc(std::size_t size) {
#if !SPILLWAY_PLAIN_FRAMES
  const std::size_t c = class_of(size);
  if (c < kClasses) {
    FrameCache& cache = t_cache;
    if (FreeFrame* f = cache.head[c]) {
      cache.head[c] = f->next;
      --cache.count[c];
      return f;
    }
    size = (c + 1) * kGranule;
  }
#endif
  void* p = std::malloc(size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

void frame_free(void* p, std::size_t size) noexcept {
#if !SPILLWAY_PLAIN_FRAMES
  const std::size_t c = class_of(size);
  if (c < kClasses) {
    FrameCache& cache = t_cache;
    if (cache.count[c] < kMaxFreePerClass) {
      cache.head[c] = new (p) FreeFrame{cache.head[c]};
      ++cache.count[c];
      return;
    }
  }
#else
  (void)size;
#endif
  std::free(p);
}

}  // namespace spillway
