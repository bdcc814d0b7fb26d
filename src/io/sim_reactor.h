// SimReactor: the simulated backend. Virtual clock: time stands still while anything can run and then jumps to the
// next timer. With a seed, whatever is ready at the same moment runs in a random but replayable order.
//
// Descriptor operations are executed at once with the plain system call (for tests that mix real files in); a
// simulation uses timers and `sim` volumes only. Thread-confined.
#pragma once

#include <random>

#include "src/io/reactor.h"

namespace spillway {

class SimReactor final : public Reactor {
 public:
  // seed 0 = first come, first served.
  explicit SimReactor(uint64_t seed = 0) : random_(seed), shuffle_(seed != 0) {}
  uint64_t now_ns() const override { return now_ns_; }
  void submit(IoOp& op) override;
  void cancel(IoOp& op) override;

  // Runs until nothing is ready and no timer is left; returns the virtual time. For open-ended simulations.
  uint64_t run_until_idle();
  // Runs all that happens up to and including `deadline_ns`, then sets the clock to it.
  void run_until(uint64_t deadline_ns);
  // For tests that move several reactors forward together: is something ready or posted, and when is the next timer.
  bool busy() const { return has_ready() || inbox_.load() != nullptr; }
  uint64_t next_timer_ns() const { return timers_.empty() ? UINT64_MAX : timers_.front().deadline; }

 private:
  void turn(bool may_sleep) override;
  void interrupt() override {}
  bool advance(uint64_t limit_ns);

  struct TimerEntry {
    uint64_t deadline;
    uint64_t sequence;
    IoOp* op;
  };
  std::vector<TimerEntry> timers_;  // heap
  uint64_t now_ns_ = 0;
  uint64_t sequence_ = 0;
  std::mt19937_64 random_;
  bool shuffle_;
};

}  // namespace spillway
