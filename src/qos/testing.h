// For tests of qos: several SimReactors on one virtual clock, a leaf that counts what is in flight, and clients.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "src/io/sim_reactor.h"
#include "src/volume/volume.h"

namespace spillway::testing {

// Moves its reactors from event to event; what they post to one another is delivered before time goes on. `at_rest` is
// called whenever nothing can run any more at the present moment.
class Cluster {
 public:
  Cluster(size_t reactors, uint64_t seed) {
    for (size_t i = 0; i < reactors; ++i) all_.push_back(std::make_unique<SimReactor>(seed == 0 ? 0 : seed + i));
  }
  SimReactor& at(size_t i) { return *all_[i % all_.size()]; }
  size_t size() const { return all_.size(); }
  uint64_t now_ns() const { return now_; }

  template <class Fn>
  void run_until(uint64_t deadline, Fn at_rest) {
    for (;;) {
      settle();
      at_rest();
      uint64_t next = UINT64_MAX;
      for (auto& r : all_) next = std::min(next, r->next_timer_ns());
      if (next > deadline) break;
      now_ = next;
    }
    now_ = deadline;
    settle();
  }
  void run_until(uint64_t deadline) {
    run_until(deadline, [] {});
  }
  // Until nothing is left to do (clients have been told to stop).
  void drain() {
    for (;;) {
      settle();
      uint64_t next = UINT64_MAX;
      for (auto& r : all_) next = std::min(next, r->next_timer_ns());
      if (next == UINT64_MAX) return;
      now_ = next;
    }
  }

 private:
  void settle() {
    do
      for (auto& r : all_) r->run_until(now_);
    while (std::any_of(all_.begin(), all_.end(), [](auto& r) { return r->busy(); }));
  }
  std::vector<std::unique_ptr<SimReactor>> all_;
  uint64_t now_ = 0;
};

// Counts what the filter above lets through. Thread-confined.
class Probe final : public Volume {
 public:
  explicit Probe(VolumePtr leaf) : Volume(leaf->name(), leaf->size(), leaf->geometry()), leaf_(std::move(leaf)) {}
  std::string_view layer() const override { return "probe"; }
  std::vector<VolumePtr> members() const override { return {leaf_}; }
  uint64_t in_flight = 0;

 protected:
  Task<Status> do_read(IoContext c, uint64_t o, Iov iov) override { return counted(leaf_->read(c, o, iov)); }
  Task<Status> do_write(IoContext c, uint64_t o, Iov iov) override { return counted(leaf_->write(c, o, iov)); }
  Task<Status> do_flush(IoContext c) override { return counted(leaf_->flush(c)); }

 private:
  Task<Status> counted(Task<Status> t) {
    ++in_flight;
    Status s = co_await t;
    --in_flight;
    co_return s;
  }
  VolumePtr leaf_;
};

// A closed loop: one request after the other, with think time between.
struct Load {
  IoContext ctx;
  uint64_t offset = 0, length = 0;  // the region it works in
  uint32_t bytes = 4096;
  bool write = false, sequential = false, flush = false;
  uint64_t think_ns = 0;
};
struct Tally {
  bool stop = false;
  uint64_t outstanding = 0;
  uint64_t done = 0;
  uint64_t failed = 0;
  std::vector<uint64_t> latency_ns;
};

inline Task<void> client(Volume* v, Load load, Tally* tally, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<char> data(load.bytes);
  iovec iov{data.data(), data.size()};
  Reactor& r = Reactor::current();
  const uint64_t slots = load.length / load.bytes;
  for (uint64_t i = random() % slots; !tally->stop; ++i) {
    const uint64_t at = load.offset + (load.sequential ? i % slots : random() % slots) * load.bytes;
    const uint64_t begin = r.now_ns();
    ++tally->outstanding;
    Status s;
    if (load.flush) s = co_await v->flush(load.ctx);
    else if (load.write) s = co_await v->write(load.ctx, at, Iov(&iov, 1));
    else s = co_await v->read(load.ctx, at, Iov(&iov, 1));
    --tally->outstanding;
    ++tally->done;
    if (!s) ++tally->failed;
    tally->latency_ns.push_back(r.now_ns() - begin);
    if (load.think_ns > 0) co_await r.sleep_for(load.think_ns / 2 + random() % load.think_ns);
  }
}

}  // namespace spillway::testing
