// The socket side of a vfio-user device: connections, messages, descriptors, and what survives the worker.
//
// One message at a time: peek header, peek whole message with its descriptors, handle it, note the reply in the state
// memfd, consume, send, clear the note. A successor finds one of
//   no note, message in the socket      -> it handles it (again: every message can be handled twice)
//   note, message still in the socket   -> consumes it and sends the noted reply
//   note, message gone                  -> sends the noted reply
// Messages with descriptors go another way. A peek brings the descriptors of the *next* message when this one has none
// (Linux goes on over the queue after the last byte asked for), and a DMA_MAP is right with and without one. So the message
// and what the peek brought are put into the store, then the message is received for good, which tells whose they were:
//   taking set, message still in the socket   -> nothing happened yet
//   taking set, message gone                  -> the successor handles the stored one
// The third line is ambiguous for the instant between the end of sendmsg and the clearing of the note; a killed process
// finishes the system call it is in, so the window is a few instructions. Messages without reply have no such window.
//
// Thread-confined to one reactor of the pool, except stop, stats and to_text.
#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <mutex>

#include "src/base/log.h"
#include "src/base/unix_socket.h"
#include "src/export/vfio_user/device.h"
#include "src/export/vfio_user/vfio_user.h"
#include "src/io/sync.h"

namespace spillway {

using namespace vfio;

namespace {

constexpr uint64_t kShortPauseNs = 2'000'000;
constexpr int kShortTries = 1000;  // a client that sends half a message has two seconds for the rest

class StateMap {
 public:
  static Result<StateMap> create() {
    Fd fd(::memfd_create("vfio-user-state", MFD_CLOEXEC));
    if (!fd) return fail_errno(errno, "vfio-user: memfd");
    if (::ftruncate(fd.get(), sizeof(DeviceState)) != 0) return fail_errno(errno, "vfio-user: state");
    return open(std::move(fd));
  }
  static Result<StateMap> open(Fd fd) {
    void* p = ::mmap(nullptr, sizeof(DeviceState), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (p == MAP_FAILED) return fail_errno(errno, "vfio-user: map of the state");
    return StateMap(std::move(fd), static_cast<DeviceState*>(p));
  }
  StateMap(StateMap&& o) noexcept : fd_(std::move(o.fd_)), state_(std::exchange(o.state_, nullptr)) {}
  StateMap& operator=(StateMap&&) = delete;
  ~StateMap() {
    if (state_ != nullptr) ::munmap(state_, sizeof(DeviceState));
  }
  DeviceState& operator*() const { return *state_; }
  DeviceState* operator->() const { return state_; }
  int fd() const { return fd_.get(); }

 private:
  StateMap(Fd fd, DeviceState* s) : fd_(std::move(fd)), state_(s) {}
  Fd fd_;
  DeviceState* state_;
};

class VfioUserExport final : public Export {
 public:
  VfioUserExport(ExportOptions options, std::shared_ptr<PmemBacking> backing, VfioUserOptions vfio, Fd listener,
                 StateMap state)
      : options_(std::move(options)),
        vfio_(vfio),
        backing_(std::move(backing)),
        listener_(std::move(listener)),
        state_(std::move(state)),
        home_(options_.reactors->at(std::hash<std::string>{}(options_.name) % options_.reactors->size())) {}
  ~VfioUserExport() override { SPILLWAY_ASSERT(!started_ || finished_.is_set()); }

  // `connection`: a predecessor's client, or none.
  void start(Fd connection) {
    started_ = true;
    auto shared = std::make_shared<Fd>(std::move(connection));
    home_.post([this, shared] { home_.spawn(run(std::move(*shared))); });
  }

  const std::string& name() const override { return options_.name; }
  std::string_view transport() const override { return "vfio-user-pmem"; }
  ExportStats stats() const override {
    std::lock_guard lock(mutex_);
    return stats_;
  }
  std::string to_text() const override {
    std::lock_guard lock(mutex_);
    return fmt::format("socket: {}\n{}", options_.socket, text_);
  }
  Task<void> stop(bool keep) override {
    if (!stopping_.exchange(true)) {
      keep_ = keep;
      home_.post([this] {
        if (op_ != nullptr) home_.cancel(*op_);
        told_.set();
      });
    }
    // Both: the run may end by itself before the message gets there, and then we must still be here for it.
    co_await told_.wait();
    co_await finished_.wait();
    if (!keep && !unlinked_) {
      unlinked_ = true;
      ::unlink(options_.socket.c_str());
      forget();
    }
  }

 private:
  std::string key(std::string_view what) const { return fmt::format("vfio/{}/{}", options_.name, what); }
  void forget() {
    if (options_.store == nullptr) return;
    auto all = options_.store->list(key(""));
    if (!all) return;
    for (auto& entry : *all) (void)options_.store->remove(entry);
  }

  // A kernel operation that stop() can end; -ECANCELED then.
  Task<int32_t> wait(IoAwait& op) {
    if (stopping_) co_return -ECANCELED;
    op_ = &op;
    const int32_t r = co_await op;
    op_ = nullptr;
    co_return r;
  }

  Task<void> run(Fd connection) {
    bool adopted = bool(connection);
    while (!stopping_) {
      if (!connection) {
        IoAwait op = home_.accept(listener_.get());
        const int32_t fd = co_await wait(op);
        if (fd < 0) {
          if (stopping_) break;
          LOG_LIMITED(LogLevel::kWarn, "vfio-user", "{}: accept: {}", options_.name, strerror(-fd));
          IoAwait pause = home_.sleep_for(100'000'000);
          (void)co_await wait(pause);
          continue;
        }
        connection = Fd(fd);
        adopted = false;
      }
      co_await serve(connection.get(), adopted);
      if (stopping_ && keep_) break;
      connection.reset();
    }
    finished_.set();
  }

  pid_t peer(int fd) const {
    ucred c{};
    socklen_t size = sizeof c;
    return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &size) == 0 ? c.pid : 0;
  }

  Task<void> serve(int fd, bool adopted) {
    const pid_t pid = peer(fd);
    backing_->add_mapper(pid);
    PmemDevice::Options o;
    o.name = options_.name;
    o.store = options_.store;
    o.msix = vfio_.msix;
    o.stall_limit = vfio_.stall_limit;
    PmemDevice device(o, backing_, *state_, adopted, home_);
    if (options_.store != nullptr && !adopted) {
      if (Status s = options_.store->put(key("conn"), {&fd, 1}, {}); !s)
        log(LogLevel::kWarn, "vfio-user", "{}: {}", options_.name, s.error().message());
    }
    {
      std::lock_guard lock(mutex_);
      stats_.connected = true;
      ++stats_.connections;
    }
    Status why;
    if (adopted) {
      why = device.adopt();
      if (why) why = finish_noted_reply(fd);
      if (why) why = finish_taken(fd, device);
    }
    while (why && !stopping_) {
      publish(device);
      why = co_await serve_one(fd, device);
    }
    publish(device);
    const bool leave = stopping_ && keep_;
    if (!why && why.error().kind() != ErrorKind::kCanceled) {
      std::lock_guard lock(mutex_);
      if (why.error().kind() != ErrorKind::kNotFound) {  // kNotFound: the client closed the socket
        ++stats_.protocol_errors;
        log(LogLevel::kWarn, "vfio-user", "{}: client dropped: {}", options_.name, why.error().message());
      }
    }
    if (!leave) {
      device.disconnect();
      if (options_.store != nullptr) (void)options_.store->remove(key("conn"));
    }
    backing_->remove_mapper(pid);
    std::lock_guard lock(mutex_);
    stats_.connected = false;
  }

  void publish(const PmemDevice& device) {
    std::lock_guard lock(mutex_);
    stats_.flushes = device.counters().flushes;
    stats_.errors = device.counters().errors + device.counters().bad_requests;
    text_ = device.to_text();
  }

  // Peeks exactly `size` bytes; `fds` gets the descriptors of the message, or of a later one when it has none.
  Task<Status> peek(int fd, std::byte* to, size_t size, std::vector<Fd>* fds) {
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 64)];
    for (int tries = 0; tries < kShortTries; ++tries) {
      iovec iov{to, size};
      msghdr m{};
      m.msg_iov = &iov;
      m.msg_iovlen = 1;
      if (fds != nullptr) {
        m.msg_control = control;
        m.msg_controllen = sizeof control;
      }
      IoAwait op = home_.recvmsg(fd, &m, MSG_PEEK | MSG_CMSG_CLOEXEC);
      const int32_t n = co_await wait(op);
      std::vector<Fd> got;
      if (n > 0 && fds != nullptr) {
        collect(m, got);
        if ((m.msg_flags & MSG_CTRUNC) != 0 || got.size() > kMaxFds)
          co_return fail(ErrorKind::kInvalid, "too many descriptors in one message");
      }
      if (n == 0) co_return fail(ErrorKind::kNotFound, "closed");
      if (n == -ECANCELED) co_return fail(ErrorKind::kCanceled);
      if (n == -EINTR || n == -EAGAIN) continue;
      if (n < 0) co_return fail(n == -ECONNRESET ? ErrorKind::kNotFound : ErrorKind::kIo, strerror(-n));
      if (static_cast<size_t>(n) == size) {
        if (fds != nullptr) *fds = std::move(got);
        co_return Status{};
      }
      IoAwait pause = home_.sleep_for(kShortPauseNs);
      if (co_await wait(pause) == -ECANCELED) co_return fail(ErrorKind::kCanceled);
    }
    co_return fail(ErrorKind::kTimeout, "half a message");
  }

  static Status consume(int fd, size_t size) {
    std::byte sink[4096];
    while (size > 0) {
      const ssize_t n = ::recv(fd, sink, std::min(size, sizeof sink), MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return fail(ErrorKind::kIo, "message vanished");
      size -= static_cast<size_t>(n);
    }
    return {};
  }

  Task<Status> serve_one(int fd, PmemDevice& device) {
    Header h{};
    SPILLWAY_CO_CHECK(co_await peek(fd, reinterpret_cast<std::byte*>(&h), sizeof h, nullptr));
    if (!header_ok(h))
      co_return fail(ErrorKind::kInvalid, fmt::format("bad header: command {} size {} flags {:#x}", h.command, h.size,
                                                      h.flags));
    message_.resize(h.size);
    std::vector<Fd> fds;
    SPILLWAY_CO_CHECK(co_await peek(fd, message_.data(), h.size, &fds));
    std::memcpy(&h, message_.data(), sizeof h);
    if (!header_ok(h) || h.size != message_.size()) co_return fail(ErrorKind::kInvalid, "header changed");
    if (!takes_descriptors(h)) fds.clear();
    const bool taken = !fds.empty();
    if (taken) SPILLWAY_CO_CHECK(take(fd, h, fds));
    co_return handle(fd, device, h, std::move(fds), taken);
  }

  static bool takes_descriptors(const Header& h) {
    const auto c = static_cast<Command>(h.command);
    return c == Command::kDmaMap || c == Command::kSetIrqs;
  }

  // `message_`, whose header is `h`; taken: it has left the socket.
  Status handle(int fd, PmemDevice& device, const Header& h, std::vector<Fd> fds, bool taken) {
    const Request request = parse(h, std::span(message_).subspan(sizeof h), fds.size());
    Answer answer;
    if (auto* v = std::get_if<Version>(&request)) {
      answer = version(*v);
    } else if (!state_->versioned) {
      return fail(ErrorKind::kInvalid, fmt::format("command {} before VERSION", h.command));
    } else {
      answer = device.handle(request, std::move(fds));
    }
    if (answer.error != 0)
      LOG_LIMITED(LogLevel::kDebug, "vfio-user", "{}: command {} refused: {}", options_.name, h.command,
                  strerror(answer.error));
    const bool wants_reply = (h.flags & kFlagNoReply) == 0;
    if (wants_reply) note(h, answer);
    if (!taken) SPILLWAY_CHECK(consume(fd, h.size));
    Status sent = wants_reply ? send_noted(fd) : Status{};
    set_taking(0);
    return sent;
  }

  void set_taking(uint32_t how) {
    // release: what it speaks of (taking_id, the store's entry) is there before it.
    __atomic_store_n(&state_->taking, how, __ATOMIC_RELEASE);
  }

  // Receives the message that has been peeked into `message_`; `fds`: in, what the peek brought; out, what is its own.
  Status take(int fd, const Header& h, std::vector<Fd>& fds) {
    if (options_.store != nullptr) {
      std::vector<int> raw;
      for (Fd& one : fds) raw.push_back(one.get());
      SPILLWAY_CHECK(options_.store->put(key("taking"), raw,
                                         {reinterpret_cast<const char*>(message_.data()), message_.size()}));
      state_->taking_id = h.id;
      set_taking(kTaking);
    }
    std::vector<Fd> own;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 64)];
    for (size_t done = 0; done < message_.size();) {
      iovec iov{message_.data() + done, message_.size() - done};
      msghdr m{};
      m.msg_iov = &iov;
      m.msg_iovlen = 1;
      m.msg_control = control;
      m.msg_controllen = sizeof control;
      const ssize_t n = ::recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return fail(ErrorKind::kIo, "message vanished");
      collect(m, own);
      done += static_cast<size_t>(n);
    }
    if (options_.store != nullptr) set_taking(own.empty() ? kTakenBare : kTaken);
    fds = std::move(own);
    return {};
  }

  static void collect(msghdr& m, std::vector<Fd>& to) {
    for (cmsghdr* c = CMSG_FIRSTHDR(&m); c != nullptr; c = CMSG_NXTHDR(&m, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int raw = -1;
        std::memcpy(&raw, CMSG_DATA(c) + i * sizeof(int), sizeof raw);
        to.emplace_back(raw);
      }
    }
  }

  // What a predecessor had taken out of the socket and not answered.
  Status finish_taken(int fd, PmemDevice& device) {
    DeviceState& s = *state_;
    const uint32_t how = __atomic_load_n(&s.taking, __ATOMIC_ACQUIRE);
    if (how == 0 || options_.store == nullptr) return {};
    SPILLWAY_TRY(auto kept, options_.store->get(key("taking")));
    Header h{};
    if (kept.blob.size() < sizeof h) return fail(ErrorKind::kCorrupt, "kept message");
    std::memcpy(&h, kept.blob.data(), sizeof h);
    if (!header_ok(h) || h.size != kept.blob.size() || h.id != s.taking_id)
      return fail(ErrorKind::kCorrupt, "kept message");
    Header next{};
    const ssize_t n = ::recv(fd, &next, sizeof next, MSG_PEEK | MSG_DONTWAIT);
    if (how == kTaking && n == sizeof next && next.id == h.id && next.command == h.command) {
      set_taking(0);
      return {};
    }
    message_.resize(kept.blob.size());
    std::memcpy(message_.data(), kept.blob.data(), kept.blob.size());
    if (how == kTakenBare) kept.fds.clear();
    return handle(fd, device, h, std::move(kept.fds), true);
  }

  Answer version(const Version& v) {
    Answer a;
    if (v.major != 0) {
      a.error = ENOTSUP;
      return a;
    }
    const Version ours{0, 0};
    const std::string text = fmt::format(R"({{"capabilities":{{"max_msg_fds":{},"max_data_xfer_size":{}}}}})", kMaxFds,
                                         kMaxTransfer);
    a.body.resize(sizeof ours + text.size() + 1);
    std::memcpy(a.body.data(), &ours, sizeof ours);
    std::memcpy(a.body.data() + sizeof ours, text.c_str(), text.size() + 1);
    state_->versioned = 1;
    return a;
  }

  void note(const Header& asked, const Answer& answer) {
    DeviceState& s = *state_;
    Header h = asked;
    h.flags = kFlagReply | (answer.error != 0 ? kFlagError : 0);
    h.error = static_cast<uint32_t>(answer.error);
    h.size = static_cast<uint32_t>(sizeof h + (answer.error != 0 ? 0 : answer.body.size()));
    SPILLWAY_ASSERT(h.size <= sizeof s.reply);
    std::memcpy(s.reply, &h, sizeof h);
    if (h.size > sizeof h) std::memcpy(s.reply + sizeof h, answer.body.data(), answer.body.size());
    s.reply_size = h.size;
    s.reply_id = asked.id;
    s.reply_fd = answer.error == 0 && answer.fd >= 0;
    // release: after a kill the successor sees the note whole or not at all.
    __atomic_store_n(&s.reply_pending, 1, __ATOMIC_RELEASE);
  }

  // Replies are small against the socket's buffer; a client that does not read them is dropped.
  Status send_noted(int fd) {
    DeviceState& s = *state_;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    iovec iov{s.reply, s.reply_size};
    msghdr m{};
    m.msg_iov = &iov;
    m.msg_iovlen = 1;
    if (s.reply_fd != 0) {
      m.msg_control = control;
      m.msg_controllen = sizeof control;
      cmsghdr* c = CMSG_FIRSTHDR(&m);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(sizeof(int));
      const int raw = backing_->fd();
      std::memcpy(CMSG_DATA(c), &raw, sizeof raw);
    }
    ssize_t n = 0;
    do n = ::sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    __atomic_store_n(&s.reply_pending, 0, __ATOMIC_RELEASE);
    if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) return fail(ErrorKind::kNotFound, "closed");
    if (n != static_cast<ssize_t>(s.reply_size)) return fail(ErrorKind::kIo, "the client does not read its replies");
    return {};
  }

  Status finish_noted_reply(int fd) {
    DeviceState& s = *state_;
    if (__atomic_load_n(&s.reply_pending, __ATOMIC_ACQUIRE) == 0) return {};
    if (s.taking_id == s.reply_id) set_taking(0);  // handled, and only the answer is missing
    if (s.reply_size < sizeof(Header) || s.reply_size > sizeof s.reply)
      return fail(ErrorKind::kCorrupt, "kept reply");
    Header h{};
    const ssize_t n = ::recv(fd, &h, sizeof h, MSG_PEEK | MSG_DONTWAIT);
    if (n == sizeof h && h.id == s.reply_id && (h.flags & kFlagNoReply) == 0 && header_ok(h))
      SPILLWAY_CHECK(consume(fd, h.size));
    return send_noted(fd);
  }

  const ExportOptions options_;
  const VfioUserOptions vfio_;
  std::shared_ptr<PmemBacking> backing_;
  Fd listener_;
  StateMap state_;
  Reactor& home_;
  std::vector<std::byte> message_;
  IoOp* op_ = nullptr;
  bool started_ = false, unlinked_ = false;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> keep_{false};
  AsyncEvent finished_, told_;
  mutable std::mutex mutex_;
  ExportStats stats_;
  std::string text_;
};

struct Kept {
  Fd listener, connection, state;
};

// What a predecessor left, as far as it fits together; a client without its state is dropped.
Kept adopt(const ExportOptions& o, uint64_t size, bool msix) {
  Kept k;
  if (o.store == nullptr) return k;
  auto one = [&](const char* what) {
    auto e = o.store->get(fmt::format("vfio/{}/{}", o.name, what));
    return e && e->fds.size() == 1 ? std::move(e->fds[0]) : Fd();
  };
  k.listener = one("listen");
  k.connection = one("conn");
  k.state = one("state");
  DeviceState s{};
  const bool fits = k.state && ::pread(k.state.get(), &s, sizeof s, 0) == sizeof s && s.magic == kStateMagic &&
                    s.version == kStateVersion && s.size == size && (s.bar_msix != 0) == msix;
  if (!fits) {
    k.connection.reset();
    k.state.reset();
  }
  return k;
}

}  // namespace

Result<std::unique_ptr<Export>> start_vfio_user_pmem(ExportOptions options, std::shared_ptr<PmemBacking> backing,
                                                     VfioUserOptions vfio) {
  SPILLWAY_ASSERT(options.reactors != nullptr && backing);
  Kept kept = adopt(options, backing->size(), vfio.msix);
  if (!kept.listener) {
    SPILLWAY_TRY(kept.listener, listen_unix(options.socket));
  }
  auto map = kept.state ? StateMap::open(std::move(kept.state)) : StateMap::create();
  if (!map) return std::unexpected(std::move(map).error());
  if (options.store != nullptr) {
    const int listener = kept.listener.get(), state = map->fd();
    SPILLWAY_CHECK(options.store->put(fmt::format("vfio/{}/listen", options.name), {&listener, 1}, {}));
    SPILLWAY_CHECK(options.store->put(fmt::format("vfio/{}/state", options.name), {&state, 1}, {}));
  }
  auto e = std::make_unique<VfioUserExport>(std::move(options), std::move(backing), vfio, std::move(kept.listener),
                                            std::move(*map));
  e->start(std::move(kept.connection));
  return e;
}

}  // namespace spillway
