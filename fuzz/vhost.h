// Shared by the vhost-user fuzzers: feeds messages to a Session over a socket pair, then closes.
#pragma once

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <cstring>
#include <semaphore>
#include <string>
#include <vector>

#include "src/base/log.h"
#include "src/export/vhost_user/session.h"
#include "src/volume/memory/memory.h"

namespace spillway::vhost {

struct FuzzMessage {
  Header head{};
  std::string payload;
  unsigned memory_fds = 0, event_fds = 0;
};

class FuzzServer {
 public:
  FuzzServer() {
    set_log_level(LogLevel::kError);
    pool_ = std::move(*ReactorPool::start({-1}));
    context_.options.name = "fuzz";
    context_.options.volume = *make_memory("m", 1 << 20);
    context_.options.queues = 2;
    context_.options.reactors = pool_.get();
    context_.device.name = "fuzz";
    context_.device.volume = context_.options.volume;
    context_.control = &pool_->at(0);
    context_.spread = 1;
    for (uint16_t i = 0; i < 2; ++i) context_.queues.push_back(std::make_unique<Queue>(context_.device, i));
    memory_ = Fd(::memfd_create("fuzz", MFD_CLOEXEC));
    SPILLWAY_ASSERT(::ftruncate(memory_.get(), 1 << 20) == 0);
    event_ = Fd(::eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK));
  }
  void run(const std::vector<FuzzMessage>& messages) {
    int pair[2];
    SPILLWAY_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0);
    Fd client(pair[0]);
    for (const FuzzMessage& m : messages) send(client.get(), m);
    ::shutdown(client.get(), SHUT_WR);
    std::binary_semaphore done(0);
    int server = pair[1];
    context_.control->post([this, server, &done] { context_.control->spawn(serve(Fd(server), &done)); });
    done.acquire();
  }

 private:
  Task<void> serve(Fd socket, std::binary_semaphore* done) {
    {
      Session session(context_, std::move(socket));
      for (auto& q : context_.queues)
        q->on_broken = [&session](Queue&) { session.cancel(Error(ErrorKind::kInvalid, "ring")); };
      Status s = co_await session.serve();
      co_await session.stop_rings();
    }
    done->release();
  }
  void send(int fd, const FuzzMessage& m) {
    std::string bytes(reinterpret_cast<const char*>(&m.head), sizeof m.head);
    bytes += m.payload;
    iovec v{bytes.data(), bytes.size()};
    msghdr h{};
    h.msg_iov = &v;
    h.msg_iovlen = 1;
    std::vector<int> fds(m.memory_fds, memory_.get());
    fds.insert(fds.end(), m.event_fds, event_.get());
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
    if (!fds.empty()) {
      h.msg_control = control;
      h.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* c = CMSG_FIRSTHDR(&h);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
    }
    (void)::sendmsg(fd, &h, MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  std::unique_ptr<ReactorPool> pool_;
  Context context_;
  Fd memory_, event_;
};

}  // namespace spillway::vhost
