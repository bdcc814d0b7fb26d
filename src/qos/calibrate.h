// Measures a disk: the cost of reads and writes, random and sequential, at 4 and 128 KiB, of a flush, and how throughput
// grows with depth. `spillway disk calibrate` runs it on an unused disk and stores the model beside the config.
//
// All loads run in turn in short slices, several rounds, medians: a disk that drifts during the minute drifts for all.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "src/qos/model.h"
#include "src/volume/volume.h"

namespace spillway {

struct CalibrateOptions {
  double seconds = 60;
  // Writes put back what they have read, so contents stay; but nobody else may write meanwhile. Without: the cost of
  // writes and flushes is taken to be that of reads (and corrected online).
  bool writes = false;
  uint32_t rounds = 5;
  uint32_t full_depth = 32;  // at which costs are measured
  uint64_t seed = 1;
};

struct Calibration {
  QosModel model;
  struct Point {
    uint32_t depth;
    double iops;
  };
  std::vector<Point> curve;        // 4 KiB random reads
  std::vector<Point> large_curve;  // 128 KiB
  std::string to_text() const;
};

// The leaf itself, not a filter above it. Runs on the current reactor. kInvalid when the disk is smaller than 16 MiB.
Task<Result<Calibration>> calibrate(VolumePtr leaf, CalibrateOptions options);

}  // namespace spillway
