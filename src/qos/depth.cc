#include "src/qos/depth.h"

#include <algorithm>
#include <cmath>

namespace spillway {

DepthControl::DepthControl(uint32_t initial, uint32_t least, uint32_t most, uint32_t floor)
    : knee_(std::clamp(initial, least, most)),
      least_(least),
      most_(most),
      floor_(std::clamp(floor, least, knee_)),
      fits_(most) {}

uint32_t DepthControl::candidate() const {
  const uint32_t d = up_ ? knee_ + std::max(1u, knee_ / 4) : knee_ - std::min(knee_, std::max(1u, knee_ / 5));
  return std::clamp(d, floor_, most_);
}

uint32_t DepthControl::depth() const {
  const uint32_t d = at_ == 1 || at_ == 2 ? candidate() : knee_;
  return std::min(d, fits_);
}

void DepthControl::window(double rate, bool saturated, double fits, double missed) {
  if (fits >= knee_ / 3.0) {
    // Only while both had work all the time, under a depth that was made for them: what is missed when a load begins or
    // pauses, or weights change, depth cannot give back.
    const bool same = std::abs(fits - fitted_) < kSameFits * fits;
    fitted_ = fits;
    if (saturated && same) {
      missed_ += kMissedGain * (std::clamp(missed, -0.5, 0.5) - missed_);
      if (missed_ > kMissedMost) part_ = std::max(kPartLeast, part_ - std::min(kPartDown, 0.2 * missed_));
      else if (missed_ < kMissedLeast) part_ = std::min(kPartMost, part_ + kPartUp);
    }
    fits_ = std::clamp(static_cast<uint32_t>(fits * part_), least_, most_);
  } else {
    fits_ = most_;
  }
  if (!saturated || !(rate > 0)) {
    at_ = 0;
    a_ = b_ = 0;
    return;
  }
  // A depth that shares hold down is no place to look for the knee.
  if (fits_ < knee_) {
    at_ = 0;
    a_ = b_ = 0;
    return;
  }
  if (rest_ > 0) {
    --rest_;
    return;
  }
  if (candidate() == knee_) {
    next_probe(false);
    return;
  }
  (at_ == 1 || at_ == 2 ? b_ : a_) += rate;
  if (++at_ < 4) return;
  at_ = 0;
  const double difference = b_ / a_ - 1;
  a_ = b_ = 0;
  ++quads_;
  const double d = difference - mean_;
  mean_ += d / quads_;
  m2_ += d * (difference - mean_);
  if (quads_ >= kMinQuads) decide();
}

void DepthControl::decide() {
  const double error = std::sqrt(m2_ / (quads_ * (quads_ - 1.0)));
  const double threshold = up_ ? kGainUp : -kLossDown;
  if (mean_ - kSure * error > threshold) {
    knee_ = candidate();
    next_probe(true);
  } else if (mean_ + error < threshold || quads_ >= kMaxQuads) {
    next_probe(false);
  }
}

void DepthControl::next_probe(bool taken) {
  quads_ = 0;
  mean_ = m2_ = a_ = b_ = 0;
  at_ = 0;
  if (taken) {
    refused_ = 0;
    next_rest_ = 64;
    return;
  }
  up_ = !up_;
  if (++refused_ < 2) return;
  refused_ = 0;
  rest_ = next_rest_;
  next_rest_ = std::min(kMaxRest, next_rest_ * 2);
}

}  // namespace spillway
