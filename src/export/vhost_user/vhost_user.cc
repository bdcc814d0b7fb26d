#include "src/export/vhost_user/vhost_user.h"

#include <poll.h>
#include <sys/socket.h>

#include <mutex>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/base/unix_socket.h"
#include "src/export/vhost_user/session.h"

namespace spillway {

namespace vhost {
namespace {

Result<Fd> bind_socket(const std::string& path) {
  SPILLWAY_TRY(Fd fd, listen_unix(path));
  if (::fcntl(fd.get(), F_SETFL, O_NONBLOCK) != 0) return fail_errno(errno, fmt::format("socket {}", path));
  return fd;
}

class VhostUserExport final : public Export {
 public:
  explicit VhostUserExport(ExportOptions options) {
    context_.options = std::move(options);
    const ExportOptions& o = context_.options;
    context_.device.name = o.name;
    context_.device.volume = o.volume;
    context_.device.group = o.group;
    context_.device.read_only = o.read_only || o.volume->geometry().read_only;
    context_.device.blocking = o.blocking;
    for (uint32_t i = 0; i < o.queues; ++i) {
      context_.queues.push_back(std::make_unique<Queue>(context_.device, static_cast<uint16_t>(i)));
      context_.queues.back()->on_broken = [this](Queue& q) { ring_broke(q); };
    }
    context_.spread = static_cast<uint32_t>(o.reactors->size());
    context_.control = &context_.owner(0);
  }
  ~VhostUserExport() override { SPILLWAY_ASSERT(!launched_ || ended_.is_set()); }

  Status open();
  void launch() {
    launched_ = true;
    listener_ = context_.options.volume->add_resize_listener([this](uint64_t) {
      context_.control->post([this] {
        if (session_ != nullptr) session_->config_changed();
      });
    });
    context_.control->post([this] { context_.control->spawn(run()); });
  }

  const std::string& name() const override { return context_.options.name; }
  std::string_view transport() const override { return "vhost-user-blk"; }
  ExportStats stats() const override;
  std::string to_text() const override;
  Task<Status> spread(uint32_t reactors) override;
  Task<void> stop(bool keep) override;

 private:
  Task<void> run();
  Task<void> serve(Fd connection, bool adopted);
  struct Spreading {
    Status result{};
    AsyncEvent done;
  };
  Task<void> spread_on_control(uint32_t reactors, std::shared_ptr<Spreading> spreading);
  Task<Fd> accept();
  void forget_connection();
  void ring_broke(Queue& q);
  void begin_stop();

  Context context_;
  Fd listening_;
  uint64_t listener_ = 0;
  bool launched_ = false;
  bool stopping_ = false;     // control reactor
  bool keep_ = false;
  IoOp* waiting_ = nullptr;
  Session* session_ = nullptr;
  AsyncEvent ended_;
  std::atomic<bool> connected_{false};
  std::atomic<uint64_t> connections_{0};
  std::atomic<uint64_t> protocol_errors_{0};
  mutable std::mutex text_mutex_;
  std::string text_;          // of the session, refreshed by the control reactor
};

Status VhostUserExport::open() {
  const ExportOptions& o = context_.options;
  if (o.store != nullptr) {
    auto entry = o.store->get(context_.prefix() + "listen");
    if (entry && entry->fds.size() == 1 && entry->blob == o.socket) {
      listening_ = std::move(entry->fds[0]);
      return {};
    }
  }
  SPILLWAY_TRY(listening_, bind_socket(o.socket));
  if (o.store != nullptr) {
    const int fd = listening_.get();
    SPILLWAY_CHECK(o.store->put(context_.prefix() + "listen", {&fd, 1}, o.socket));
  }
  return {};
}

Task<Fd> VhostUserExport::accept() {
  for (;;) {
    if (stopping_) co_return Fd();
    const int fd = ::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) co_return Fd(fd);
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: accept: {}", name(), std::strerror(errno));
      IoAwait pause = context_.control->sleep_for(1'000'000'000);
      waiting_ = &pause;
      co_await pause;
      waiting_ = nullptr;
      continue;
    }
    IoAwait op = context_.control->poll(listening_.get(), POLLIN);
    waiting_ = &op;
    co_await op;
    waiting_ = nullptr;
  }
}

Task<void> VhostUserExport::run() {
  FdStore* store = context_.options.store;
  if (store != nullptr) {
    auto entry = store->get(context_.prefix() + "conn");
    if (entry && entry->fds.size() == 1) co_await serve(std::move(entry->fds[0]), true);
  }
  while (!stopping_) {
    Fd connection = co_await accept();
    if (connection) co_await serve(std::move(connection), false);
  }
  ended_.set();
}

Task<void> VhostUserExport::serve(Fd connection, bool adopted) {
  Session session(context_, std::move(connection));
  session_ = &session;
  connected_.store(true, std::memory_order_relaxed);
  connections_.fetch_add(1, std::memory_order_relaxed);
  Status s{};
  if (adopted) {
    s = co_await session.adopt();
    if (s) log(LogLevel::kInfo, "vhost-user", "{}: connection taken over", name());
  } else if (Status stored = session.store_connection(); !stored) {
    log(LogLevel::kWarn, "vhost-user", "{}: this connection will not survive a restart: {}", name(),
        stored.error().message());
  }
  if (s && !stopping_) s = co_await session.serve();
  co_await context_.changing.lock();
  co_await session.stop_rings();
  session_ = nullptr;
  context_.changing.unlock();
  if (!stopping_ || !keep_) forget_connection();
  if (!s && !stopping_) {
    protocol_errors_.fetch_add(1, std::memory_order_relaxed);
    LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: connection ended: {}", name(), s.error().message());
  }
  connected_.store(false, std::memory_order_relaxed);
}

void VhostUserExport::forget_connection() {
  FdStore* store = context_.options.store;
  if (store == nullptr) return;
  // "conn" first: without it the rest means nothing.
  (void)store->remove(context_.prefix() + "conn");
  for (const char* what : {"memory", "inflight", "backend"}) (void)store->remove(context_.prefix() + what);
  for (size_t i = 0; i < context_.queues.size(); ++i)
    (void)store->remove(fmt::format("{}ring{}", context_.prefix(), i));
}

void VhostUserExport::ring_broke(Queue& q) {
  std::string why = fmt::format("queue {}: {}", q.index(), q.broken_reason());
  context_.control->post([this, why = std::move(why)] {
    if (session_ != nullptr) session_->cancel(Error(ErrorKind::kInvalid, why));
  });
}

Task<Status> VhostUserExport::spread(uint32_t reactors) {
  if (reactors == 0 || reactors > context_.options.reactors->size())
    co_return fail(ErrorKind::kInvalid, fmt::format("reactors: 1 to {}", context_.options.reactors->size()));
  auto spreading = std::make_shared<Spreading>();
  auto begin = [this, reactors, spreading] { context_.control->spawn(spread_on_control(reactors, spreading)); };
  co_await RunOn(*context_.control, begin);
  co_await spreading->done.wait();
  co_return std::move(spreading->result);
}

Task<void> VhostUserExport::spread_on_control(uint32_t reactors, std::shared_ptr<Spreading> spreading) {
  co_await context_.changing.lock();
  context_.spread = reactors;
  if (session_ != nullptr) spreading->result = co_await session_->spread();
  context_.changing.unlock();
  spreading->done.set();
}

void VhostUserExport::begin_stop() {
  stopping_ = true;
  if (session_ != nullptr) session_->cancel(Error(ErrorKind::kCanceled, "the export is stopped"));
  if (waiting_ != nullptr) context_.control->cancel(*waiting_);
}

Task<void> VhostUserExport::stop(bool keep) {
  context_.options.volume->remove_resize_listener(listener_);
  auto begin = [this, keep] {
    keep_ = keep;
    begin_stop();
  };
  co_await RunOn(*context_.control, begin);
  co_await ended_.wait();
  co_await context_.changing.lock();  // a spread() that began before has ended
  context_.changing.unlock();
  // Whatever was posted to the control reactor before this (a broken ring, a resize) has run when this has.
  co_await RunOn(*context_.control, [] {});
  if (!keep && listening_) {
    if (context_.options.store != nullptr) (void)context_.options.store->remove(context_.prefix() + "listen");
    ::unlink(context_.options.socket.c_str());
  }
  listening_.reset();
}

ExportStats VhostUserExport::stats() const {
  ExportStats s;
  s.connected = connected_.load(std::memory_order_relaxed);
  s.connections = connections_.load(std::memory_order_relaxed);
  s.protocol_errors = protocol_errors_.load(std::memory_order_relaxed);
  for (const auto& q : context_.queues) {
    const QueueStats& t = q->stats();
    s.reads += t.reads.load(std::memory_order_relaxed);
    s.writes += t.writes.load(std::memory_order_relaxed);
    s.flushes += t.flushes.load(std::memory_order_relaxed);
    s.discards += t.discards.load(std::memory_order_relaxed);
    s.read_bytes += t.read_bytes.load(std::memory_order_relaxed);
    s.write_bytes += t.write_bytes.load(std::memory_order_relaxed);
    s.errors += t.errors.load(std::memory_order_relaxed);
  }
  return s;
}

std::string VhostUserExport::to_text() const {
  std::string text;
  for (const auto& q : context_.queues) {
    const QueueStats& t = q->stats();
    text += fmt::format("queue {}: {} reads, {} writes, {} flushes, {} kicks, {} calls\n", q->index(),
                        t.reads.load(std::memory_order_relaxed), t.writes.load(std::memory_order_relaxed),
                        t.flushes.load(std::memory_order_relaxed), t.kicks.load(std::memory_order_relaxed),
                        t.calls.load(std::memory_order_relaxed));
  }
  return text;
}

}  // namespace
}  // namespace vhost

Result<std::unique_ptr<Export>> start_vhost_user(ExportOptions options) {
  const std::string what = fmt::format("export {}", options.name);
  if (options.name.empty() || options.volume == nullptr || options.reactors == nullptr)
    return fail(ErrorKind::kInvalid, what + ": needs a name, a volume and reactors");
  if (options.queues == 0 || options.queues > kVhostMaxQueues)
    return fail(ErrorKind::kInvalid, fmt::format("{}: queues: 1 to {}", what, kVhostMaxQueues));
  auto e = std::make_unique<vhost::VhostUserExport>(std::move(options));
  if (Status s = e->open(); !s) {
    // Never launched: nothing to wait for.
    return fail(std::move(s).error().with_context(what));
  }
  e->launch();
  return e;
}

}  // namespace spillway
