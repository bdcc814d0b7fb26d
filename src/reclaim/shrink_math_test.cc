// The arithmetic against an oracle written another way: exact rationals over 128 bits, straight from the
// formulas of research/reclaim.md, no shifts. Random inputs from fixed seeds.
#include "src/reclaim/shrink_math.h"

#include <gtest/gtest.h>

#include <random>

namespace spillway::reclaim {
namespace {

using I = __int128;
constexpr I kOne = 4096;  // a whole object in work units

I pow2(int n) { return n == 0 ? 1 : 2 * pow2(n - 1); }

struct Oracle {
  I delta, total, left_progress, left_refused;
};
// freeable * 4 / seeks / 2^prio objects, scaled; deferred / 2^prio; caps at twice the cache.
Oracle oracle(I freeable, I deferred, int prio, I seeks, I num, I den, I scanned) {
  Oracle o{};
  if (seeks == 0) {
    o.delta = (freeable + 1) / 2 * kOne;
  } else {
    o.delta = freeable * kOne / pow2(prio) * 4 / seeks;  // 2^prio divides kOne, so only seeks rounds
  }
  o.delta = num == den ? o.delta : o.delta * num / den;
  const I whole = (deferred / pow2(prio) + o.delta) / kOne;
  o.total = whole > 2 * freeable ? 2 * freeable : whole;
  I rest = deferred + o.delta - scanned * kOne;
  if (rest < 0) rest = 0;
  const I cap = 2 * freeable * kOne, half = freeable * kOne / 2;
  o.left_progress = rest > cap ? cap : rest;
  o.left_refused = rest > half ? half : rest;
  return o;
}

TEST(ShrinkMath, agrees_with_the_oracle) {
  std::mt19937_64 rng(20231127);
  const auto pick = [&](std::uint64_t max) {
    // log-uniform, so that small and large numbers both come
    const int bits = static_cast<int>(rng() % 64);
    return (rng() >> bits) % (max + 1);
  };
  for (int i = 0; i < 300'000; ++i) {
    const std::uint64_t freeable = pick(kObjectsMax), deferred = pick((std::uint64_t{1} << 44) - 2);
    const int prio = static_cast<int>(rng() % 13);
    const auto seeks = static_cast<unsigned>(rng() % 9);
    const auto batch = static_cast<unsigned>(rng() % 2 != 0 ? 0 : pick(4096));
    std::uint64_t num = 1, den = 1;
    if (rng() % 4 == 0) {
      num = (rng() % 1024 + 1) * 100;
      den = 1024 * (rng() % 10000 + 1);
    }
    const ShrinkPlan p = plan_shrink(freeable, deferred, prio, seeks, batch, num, den);
    const std::uint64_t scanned = p.total != 0 ? pick(p.total) : 0;
    const Oracle o = oracle(freeable, deferred, prio, seeks, num, den, scanned);
    ASSERT_TRUE(o.delta == p.delta_work && o.total == p.total) << "case " << i;
    ASSERT_TRUE(o.left_progress == work_left(p, deferred, scanned, false)) << "case " << i;
    ASSERT_TRUE(o.left_refused == work_left(p, deferred, scanned, true)) << "case " << i;
    ASSERT_LE(p.total, 2 * p.freeable);
  }
}

TEST(ShrinkMath, single_object_without_cost_can_go) {  // weakness 9
  const ShrinkPlan p = plan_shrink(1, 0, 12, 0, 0);
  EXPECT_EQ(p.total, 1u);
  EXPECT_TRUE(scan_due(p, p.total));
}

TEST(ShrinkMath, small_cache_gets_its_share_over_passes_and_not_more) {  // weakness 9
  // 100 objects at priority 12 owe 100 * 4 / 2 / 4096 a pass: 4096 passes owe 200 objects.
  std::uint64_t deferred = 0, scanned_sum = 0;
  for (int pass = 0; pass < 4096; ++pass) {
    const ShrinkPlan p = plan_shrink(100, deferred, 12, 2, 0);
    std::uint64_t total = p.total, scanned = 0;
    while (scan_due(p, total)) {
      const std::uint64_t n = std::min(p.batch, total);
      scanned += n;
      total -= n;
    }
    deferred = work_left(p, deferred, scanned, false);
    scanned_sum += scanned;
  }
  EXPECT_LE(scanned_sum, 200u);
  EXPECT_EQ(deferred >> kFractionBits, 200u - scanned_sum);
}

TEST(ShrinkMath, wind_up_of_refusals_is_bounded_by_half) {  // W7
  std::uint64_t deferred = 0;
  for (int i = 0; i < 1000; ++i) {
    const ShrinkPlan p = plan_shrink(10'000, deferred, 6, 2, 0);
    deferred = work_left(p, deferred, 0, true);
  }
  EXPECT_EQ(deferred >> kFractionBits, 5'000u);
  const ShrinkPlan next = plan_shrink(10'000, deferred, 6, 2, 0);
  EXPECT_LE(next.total, 10'000u * 2 / 64 + 5'000u / 64 + 1) << "a release does not empty the cache";
}

TEST(ShrinkMath, largest_inputs_do_not_overflow) {
  const ShrinkPlan p = plan_shrink(~std::uint64_t{0}, (std::uint64_t{1} << 44) - 2, 0, 1, ~0u, 1024 * 100, 1024);
  EXPECT_EQ(p.freeable, kObjectsMax);
  EXPECT_EQ(p.total, 2 * kObjectsMax);
}

}  // namespace
}  // namespace spillway::reclaim
