// Finds and keeps the knee: the fewest requests in flight with which the disk gives (nearly) all it can. Beyond it
// requests only wait in the device's own queue, where weights do not count.
//
// Real disks are noisy and drift, so single measurements say nothing. Time is cut into windows in which work was
// always queued; four windows make a quad A B B A, A at the present depth, B at a candidate, so that linear drift
// cancels; a quad gives one relative difference of throughput; the candidate is taken or refused when the mean of
// the differences is on one side of the threshold by its own standard error, or refused after kMaxQuads.
//   up:   depth + 25 %, taken when throughput gains more than kGainUp
//   down: depth - 20 %, taken when it loses less than kLossDown (< kGainUp: no going back and forth)
// After both were refused, probing rests for a while that doubles up to kMaxRest windows.
//
// The second rule keeps weights working: when a group that has a large part of the disk loses share because all it
// has outstanding is already in flight (sfq.h, lost), depth is lowered in steps, to half of the knee at most, and
// given back step by step when that is over.
//
// Thread-safety: thread-confined (to the arbiter's holder).
#pragma once

#include <cstdint>

namespace spillway {

class DepthControl {
 public:
  DepthControl(uint32_t initial, uint32_t least, uint32_t most);
  uint32_t depth() const;     // to be used now
  uint32_t knee() const { return knee_; }
  // A window has ended. rate: work per time; saturated: work was queued all the time; lost: part of the work that
  // should have gone to groups which ran dry.
  void window(double rate, bool saturated, double lost);

 private:
  static constexpr double kGainUp = 0.012, kLossDown = 0.006;
  static constexpr uint32_t kMinQuads = 4, kMaxQuads = 16, kMaxRest = 1024;
  static constexpr uint32_t kRecover = 32;  // windows without loss before a step is given back
  uint32_t candidate() const;
  void decide();
  void next_probe(bool taken);

  uint32_t knee_, least_, most_;
  uint32_t shrunk_ = 0;        // steps of 1/16 taken off for the sake of shares
  uint32_t calm_ = 0;
  bool up_ = true;
  uint32_t refused_ = 0;       // in a row
  uint32_t rest_ = 0, next_rest_ = 64;
  uint32_t at_ = 0;            // window in the quad
  double a_ = 0, b_ = 0;
  uint32_t quads_ = 0;
  double mean_ = 0, m2_ = 0;
};

}  // namespace spillway
