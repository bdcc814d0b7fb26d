// Deterministic interleavings: real threads, of which one runs at a time; before every atomic access, lock and
// wait of the library (src/reclaim/atomic.h with SPILLWAY_RECLAIM_INTERLEAVE) a seeded generator may switch.
// The same seed gives the same run. RCU is a small model inside the scheduler: a retired object is poisoned
// and deleted as soon as every reader that was inside at its retirement has left.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace interleave {

struct Outcome {
  bool stuck = false;            // every thread waits
  std::uint64_t steps = 0;
  std::uint64_t trace_hash = 0;  // of the schedule: equal for equal seeds
};

/// Runs the bodies to their end under the schedule of `seed`.
Outcome run(std::uint64_t seed, const std::vector<std::function<void()>>& bodies);

/// Objects whose grace period is not over are deleted here (between runs).
void drain_rcu();

}  // namespace interleave
