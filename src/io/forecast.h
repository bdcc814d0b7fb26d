// Forecast: when the next piece of work is due, from the last eight gaps between two. Pure arithmetic, thread-confined.
//
// A guest that does one request a millisecond does not do it by the clock: its timer, its wake-up and its other work move
// each request, and now and then one is late by milliseconds. So what is told is a window that leaves out the shortest and
// the two longest of the eight; nothing is told unless that window is narrow against the gap itself, so that being awake in it
// costs less than half of the time. Work that does not come makes one long gap; three of those end the forecast.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

namespace spillway {

class Forecast {
 public:
  static constexpr unsigned kGaps = 8;
  static constexpr uint64_t kLongestNs = 5'000'000;  // nothing is expected after longer gaps
  struct Window {
    uint64_t from_ns, to_ns;  // after the end of the last work
  };

  void add(uint64_t gap_ns) {
    gaps_[next_++ % kGaps] = gap_ns;
    if (next_ == 2 * kGaps) next_ = kGaps;  // full stays full
  }
  // `lead_ns`: how long before the window its user must begin to wake up. nullopt: nothing is expected.
  std::optional<Window> next(uint64_t lead_ns) const {
    if (next_ < kGaps) return std::nullopt;
    std::array<uint64_t, kGaps> g = gaps_;
    std::sort(g.begin(), g.end());
    const uint64_t first = g[1], last = g[kGaps - 3], slack = (last - first) / 4 + kSlackNs;
    if (last > kLongestNs || first < slack + 2 * lead_ns) return std::nullopt;
    const Window w{first - slack, last + slack};
    if (2 * (w.to_ns - w.from_ns + lead_ns) > first) return std::nullopt;
    return w;
  }

 private:
  static constexpr uint64_t kSlackNs = 20'000;
  std::array<uint64_t, kGaps> gaps_{};
  unsigned next_ = 0;
};

}  // namespace spillway
