// A holder and its worker that serve one file over vhost-user-blk, for tests that kill the worker.
//   vhost_worker FILE SOCKET PIDFILE QUEUES          (becomes the holder; the worker writes its pid to PIDFILE)
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "src/export/vhost_user/vhost_user.h"
#include "src/host/holder.h"
#include "src/volume/file/file.h"

namespace spillway {
namespace {

int work(int argc, char** argv, int store_fd) {
  if (argc < 5) return 2;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  RemoteFdStore store{Fd(store_fd)};
  auto main = UringReactor::create(64);  // before the pool, whose threads post to it
  auto pool = ReactorPool::start({-1, -1});
  BlockingPool blocking(1);
  FileOptions f;
  f.path = argv[1];
  f.direct = false;
  f.lock = false;
  auto volume = open_file("file", std::move(f));
  if (!pool || !main || !volume) return 3;
  ExportOptions o;
  o.name = "kill";
  o.volume = *volume;
  o.socket = argv[2];
  o.queues = static_cast<uint32_t>(std::atoi(argv[4]));
  o.store = &store;
  o.reactors = pool->get();
  o.blocking = &blocking;
  auto e = start_vhost_user(std::move(o));
  if (!e) {
    std::fprintf(stderr, "vhost_worker: %s\n", e.error().message().c_str());
    return 4;
  }
  const std::string temporary = std::string(argv[3]) + ".new";
  if (FILE* pid = std::fopen(temporary.c_str(), "w")) {
    std::fprintf(pid, "%d\n", ::getpid());
    std::fclose(pid);
    std::rename(temporary.c_str(), argv[3]);
  }
  if (!store.ready()) return 5;
  int sig = 0;
  sigwait(&set, &sig);
  (*main)->block_on((*e)->stop(false));
  e->reset();
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  const std::string last = argv[argc - 1];
  const std::string option = "--store-fd=";
  if (last.rfind(option, 0) == 0)
    return spillway::work(argc - 1, argv, std::atoi(last.c_str() + option.size()));
  std::vector<std::string> worker(argv, argv + argc);
  worker[0] = "/proc/self/exe";
  return spillway::run_holder(worker);
}
