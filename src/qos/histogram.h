// Latency histogram in the manner of HdrHistogram: 16 linear steps per power of two, so any percentile is right to
// about 6 % from 256 ns to over an hour. One writer (a reactor), any number of readers; merged on read.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

namespace spillway {

class LatencyCounts;

class LatencyHistogram {
 public:
  static constexpr unsigned kSub = 4, kFirst = 8, kLast = 42;  // 2^8 ns .. 2^42 ns
  static constexpr size_t kBuckets = ((kLast - kFirst) << kSub) + 1;

  static size_t bucket(uint64_t ns) {
    if (ns < (uint64_t{1} << kFirst)) return 0;
    const unsigned power = static_cast<unsigned>(std::bit_width(ns)) - 1;
    if (power >= kLast) return kBuckets - 1;
    const uint64_t in = (ns >> (power - kSub)) & ((1u << kSub) - 1);
    return 1 + ((power - kFirst) << kSub) + in;
  }
  // The middle of a bucket.
  static uint64_t value(size_t b) {
    if (b == 0) return uint64_t{1} << (kFirst - 1);
    const unsigned power = kFirst + static_cast<unsigned>((b - 1) >> kSub);
    const uint64_t step = uint64_t{1} << (power - kSub);
    return (uint64_t{1} << power) + ((b - 1) & ((1u << kSub) - 1)) * step + step / 2;
  }
  // The writer's own thread.
  void add(uint64_t ns) {
    auto& c = counts_[bucket(ns)];
    c.store(c.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);  // statistics: no order needed
  }

 private:
  friend class LatencyCounts;
  std::array<std::atomic<uint32_t>, kBuckets> counts_{};
};

// A merged copy. A value; subtract an earlier one for an interval (counters may wrap, differences do not).
class LatencyCounts {
 public:
  void merge(const LatencyHistogram& h) {
    for (size_t i = 0; i < counts_.size(); ++i) counts_[i] += h.counts_[i].load(std::memory_order_relaxed);
  }
  LatencyCounts since(const LatencyCounts& earlier) const {
    LatencyCounts d;
    for (size_t i = 0; i < counts_.size(); ++i) d.counts_[i] = counts_[i] - earlier.counts_[i];
    return d;
  }
  uint64_t total() const {
    uint64_t n = 0;
    for (uint32_t c : counts_) n += c;
    return n;
  }
  // ns; p in 0..1; 0 when there is nothing.
  uint64_t percentile(double p) const {
    const uint64_t all = total();
    if (all == 0) return 0;
    const auto rank = std::max<uint64_t>(1, static_cast<uint64_t>(p * static_cast<double>(all) + 0.5));
    uint64_t n = 0;
    for (size_t i = 0; i < counts_.size(); ++i)
      if ((n += counts_[i]) >= rank) return LatencyHistogram::value(i);
    return LatencyHistogram::value(counts_.size() - 1);
  }

 private:
  std::array<uint32_t, LatencyHistogram::kBuckets> counts_{};
};

}  // namespace spillway
