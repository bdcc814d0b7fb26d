#include "src/export/vfio_user/flusher.h"

#include <pthread.h>

#include <thread>

#include "src/base/log.h"

namespace spillway::vfio {

struct Flusher::Shared {
  std::shared_ptr<PmemBacking> backing;
  std::mutex mutex;
  std::condition_variable wake;
  Done done;              // empty once the device is gone; called with `calling` held
  std::mutex calling;
  uint64_t asked = 0, finished = 0, runs = 0;
  bool stop = false;
};

Flusher::Flusher(std::shared_ptr<PmemBacking> backing, Done done) : shared_(std::make_shared<Shared>()) {
  shared_->backing = std::move(backing);
  shared_->done = std::move(done);
  std::thread t(&Flusher::work, shared_);
  pthread_setname_np(t.native_handle(), "pmem-flush");
  t.detach();
}

Flusher::~Flusher() {
  {
    std::lock_guard lock(shared_->mutex);
    shared_->stop = true;
    shared_->wake.notify_one();
  }
  std::lock_guard lock(shared_->calling);
  shared_->done = nullptr;
}

uint64_t Flusher::request() {
  std::lock_guard lock(shared_->mutex);
  shared_->wake.notify_one();
  return ++shared_->asked;
}

uint64_t Flusher::runs() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->runs;
}

void Flusher::work(std::shared_ptr<Shared> s) {
  std::unique_lock lock(s->mutex);
  for (;;) {
    s->wake.wait(lock, [&] { return s->stop || s->asked != s->finished; });
    if (s->stop) return;
    const uint64_t upto = s->asked;  // who comes later may have stored later: not of this run
    ++s->runs;
    lock.unlock();
    const Status status = s->backing->sync();
    if (!status) LOG_LIMITED(LogLevel::kWarn, "vfio-user", "flush failed: {}", status.error().message());
    {
      std::lock_guard calling(s->calling);
      if (s->done) s->done(upto, status.has_value());
    }
    lock.lock();
    s->finished = upto;
  }
}

}  // namespace spillway::vfio
