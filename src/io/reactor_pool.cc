#include "src/io/reactor_pool.h"

#include <pthread.h>
#include <sched.h>

#include <fmt/core.h>

namespace spillway {

Result<std::unique_ptr<ReactorPool>> ReactorPool::start(const std::vector<int>& cpus) {
  std::unique_ptr<ReactorPool> pool(new ReactorPool);
  for (size_t i = 0; i < cpus.size(); ++i) {
    SPILLWAY_TRY(auto reactor, UringReactor::create());
    pool->reactors_.push_back(std::move(reactor));
  }
  for (size_t i = 0; i < cpus.size(); ++i) {
    Reactor* r = pool->reactors_[i].get();
    auto& t = pool->threads_.emplace_back([r] { r->run(); });
    pthread_setname_np(t.native_handle(), fmt::format("reactor-{}", i).c_str());
    if (cpus[i] < 0) continue;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[i], &set);
    if (int err = pthread_setaffinity_np(t.native_handle(), sizeof set, &set); err != 0)
      return fail_errno(err, fmt::format("reactor {}: pin to CPU {}", i, cpus[i]));
  }
  return pool;
}

ReactorPool::~ReactorPool() {
  for (size_t i = 0; i < threads_.size(); ++i) reactors_[i]->stop();
  for (auto& t : threads_) t.join();
}

}  // namespace spillway
