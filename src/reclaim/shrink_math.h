// The arithmetic of one visit, pure: how much to scan now, how much to remember. Work is counted in
// 1/4096 objects, so that the share of a small cache at a low priority is not rounded to nothing
// but adds up over passes (weakness 9: the naive floor of 2018 asked too much of small caches).
//
// Source: the arithmetic of Linux's do_shrink_slab as research/reclaim.md states it. Differences:
//   - fractions are kept (above);
//   - seeks = 0 rounds up, so that a single object without cost can go;
//   - work refused by `stop` winds up to half of the cache at most, other deferred work to 2x;
//   - a weight and a protection scale the new share (not the deferred one).
#pragma once

#include <algorithm>
#include <cstdint>

namespace spillway::reclaim {

inline constexpr int kFractionBits = 12;
/// Largest count taken at face value; keeps every product below in 64 bits with 44-bit work cells.
inline constexpr std::uint64_t kObjectsMax = (std::uint64_t{1} << 30) - 1;

struct ShrinkPlan {
  std::uint64_t freeable = 0;     // objects, clamped
  std::uint64_t delta_work = 0;   // 1/4096 objects: this pass's own share
  std::uint64_t total = 0;        // whole objects that may be scanned now
  std::uint64_t batch = 128;
};

/// `deferred_work` was claimed by the caller. `scale_num / scale_den` <= 2^16 / 1.
constexpr ShrinkPlan plan_shrink(std::uint64_t freeable, std::uint64_t deferred_work, int priority,
                                 unsigned seeks, unsigned batch, std::uint64_t scale_num = 1,
                                 std::uint64_t scale_den = 1) {
  ShrinkPlan p;
  p.freeable = std::min(freeable, kObjectsMax);
  p.batch = batch != 0 ? batch : 128;
  if (seeks != 0) {
    p.delta_work = (p.freeable << (kFractionBits - priority)) * 4 / seeks;
  } else {
    p.delta_work = ((p.freeable + 1) / 2) << kFractionBits;
  }
  if (scale_num != scale_den) {
    p.delta_work = static_cast<std::uint64_t>(static_cast<unsigned __int128>(p.delta_work) *
                                              scale_num / scale_den);
  }
  const std::uint64_t work = (deferred_work >> priority) + p.delta_work;
  p.total = std::min(work >> kFractionBits, 2 * p.freeable);
  return p;
}

/// Whether one more scan call is due: a batch is together, or the whole cache is asked for.
constexpr bool scan_due(const ShrinkPlan& p, std::uint64_t total) {
  return total != 0 && (total >= p.batch || total >= p.freeable);
}

/// Work to remember after `scanned` objects; `refused`: scan said stop.
constexpr std::uint64_t work_left(const ShrinkPlan& p, std::uint64_t deferred_work,
                                  std::uint64_t scanned, bool refused) {
  const std::uint64_t asked = deferred_work + p.delta_work;
  const std::uint64_t done = scanned << kFractionBits;
  const std::uint64_t left = asked > done ? asked - done : 0;
  const std::uint64_t cap =
      refused ? (p.freeable << kFractionBits) / 2 : (2 * p.freeable) << kFractionBits;
  return std::min(left, cap);
}

}  // namespace spillway::reclaim
