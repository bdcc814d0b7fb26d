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
// already, and the device's own queue shares by numbers, not by weights. So depth is limited to the least q / f of the
// groups with q / f of at least a third of the knee (a tenant with less outstanding than that is limited by itself, and the
// disk is not throttled for its sake). What the window's averages miss is corrected by what was really lost
// (sfq.h, take_lost): while it is more than kLostMost of the work the limit sinks by as much, then rises by one every few windows.
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
  // A window has ended. rate: work per time; saturated: work was queued all the time; lost: part of the work that
  // should have gone to groups which ran dry; fits: the least q / f there was, 0 = none.
  void window(double rate, bool saturated, double lost, double fits);

 private:
  static constexpr double kGainUp = 0.012, kLossDown = 0.006;
  static constexpr uint32_t kMinQuads = 6, kMaxQuads = 24, kMaxRest = 1024;
  static constexpr double kSure = 2;
  static constexpr double kLostMost = 0.002, kLostLeast = 0.0005;
  static constexpr double kFitsPart = 0.92;  // completions come in batches: some are always between two queues
  static constexpr uint32_t kCalm = 4;
  uint32_t candidate() const;
  void decide();
  void next_probe(bool taken);

  uint32_t knee_, least_, most_, floor_;
  uint32_t limit_;             // for the sake of shares, by what was lost; most_ when there is none
  uint32_t calm_ = 0;          // windows without loss since the limit changed
  uint32_t fits_;              // the same, by Little's law
  bool up_ = true;
  uint32_t refused_ = 0;       // in a row
  uint32_t rest_ = 0, next_rest_ = 64;
  uint32_t at_ = 0;            // window in the quad
  double a_ = 0, b_ = 0;
  uint32_t quads_ = 0;
  double mean_ = 0, m2_ = 0;
};

}  // namespace spillway
