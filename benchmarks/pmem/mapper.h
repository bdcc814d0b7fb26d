// Mapper: a process that maps a file, as a VMM does, and measures its own loads. Never the benchmark itself: who serves a
// mount must not map its files.
//
// Thread-confined. Made before the benchmark has threads; ends with it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace spillway::bench {

class Mapper {
 public:
  enum class Advice : uint8_t { kNone, kRandom, kSequential };

  explicit Mapper(uint64_t samples_max = 1 << 18);
  ~Mapper();
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // False: the file cannot be opened or mapped. `size` bytes of it, shared; loads and, when `writable`, stores.
  bool open(const std::string& path, uint64_t size, Advice advice, bool writable);
  void close();
  // close() with the file's clean pages dropped from the page cache (of a file that nobody else maps).
  void close_and_drop();

  // One load from every page of [from, to) in order; nanoseconds for all.
  uint64_t touch(uint64_t from, uint64_t to);
  // `n` loads from different pages of [0, space) in an order made from `seed`; nanoseconds each. `n` is bounded by the
  // number of pages and samples_max.
  std::vector<double> touch_random(uint64_t space, uint64_t n, uint64_t seed);
  // `n` loads from random pages of [0, space), not timed one by one; nanoseconds for all.
  uint64_t load_random(uint64_t space, uint64_t n, uint64_t seed);
  // The same until stop(); returns at once.
  void touch_random_until_stopped(uint64_t space, uint64_t seed);
  void stop();
  // Stores one byte into each of `n` pages from `page` on.
  void dirty(uint64_t page, uint64_t n, char value);
  // Lines of /proc/self/maps that name the file.
  int64_t mappings();
  pid_t pid() const { return pid_; }

 private:
  struct Order;
  struct Shared;
  int64_t call(const Order& order);
  [[noreturn]] void serve(int socket);
  Shared* shared_;
  uint64_t samples_max_;
  int socket_ = -1;
  pid_t pid_ = -1;
};

}  // namespace spillway::bench
