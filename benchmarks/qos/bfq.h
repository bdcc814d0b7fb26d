// The kernel's proportional share for comparison: BFQ on a loop device over the same file, two fio jobs in two cgroup v1
// blkio groups. Only where the machine has all of that and we are root.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace spillway::bench {

class Bfq {
 public:
  struct Job {
    std::string rw;  // fio's word: randread, randwrite, read
    uint32_t bytes = 4096, depth = 32;
    uint64_t offset = 0, length = 0;
    uint32_t weight = 100;
  };
  struct Outcome {
    double ops_s = 0, p99_us = 0;
  };
  // Null and why when something is missing. Undoes everything when it goes.
  static std::unique_ptr<Bfq> create(const std::string& file, std::string* why);
  ~Bfq();
  // What went wrong in the last run.
  const std::string& error() const { return error_; }
  // scheduler: "bfq" or "none". One outcome per job; empty on failure.
  std::vector<Outcome> run(const std::string& scheduler, const std::vector<Job>& jobs, double seconds);

 private:
  Bfq() = default;
  std::string device_, groups_[2], error_;
};

}  // namespace spillway::bench
