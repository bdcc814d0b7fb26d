// blk_server: one volume over vhost-user-blk and nothing else, for measurements of the transport alone.
//   blk_server SOCKET null|memory SIZE [QUEUES] [CPU,CPU...]
// Ends on SIGTERM or SIGINT.
#include <signal.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "src/export/vhost_user/vhost_user.h"
#include "src/volume/memory/memory.h"

namespace spillway {
namespace {

// Like qemu's null-co: answers at once, moves no data.
class NullVolume final : public Volume {
 public:
  explicit NullVolume(uint64_t size) : Volume("null", size, {.discard_granularity = 4096}) {}
  std::string_view layer() const override { return "null"; }

 protected:
  Task<Status> do_read(IoContext, uint64_t, Iov) override { return Task<Status>::ready(); }
  Task<Status> do_write(IoContext, uint64_t, Iov) override { return Task<Status>::ready(); }
  Task<Status> do_flush(IoContext) override { return Task<Status>::ready(); }
  Task<Status> do_discard(IoContext, uint64_t, uint64_t) override { return Task<Status>::ready(); }
};

Task<Result<VolumePtr>> open_volume(std::string what, uint64_t size) {
  if (what == "null") co_return VolumePtr(std::make_shared<NullVolume>(size));
  if (what == "memory") co_return make_memory("memory", size);
  co_return fail(ErrorKind::kInvalid, what);
}

int run(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: blk_server SOCKET null|memory SIZE [QUEUES] [CPU,...]\n");
    return 2;
  }
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::vector<int> cpus;
  std::string list = argc > 5 ? argv[5] : "-1";
  for (char* part = std::strtok(list.data(), ","); part != nullptr; part = std::strtok(nullptr, ","))
    cpus.push_back(std::atoi(part));
  auto pool = ReactorPool::start(cpus);
  auto size = parse_size(argv[3]);
  auto control = UringReactor::create();
  if (!pool || !size || !control) {
    std::fprintf(stderr, "blk_server: reactors or size\n");
    return 1;
  }
  auto volume = (*control)->block_on(open_volume(argv[2], *size));
  if (!volume) {
    std::fprintf(stderr, "blk_server: %s\n", volume.error().message().c_str());
    return 1;
  }
  ExportOptions o;
  o.name = "bench";
  o.volume = *volume;
  o.socket = argv[1];
  o.queues = argc > 4 ? static_cast<uint32_t>(std::atoi(argv[4])) : 1;
  o.reactors = pool->get();
  auto e = start_vhost_user(std::move(o));
  if (!e) {
    std::fprintf(stderr, "blk_server: %s\n", e.error().message().c_str());
    return 1;
  }
  std::printf("ready\n");
  std::fflush(stdout);
  int sig = 0;
  sigwait(&set, &sig);
  (*control)->block_on((*e)->stop(false));
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::run(argc, argv); }
