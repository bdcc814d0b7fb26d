// Two tenants' closed loops on two pinned reactors, timed slices.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <random>
#include <vector>

#include "benchmarks/common/bench.h"
#include "src/io/reactor_pool.h"
#include "src/qos/histogram.h"
#include "src/volume/volume.h"

namespace spillway::bench {

struct Tenant {
  IoContext ctx;
  uint64_t offset = 0, length = 0;
  uint32_t bytes = 4096;
  uint32_t depth = 32;  // outstanding, half on each reactor; 1 = on the first
  bool write = false, sequential = false;
};

// What one tenant did in the measured part of a slice.
struct Outcome {
  double ops_s = 0;
  double p50_us = 0, p99_us = 0;
};

class Loads {
 public:
  explicit Loads(ReactorPool& pool) : pool_(pool) {}

  // Runs the tenants together on `volume`: warm_s unmeasured, then measured_s. cpu_s, when given: process CPU time of
  // the measured part.
  std::vector<Outcome> run(const VolumePtr& volume, const std::vector<Tenant>& tenants, double warm_s,
                           double measured_s, double* cpu_s = nullptr) {
    const uint64_t begin = now_ns() + 2'000'000;
    from_ = begin + static_cast<uint64_t>(warm_s * 1e9);
    until_ = from_ + static_cast<uint64_t>(measured_s * 1e9);
    std::vector<std::vector<std::unique_ptr<Part>>> parts(tenants.size());
    std::atomic<int> left{0};
    for (size_t t = 0; t < tenants.size(); ++t)
      for (size_t r = 0; r < pool_.size(); ++r) {
        const uint32_t n = share(tenants[t].depth, r);
        if (n == 0) continue;
        parts[t].push_back(std::make_unique<Part>());
        Part* part = parts[t].back().get();
        part->tenant = tenants[t];
        left.fetch_add(static_cast<int>(n));
        Reactor& reactor = pool_.at(r);
        reactor.post([this, part, n, volume, &reactor, &left, seed = ++seed_] {
          for (uint32_t i = 0; i < n; ++i) reactor.spawn(client(volume.get(), part, &left, seed * 1000 + i));
        });
      }
    const auto sleep_to = [](uint64_t at) {
      while (now_ns() < at) usleep(static_cast<useconds_t>(std::min<uint64_t>(100'000, (at - now_ns()) / 1000 + 1)));
    };
    sleep_to(from_);
    const uint64_t cpu = process_cpu_ns();
    sleep_to(until_);
    if (cpu_s != nullptr) *cpu_s = static_cast<double>(process_cpu_ns() - cpu) / 1e9;
    while (left.load() != 0) usleep(500);
    std::vector<Outcome> all;
    for (auto& tenant : parts) {
      Outcome o;
      LatencyCounts latency;
      for (auto& p : tenant) {
        o.ops_s += static_cast<double>(p->done) / measured_s;
        latency.merge(p->latency);
      }
      o.p50_us = static_cast<double>(latency.percentile(0.5)) / 1e3;
      o.p99_us = static_cast<double>(latency.percentile(0.99)) / 1e3;
      all.push_back(o);
    }
    return all;
  }

 private:
  struct alignas(64) Part {
    Tenant tenant;
    uint64_t done = 0, cursor = 0;
    LatencyHistogram latency;
  };
  uint32_t share(uint32_t depth, size_t reactor) const {
    const auto n = static_cast<uint32_t>(pool_.size());
    return depth / n + (reactor < depth % n ? 1 : 0);
  }

  Task<void> client(Volume* v, Part* part, std::atomic<int>* left, uint64_t seed) {
    std::mt19937_64 random(seed);
    AlignedBuffer buffer(part->tenant.bytes);
    for (size_t i = 0; i < buffer.size(); i += 8) {
      const uint64_t word = random();
      __builtin_memcpy(buffer.data() + i, &word, 8);
    }
    iovec iov = buffer.iov();
    const Tenant& t = part->tenant;
    const uint64_t blocks = t.length / t.bytes;
    Reactor& reactor = Reactor::current();
    uint64_t now = reactor.now_ns();
    while (now < until_) {
      const uint64_t at = t.offset + (t.sequential ? part->cursor++ : random()) % blocks * t.bytes;
      const uint64_t begin = now;
      Status s;
      if (t.write) s = co_await v->write(t.ctx, at, Iov(&iov, 1));
      else s = co_await v->read(t.ctx, at, Iov(&iov, 1));
      SPILLWAY_ASSERT(s.has_value());
      now = reactor.now_ns();
      if (now >= from_ && now < until_) {
        ++part->done;
        part->latency.add(now - begin);
      }
    }
    left->fetch_sub(1);
  }

  ReactorPool& pool_;
  uint64_t from_ = 0, until_ = 0, seed_ = 0;
};

}  // namespace spillway::bench
