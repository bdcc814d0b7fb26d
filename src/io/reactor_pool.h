// ReactorPool: one running reactor per thread, for the daemon. Start, use, stop: in that order, from one thread.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "src/io/reactor.h"

namespace spillway {

class ReactorPool {
 public:
  // cpus: one thread per entry, pinned to that CPU; -1 = not pinned.
  static Result<std::unique_ptr<ReactorPool>> start(const std::vector<int>& cpus);
  // Stops the loops and joins the threads. Whoever uses the reactors has drained them before.
  ~ReactorPool();
  size_t size() const { return reactors_.size(); }
  Reactor& at(size_t i) { return *reactors_[i]; }

 private:
  ReactorPool() = default;
  std::vector<std::unique_ptr<UringReactor>> reactors_;
  std::vector<std::thread> threads_;
};

}  // namespace spillway
