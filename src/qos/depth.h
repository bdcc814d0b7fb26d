// Finds and keeps the knee: the fewest requests in flight with which the disk gives (nearly) all it can. Beyond it
// requests only wait in the device's own queue, where weights do not count.
//
// Real disks are noisy and drift, so single measurements say nothing. Time is cut into windows in which work was
// always queued; four windows make a quad A B B A, A at the present depth, B at a candidate, so that linear drift
// cancels; a quad gives one relative difference of throughput; the candidate is taken when the mean of the
// differences is beyond the threshold by kSure standard errors, refused when it is short of it by one, or after
// kMaxQuads. In doubt the depth stays, so noise alone moves nothing.
//   up:   depth + 25 %, taken when throughput gains more than kGainUp
//   down: depth - 20 %, taken when it loses less than kLossDown (< kGainUp: no going back and forth)
// After both were refused, probing rests for a while that doubles up to kMaxRest windows.
//
// The second rule keeps weights working. A group that is due the part f of the requests in flight, and has q of them
// outstanding, cannot get it when more than q / f are in flight altogether (Little's law): all it has is in the device
// already, and the device's own queue shares by numbers, not by weights. So depth is limited to a part of the least q / f
// of the groups with q / f of at least a third of the knee (a tenant with less outstanding than that is limited by itself,
// and the disk is not throttled for its sake). Which part: all of it would do if nothing ever waited between its completion
// and the next request; what is missing to that is learned from by how much that group's ratio to the others really falls
// short, averaged, because what is missed in one moment (a thread that got no CPU) less depth does not give back.
//
// Thread-safety: thread-confined (to the arbiter's holder).
#pragma once

#include <cstdint>

namespace spillway {

class DepthControl {
 public:
  // floor: the knee is not looked for below it (the limit for shares may still be).
  DepthControl(uint32_t initial, uint32_t least, uint32_t most, uint32_t floor = 0);
  uint32_t depth() const;     // to be used now
  uint32_t knee() const { return knee_; }
  // A window has ended. rate: work per time; saturated: work was queued all the time; fits: the least q / f there was,
  // 0 = none; missed: by what part that group's ratio to the others fell short (negative: was beyond).
  void window(double rate, bool saturated, double fits, double missed);

 private:
  static constexpr double kGainUp = 0.012, kLossDown = 0.006;
  static constexpr uint32_t kMinQuads = 12, kMaxQuads = 40, kMaxRest = 1024;
  static constexpr double kSure = 3;  // it is asked after every quad: two would be wrong once in a minute of noise
  static constexpr double kMissedMost = 0.02, kMissedLeast = 0.012, kMissedGain = 0.05;
  static constexpr double kSameFits = 0.1;
  static constexpr double kPartMost = 0.98, kPartLeast = 0.6, kPartUp = 0.0025, kPartDown = 0.02;
  uint32_t candidate() const;
  void decide();
  void next_probe(bool taken);

  uint32_t knee_, least_, most_, floor_;
  uint32_t fits_;              // limit for the sake of shares; most_ when there is none
  double part_ = 0.95;         // of q / f
  double missed_ = 0;          // average
  double fitted_ = 0;          // q / f in the last window
  bool up_ = true;
  uint32_t refused_ = 0;       // in a row
  uint32_t rest_ = 0, next_rest_ = 64;
  uint32_t at_ = 0;            // window in the quad
  double a_ = 0, b_ = 0;
  uint32_t quads_ = 0;
  double mean_ = 0, m2_ = 0;
};

}  // namespace spillway
