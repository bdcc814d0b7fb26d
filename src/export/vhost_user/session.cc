#include "src/export/vhost_user/session.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "src/base/log.h"
#include "src/export/vhost_user/vhost_user.h"

namespace spillway::vhost {

using virtio::GuestRegion;
using virtio::RingAreas;

namespace {

Status not_offered(const char* what) {
  return fail(ErrorKind::kUnsupported, fmt::format("{} was not offered", what));
}
Status short_payload() { return fail(ErrorKind::kInvalid, "payload too short for its request"); }

}  // namespace

Session::Session(Context& context, Fd connection)
    : context_(context), connection_(std::move(connection)), rings_(context.queues.size()) {
  wce_ = context.options.trusted_flush ? 1 : 0;
  apply_cache_mode();
}

Session::~Session() = default;

uint64_t Session::offered_features() const {
  const auto& o = context_.options;
  return virtio::BlkDevice::of(*o.volume, o.read_only, o.trusted_flush, o.queues).features |
         virtio::kFeatureIndirect | virtio::kFeatureEventIdx | virtio::kFeatureVersion1 |
         virtio::kFeaturePacked | kFeatureProtocol;
}

// Without a flush the guest cannot ask for durability, so each write has to be durable.
void Session::apply_cache_mode() {
  const bool flush = (features_ & virtio::kBlkFeatureFlush) != 0;
  const bool has_wce = (features_ & virtio::kBlkFeatureConfigWce) != 0;
  context_.device.write_through.store(
      !context_.options.trusted_flush || !flush || (has_wce && wce_ == 0), std::memory_order_relaxed);
}

// ---- the socket ---------------------------------------------------------------------------------------------------

Task<int32_t> Session::readable() {
  IoAwait op = context_.control->poll(connection_.get(), POLLIN);
  waiting_ = &op;
  const int32_t r = co_await op;
  waiting_ = nullptr;
  co_return r;
}

void Session::cancel(Error why) {
  if (!canceled_) why_ = std::move(why);
  canceled_ = true;
  if (waiting_ != nullptr) context_.control->cancel(*waiting_);
}

Task<Status> Session::serve() {
  auto in = std::make_unique<Incoming>();
  for (;;) {
    if (canceled_) co_return fail(why_);
    if (torn()) co_return fail(ErrorKind::kInvalid, "the peer cut its memory short");
    *in = Incoming{};
    Result<bool> got = co_await receive(*in);
    if (!got) co_return fail(std::move(got).error());
    if (canceled_) co_return fail(why_);
    if (!*got) co_return Status{};
    co_await context_.changing.lock();
    Status s = co_await handle(*in);
    context_.changing.unlock();
    if (!s) {
      Error e = std::move(s).error();
      co_return fail(std::move(e).with_context(fmt::format("request {}", in->head.request)));
    }
  }
}

namespace {

// Descriptors that came with a message; false: there were more than there is room for.
bool collect_fds(msghdr& m, std::vector<Fd>& out) {
  for (cmsghdr* c = CMSG_FIRSTHDR(&m); c != nullptr; c = CMSG_NXTHDR(&m, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int one;
      std::memcpy(&one, CMSG_DATA(c) + i * sizeof one, sizeof one);
      out.emplace_back(one);
    }
  }
  return (m.msg_flags & MSG_CTRUNC) == 0 && out.size() <= kMaxMessageFds;
}

}  // namespace

// One look at the socket. Bytes that came (0: the peer closed), or -errno. A whole message is only peeked; one that lies
// there in pieces is taken out as it comes (then `consumed`).
int32_t Session::look(Incoming& in) {
  constexpr size_t kHead = sizeof(Header);
  const int fd = connection_.get();
  if (in.have == 0) {
    const ssize_t n = ::recv(fd, &in.head, kHead, MSG_PEEK | MSG_DONTWAIT);
    if (n <= 0) return n == 0 ? 0 : -errno;
    in.consumed = static_cast<size_t>(n) < kHead;
  }
  const bool head_known = !in.consumed || in.have >= kHead;
  if (head_known && in.head.size > kMaxPayload) return -EMSGSIZE;
  const size_t want = head_known ? kHead + in.head.size : kHead;
  const size_t payload_have = in.have > kHead ? in.have - kHead : 0;
  iovec v[2];
  size_t pieces = 0;
  if (in.have < kHead)
    v[pieces++] = {reinterpret_cast<std::byte*>(&in.head) + in.have, kHead - in.have};
  if (want > kHead) v[pieces++] = {in.payload.data() + payload_have, want - kHead - payload_have};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxMessageFds)];
  for (;;) {
    msghdr m{};
    m.msg_iov = v;
    m.msg_iovlen = pieces;
    m.msg_control = control;
    m.msg_controllen = sizeof control;
    const int flags = MSG_DONTWAIT | MSG_CMSG_CLOEXEC | (in.consumed ? 0 : MSG_PEEK);
    const ssize_t n = ::recvmsg(fd, &m, flags);
    if (n < 0) return -errno;
    if (n == 0) return in.have == 0 ? 0 : -EPIPE;
    std::vector<Fd> fds;
    const bool fits = collect_fds(m, fds);
    if (!in.consumed && static_cast<size_t>(n) < want) {
      in.consumed = true;  // again, and take it out this time (the descriptors of the peek are closed)
      continue;
    }
    for (auto& f : fds) in.fds.push_back(std::move(f));
    if (!fits || in.fds.size() > kMaxMessageFds) return -ETOOMANYREFS;
    in.have += static_cast<size_t>(n);
    return static_cast<int32_t>(n);
  }
}

Task<Result<bool>> Session::receive(Incoming& in) {
  while (in.have < sizeof(Header) || in.have < sizeof(Header) + in.head.size) {
    const int32_t n = look(in);
    if (n > 0) continue;
    if (n == 0 || n == -ECONNRESET) co_return false;
    if (n == -EMSGSIZE)
      co_return fail(ErrorKind::kInvalid,
                     fmt::format("request {}: payload of {} bytes", in.head.request, in.head.size));
    if (n == -ETOOMANYREFS) co_return fail(ErrorKind::kInvalid, "too many descriptors in one message");
    if (n == -EPIPE) co_return fail(ErrorKind::kInvalid, "the peer closed in the middle of a message");
    if (n != -EAGAIN && n != -EINTR) co_return fail_errno(-n, "receive");
    const int32_t r = co_await readable();
    if (canceled_) co_return true;
    if (r < 0 && r != -EINTR) co_return fail_errno(-r, "poll of the connection");
  }
  co_return true;
}

Task<Status> Session::consume(Incoming& in) {
  size_t left = in.consumed ? 0 : in.have;
  while (left > 0) {
    iovec v{in.payload.data(), std::min(left, in.payload.size())};  // no longer needed
    msghdr m{};
    m.msg_iov = &v;
    m.msg_iovlen = 1;
    IoAwait op = context_.control->recvmsg(connection_.get(), &m, 0);
    const int32_t n = co_await op;
    if (n <= 0) co_return fail(ErrorKind::kIo, "the peer closed in the middle of a message");
    left -= static_cast<size_t>(n);
  }
  co_return Status{};
}

Task<Status> Session::send_reply(const Incoming& in, const Reply& reply, uint64_t ack) {
  const auto* ack_bytes = reinterpret_cast<const std::byte*>(&ack);
  const size_t size = reply.has ? reply.payload.size() : sizeof ack;
  Header h{in.head.request, kVersion | kFlagReply, static_cast<uint32_t>(size)};
  iovec v[2] = {{&h, sizeof h},
                {const_cast<std::byte*>(reply.has ? reply.payload.data() : ack_bytes), size}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr m{};
  m.msg_iov = v;
  m.msg_iovlen = 2;
  if (reply.fd >= 0) {
    m.msg_control = control;
    m.msg_controllen = sizeof control;
    cmsghdr* c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &reply.fd, sizeof(int));
  }
  IoAwait op = context_.control->sendmsg(connection_.get(), &m, MSG_NOSIGNAL);
  const int32_t n = co_await op;
  if (n < 0) co_return fail_errno(-n, "reply");
  if (static_cast<size_t>(n) != sizeof h + size) co_return fail(ErrorKind::kIo, "reply cut short");
  co_return Status{};
}

// Both operations enter the kernel with one system call, the reply first: a kill leaves neither or both behind.
Task<Status> Session::answer_and_consume(Incoming& in, const Reply& reply, bool ack, uint64_t value) {
  std::vector<Task<Status>> parts;
  if (ack || reply.has) parts.push_back(send_reply(in, reply, value));
  parts.push_back(consume(in));
  co_return co_await all_of(std::move(parts));
}

Task<Status> Session::handle(Incoming& in) {
  if ((in.head.flags & kVersionMask) != kVersion || (in.head.flags & kFlagReply) != 0)
    co_return fail(ErrorKind::kInvalid, fmt::format("flags {:#x}", in.head.flags));
  const bool ack = (in.head.flags & kFlagNeedReply) != 0 && (protocol_ & kProtocolReplyAck) != 0;
  log(LogLevel::kDebug, "vhost-user", "{}: request {}, {} bytes, {} descriptors{}", context_.options.name, in.head.request,
      in.head.size, in.fds.size(), ack ? ", to be acknowledged" : "");
  Reply reply;
  Dirty dirty;
  Status s = co_await dispatch(in, reply, dirty);
  if (s) {
    Status stored = co_await store(dirty);
    if (!stored)
      LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: this connection will not survive a restart: {}",
                  context_.options.name, stored.error().message());
  }
  for (uint32_t i = 0; i < rings_.size(); ++i)  // only now: until it is stored, the log holds the position
    if ((dirty.retire >> i & 1) != 0) context_.queues[i]->log().retire();
  if (s && dirty.run) {
    uint32_t started = 0;
    s = co_await run_rings(dirty.strict, &started);
  }
  if (!s) {
    const bool refused = s.error().kind() == ErrorKind::kUnsupported;
    if (ack) {
      Reply none;
      Status sent = co_await answer_and_consume(in, none, true, 1);
      if (refused && sent) {
        LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: request {} refused: {}", context_.options.name,
                    in.head.request, s.error().message());
        co_return Status{};
      }
    }
    co_return s;
  }
  co_return co_await answer_and_consume(in, reply, ack, 0);
}

// ---- messages -----------------------------------------------------------------------------------------------------

Task<Status> Session::dispatch(Incoming& in, Reply& reply, Dirty& dirty) {
  const auto* value = in.as<uint64_t>();
  switch (static_cast<Request>(in.head.request)) {
    case Request::kGetFeatures: reply.set(offered_features()); co_return Status{};
    case Request::kSetFeatures: co_return co_await set_features(in, dirty);
    case Request::kGetProtocolFeatures: reply.set(uint64_t{kProtocolOffered}); co_return Status{};
    case Request::kSetProtocolFeatures:
      if (value == nullptr) co_return short_payload();
      if ((*value & ~kProtocolOffered) != 0) co_return not_offered("a protocol feature");
      protocol_ = *value;
      dirty.connection = true;
      co_return Status{};
    case Request::kSetOwner: co_return Status{};
    case Request::kResetOwner:
    case Request::kResetDevice:
      co_await reset_device(dirty);
      co_return Status{};
    case Request::kGetQueueNum: reply.set(uint64_t{rings_.size()}); co_return Status{};
    case Request::kSetMemTable: co_return co_await set_mem_table(in, dirty);
    case Request::kGetMaxMemSlots: reply.set(uint64_t{kMaxMemSlots}); co_return Status{};
    case Request::kAddMemReg: co_return co_await add_region(in, dirty);
    case Request::kRemMemReg: co_return co_await remove_region(in, dirty);
    case Request::kSetVringNum:
    case Request::kSetVringBase:
    case Request::kSetVringAddr:
    case Request::kSetVringEnable: co_return co_await set_vring(in, dirty);
    case Request::kGetVringBase: co_return co_await get_vring_base(in, reply, dirty);
    case Request::kSetVringKick:
    case Request::kSetVringCall:
    case Request::kSetVringErr: co_return co_await set_vring_fd(in, dirty);
    case Request::kGetConfig: co_return get_config(in, reply);
    case Request::kSetConfig: co_return co_await set_config(in, dirty);
    case Request::kSetBackendReqFd:
      if (in.fds.size() != 1) co_return fail(ErrorKind::kInvalid, "needs one descriptor");
      backend_ = std::move(in.fds[0]);
      dirty.backend = true;
      co_return Status{};
    case Request::kGetInflightFd: co_return get_inflight(in, reply, dirty);
    case Request::kSetInflightFd: co_return co_await set_inflight(in, dirty);
    case Request::kSetStatus:
      if (value == nullptr) co_return short_payload();
      if (*value > 0xff) co_return fail(ErrorKind::kInvalid, fmt::format("device status {:#x}", *value));
      if (*value == 0) co_await reset_device(dirty);
      status_ = static_cast<uint8_t>(*value);
      dirty.connection = true;
      co_return Status{};
    case Request::kGetStatus: reply.set(uint64_t{status_}); co_return Status{};
    case Request::kSetLogBase:
    case Request::kSetLogFd: co_return not_offered("dirty logging");
    case Request::kPostcopyAdvise:
    case Request::kPostcopyListen:
    case Request::kPostcopyEnd: co_return not_offered("postcopy");
    case Request::kSetDeviceStateFd:
    case Request::kCheckDeviceState: co_return not_offered("device state");
    case Request::kIotlbMsg: co_return not_offered("an IOMMU");
    case Request::kVringKick: co_return not_offered("in-band notification");
    case Request::kSetVringEndian: co_return not_offered("cross-endian");
    default: co_return fail(ErrorKind::kUnsupported, "unknown request");
  }
}

Task<Status> Session::set_features(Incoming& in, Dirty& dirty) {
  const auto* value = in.as<uint64_t>();
  if (value == nullptr) co_return short_payload();
  if ((*value & kFeatureLogAll) != 0) co_return not_offered("dirty logging");
  if ((*value & ~offered_features()) != 0)
    co_return not_offered(fmt::format("feature {:#x}", *value & ~offered_features()).c_str());
  if (*value != features_) {
    co_await stop_rings();
    if (((*value ^ features_) & virtio::kFeaturePacked) != 0)
      for (uint32_t i = 0; i < rings_.size(); ++i) {
        if (rings_[i].started) dirty.retire |= 1u << i;
        rings_[i].started = false;
        dirty.rings |= 1u << i;
      }
    features_ = *value;
    apply_cache_mode();
  }
  dirty.connection = dirty.run = true;
  co_return Status{};
}

Task<void> Session::reset_device(Dirty& dirty) {
  co_await stop_rings();
  for (uint32_t i = 0; i < rings_.size(); ++i) {
    end_ring(i, dirty);
    rings_[i].enabled = false;
  }
  status_ = 0;
  // The cache mode stays as the driver set it. QEMU resets the device for a stop of the machine too, keeps its own copy of the
  // field and does not set it again: a guest that believes in write-through would never flush. A new driver reads the field.
  dirty.connection = true;
}

static Status check_region(const MemRegion& r) {
  if (r.size == 0 || r.guest + r.size < r.guest || r.user + r.size < r.user || r.offset + r.size < r.size)
    return fail(ErrorKind::kInvalid, fmt::format("memory region at {:#x}, {:#x} bytes", r.guest, r.size));
  return {};
}

Task<Status> Session::set_mem_table(Incoming& in, Dirty& dirty) {
  const auto* table = in.as<uint64_t>() != nullptr ? reinterpret_cast<const MemTable*>(in.payload.data()) : nullptr;
  if (table == nullptr || table->count > kTableRegions ||
      in.head.size < 8 + table->count * sizeof(MemRegion))
    co_return short_payload();
  if (in.fds.size() != table->count)
    co_return fail(ErrorKind::kInvalid, fmt::format("{} memory regions, {} descriptors", table->count, in.fds.size()));
  std::vector<Slot> slots;
  for (uint32_t i = 0; i < table->count; ++i) {
    const MemRegion& r = table->regions[i];
    SPILLWAY_CO_CHECK(check_region(r));
    SPILLWAY_CO_TRY(auto map, Mapping::create(in.fds[i].get(), r.offset, r.size));
    slots.push_back({r, std::move(in.fds[i]), std::move(map)});
  }
  co_await stop_rings();
  slots_.swap(slots);
  SPILLWAY_CO_CHECK(rebuild_memory());
  dirty.memory = dirty.run = true;
  co_return Status{};
}

Task<Status> Session::add_region(Incoming& in, Dirty& dirty) {
  const auto* m = in.as<SingleMemRegion>();
  if (m == nullptr) co_return short_payload();
  if (in.fds.size() != 1) co_return fail(ErrorKind::kInvalid, "a memory region needs one descriptor");
  const MemRegion& r = m->region;
  SPILLWAY_CO_CHECK(check_region(r));
  // The same message again after a restart in the middle of it.
  const bool again = std::any_of(slots_.begin(), slots_.end(), [&](const Slot& s) {
    return std::memcmp(&s.wire, &r, sizeof r) == 0;
  });
  if (again) {
    dirty.run = true;
    co_return Status{};
  }
  if (slots_.size() >= kMaxMemSlots) co_return fail(ErrorKind::kInvalid, "no memory slot left");
  SPILLWAY_CO_TRY(auto map, Mapping::create(in.fds[0].get(), r.offset, r.size));
  co_await stop_rings();
  slots_.push_back({r, std::move(in.fds[0]), std::move(map)});
  SPILLWAY_CO_CHECK(rebuild_memory());
  dirty.memory = dirty.run = true;
  co_return Status{};
}

// A descriptor that comes along (libblkio sends one) is closed with the message.
Task<Status> Session::remove_region(Incoming& in, Dirty& dirty) {
  const auto* m = in.as<SingleMemRegion>();
  if (m == nullptr) co_return short_payload();
  const MemRegion& r = m->region;
  auto it = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& s) {
    return s.wire.guest == r.guest && s.wire.size == r.size && s.wire.user == r.user;
  });
  if (it != slots_.end()) {  // else: the same message again
    co_await stop_rings();
    slots_.erase(it);
    SPILLWAY_CO_CHECK(rebuild_memory());
  }
  dirty.memory = dirty.run = true;
  co_return Status{};
}

Status Session::rebuild_memory() {
  std::vector<GuestRegion> regions;
  for (const Slot& s : slots_)
    regions.push_back({s.wire.guest, s.wire.size, s.wire.user, s.map.data(), s.map.blocking()});
  SPILLWAY_TRY(memory_, virtio::GuestMemory::create(std::move(regions)));
  return {};
}

bool Session::torn() const {
  return inflight_map_.torn() ||
         std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.map.torn(); });
}

Task<Status> Session::set_vring(Incoming& in, Dirty& dirty) {
  const auto* state = in.as<VringState>();
  if (state == nullptr) co_return short_payload();
  const uint32_t i = state->index;
  if (i >= rings_.size()) co_return fail(ErrorKind::kInvalid, fmt::format("ring {} of {}", i, rings_.size()));
  Ring& r = rings_[i];
  Queue& q = *context_.queues[i];
  switch (static_cast<Request>(in.head.request)) {
    case Request::kSetVringNum:
      if (state->num == 0 || state->num > kVhostMaxQueueSize || (state->num & (state->num - 1)) != 0)
        co_return fail(ErrorKind::kInvalid, fmt::format("ring {}: {} entries", i, state->num));
      co_await q.stop();
      r.num = state->num;
      break;
    case Request::kSetVringBase:
      co_await q.stop();
      if (r.started) dirty.retire |= 1u << i;
      r.started = false;
      r.base = state->num;
      break;
    case Request::kSetVringAddr: {
      const auto* addr = in.as<VringAddr>();
      if (addr == nullptr) co_return short_payload();
      if ((addr->flags & 1) != 0) co_return not_offered("dirty logging");
      co_await q.stop();
      r.addr = *addr;
      r.have_addr = true;
      break;
    }
    default:
      if (state->num > 1) co_return fail(ErrorKind::kInvalid, fmt::format("ring {}: enable {}", i, state->num));
      r.enabled = state->num != 0;
      if (!r.enabled) co_await q.stop();
      break;
  }
  dirty.rings |= 1u << i;
  dirty.run = dirty.strict = true;
  co_return Status{};
}

// Reading and signalling an eventfd never waits for anybody's program; any other kind of descriptor might.
static bool is_eventfd(int fd) {
  char target[32] = {};
  const ssize_t n = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), target, sizeof target);
  return n > 0 && std::string_view(target, static_cast<size_t>(n)) == "anon_inode:[eventfd]";
}

Task<Status> Session::set_vring_fd(Incoming& in, Dirty& dirty) {
  const auto* value = in.as<uint64_t>();
  if (value == nullptr) co_return short_payload();
  const uint64_t i = *value & 0xff;
  const bool none = (*value & kVringNoFd) != 0;
  if (i >= rings_.size()) co_return fail(ErrorKind::kInvalid, fmt::format("ring {} of {}", i, rings_.size()));
  if (in.fds.size() != (none ? 0u : 1u)) co_return fail(ErrorKind::kInvalid, "number of descriptors");
  Ring& r = rings_[i];
  Queue& q = *context_.queues[i];
  Fd fd = none ? Fd() : std::move(in.fds[0]);
  if (fd && !is_eventfd(fd.get())) co_return fail(ErrorKind::kInvalid, fmt::format("ring {}: not an eventfd", i));
  dirty.rings |= 1u << i;
  switch (static_cast<Request>(in.head.request)) {
    case Request::kSetVringKick:
      if (none) co_return not_offered("a ring without a kick descriptor");
      co_await q.stop();
      r.kick = std::move(fd);
      dirty.run = dirty.strict = true;
      break;
    case Request::kSetVringCall:
      r.call = std::move(fd);
      co_await q.set_call(r.call ? r.call.dup().release() : -1);
      break;
    default: r.err = std::move(fd); break;
  }
  co_return Status{};
}

Task<Status> Session::get_vring_base(Incoming& in, Reply& reply, Dirty& dirty) {
  const auto* state = in.as<VringState>();
  if (state == nullptr) co_return short_payload();
  const uint32_t i = state->index;
  if (i >= rings_.size()) co_return fail(ErrorKind::kInvalid, fmt::format("ring {} of {}", i, rings_.size()));
  co_await context_.queues[i]->stop();
  end_ring(i, dirty);
  reply.set(VringState{i, rings_[i].base});
  co_return Status{};
}

// The ring stands still and its log has done its work. Its position stays known: QEMU 7.2 stops a machine with a reset (SET_STATUS 0)
// and asks for the position after that.
void Session::end_ring(uint32_t i, Dirty& dirty) {
  Ring& r = rings_[i];
  const Queue& q = *context_.queues[i];
  if (r.started) {
    r.base = q.next_avail();
    if (packed()) r.base |= static_cast<uint32_t>(q.next_used()) << 16;
    dirty.retire |= 1u << i;
    r.started = false;
  }
  r.kick.reset();
  dirty.rings |= 1u << i;
}

Status Session::get_config(Incoming& in, Reply& reply) {
  const auto* head = in.as<ConfigHead>();
  if (head == nullptr) return short_payload();
  if (head->size > kMaxPayload - sizeof(ConfigHead))
    return fail(ErrorKind::kInvalid, fmt::format("config of {} bytes", head->size));
  const auto& o = context_.options;
  virtio::BlkConfig config = virtio::BlkDevice::of(*o.volume, o.read_only, o.trusted_flush, o.queues).config;
  config.writeback = wce_;
  const auto* from = reinterpret_cast<const std::byte*>(&config);
  reply.has = true;
  reply.payload.assign(sizeof(ConfigHead) + head->size, std::byte{0});
  std::memcpy(reply.payload.data(), head, sizeof *head);
  if (head->offset < sizeof config)
    std::memcpy(reply.payload.data() + sizeof *head, from + head->offset,
                std::min<size_t>(head->size, sizeof config - head->offset));
  return {};
}

Task<Status> Session::set_config(Incoming& in, Dirty& dirty) {
  const auto* head = in.as<ConfigHead>();
  if (head == nullptr || in.head.size < sizeof *head + head->size) co_return short_payload();
  const ConfigHead h = *head;
  if (h.size != 1 || h.offset != virtio::kBlkConfigWceOffset)
    co_return fail(ErrorKind::kUnsupported, fmt::format("config field at {} of {} bytes", h.offset, h.size));
  if (!context_.options.trusted_flush) co_return not_offered("a write cache");
  const auto on = static_cast<uint8_t>(in.payload[sizeof h]);
  if (on > 1) co_return fail(ErrorKind::kInvalid, fmt::format("write cache {}", on));
  wce_ = on;
  apply_cache_mode();
  keep_cache_mode();
  if (on == 0 && !context_.options.read_only) {  // what was cached until now becomes stable as well
    Status s = co_await context_.options.volume->flush({context_.options.group, IoClass::kForeground, false});
    if (!s) co_return s;
  }
  dirty.connection = true;
  co_return Status{};
}

// ---- in-flight log --------------------------------------------------------------------------------------------------

namespace {

// Behind the rings' logs, in the last bytes: the cache mode. When holder and worker are both gone QEMU brings the log back, but
// not what the guest had set.
struct InflightTail {
  static constexpr uint64_t kMagic = 0x6c6c697073777763;
  uint64_t magic;
  uint8_t wce;
  uint8_t padding[55];
};
static_assert(sizeof(InflightTail) == 64);

}  // namespace

void Session::keep_cache_mode() {
  if (!inflight_map_ || inflight_map_.size() < sizeof(InflightTail)) return;
  std::byte* at = inflight_map_.data() + inflight_map_.size() - sizeof(InflightTail);
  uint64_t magic = 0;
  std::memcpy(&magic, at, sizeof magic);
  if (magic == InflightTail::kMagic) std::memcpy(at + offsetof(InflightTail, wce), &wce_, 1);
}

void Session::recall_cache_mode() {
  if (!inflight_map_ || inflight_map_.size() < sizeof(InflightTail)) return;
  InflightTail tail;
  std::memcpy(&tail, inflight_map_.data() + inflight_map_.size() - sizeof tail, sizeof tail);
  if (tail.magic != InflightTail::kMagic || tail.wce != 0) return;
  wce_ = 0;
  apply_cache_mode();
}

Status Session::make_inflight(uint16_t queues, uint16_t queue_size) {
  const uint64_t size = queues * InflightLog::region_size(queue_size, packed()) + sizeof(InflightTail);
  Fd fd(::memfd_create("spillway-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0)
    return fail_errno(errno, "in-flight log");
  SPILLWAY_TRY(inflight_map_, Mapping::create(fd.get(), 0, size));
  inflight_fd_ = std::move(fd);
  inflight_ = {size, 0, queues, queue_size};
  const InflightTail tail{InflightTail::kMagic, wce_, {}};
  std::memcpy(inflight_map_.data() + size - sizeof tail, &tail, sizeof tail);
  return {};
}

std::byte* Session::inflight_region(uint32_t ring, uint32_t num) {
  if (!inflight_map_ || ring >= inflight_.queues || num > inflight_.queue_size) return nullptr;
  return inflight_map_.data() + ring * InflightLog::region_size(inflight_.queue_size, packed());
}

Status Session::get_inflight(Incoming& in, Reply& reply, Dirty& dirty) {
  const auto* want = in.as<uint64_t[2]>() != nullptr && in.head.size >= 20
                         ? reinterpret_cast<const Inflight*>(in.payload.data())
                         : nullptr;
  if (want == nullptr) return short_payload();
  if (want->queues == 0 || want->queues > rings_.size() || want->queue_size == 0 ||
      want->queue_size > kVhostMaxQueueSize)
    return fail(ErrorKind::kInvalid,
                fmt::format("in-flight log for {} rings of {}", want->queues, want->queue_size));
  const bool fits = inflight_map_ && inflight_.queues == want->queues && inflight_.queue_size == want->queue_size;
  const bool in_use = std::any_of(rings_.begin(), rings_.end(), [](const Ring& r) { return r.started; });
  if (in_use && !fits) return fail(ErrorKind::kInvalid, "in-flight log asked for while rings run");
  if (!in_use) SPILLWAY_CHECK(make_inflight(want->queues, want->queue_size));
  reply.set(inflight_);
  // QEMU counts the structure's tail padding (24 bytes) and insists on its own size; others send the bare 20.
  reply.payload.resize(std::min<size_t>(in.head.size, sizeof(Inflight)));
  reply.fd = inflight_fd_.get();
  dirty.inflight = true;
  return {};
}

Task<Status> Session::set_inflight(Incoming& in, Dirty& dirty) {
  if (in.head.size < 20) co_return short_payload();
  Inflight want{};
  std::memcpy(&want, in.payload.data(), 20);
  if (in.fds.size() != 1) co_return fail(ErrorKind::kInvalid, "needs one descriptor");
  if (want.queues == 0 || want.queues > rings_.size() || want.queue_size == 0 ||
      want.queue_size > kVhostMaxQueueSize || want.mmap_offset % 8 != 0 ||
      want.mmap_size < want.queues * InflightLog::region_size(want.queue_size, packed()))
    co_return fail(ErrorKind::kInvalid, fmt::format("in-flight log of {} bytes for {} rings of {}", want.mmap_size,
                                                    want.queues, want.queue_size));
  SPILLWAY_CO_TRY(auto map, Mapping::create(in.fds[0].get(), want.mmap_offset, want.mmap_size));
  if (map.blocking()) co_return fail(ErrorKind::kInvalid, "in-flight log is not in memory");
  co_await stop_rings();
  inflight_map_ = std::move(map);
  inflight_fd_ = std::move(in.fds[0]);
  inflight_ = want;
  recall_cache_mode();
  dirty.connection = dirty.inflight = dirty.run = true;
  co_return Status{};
}

// ---- rings ------------------------------------------------------------------------------------------------------

Task<void> Session::stop_rings() {
  for (auto& q : context_.queues) co_await q->stop();
}

Task<Status> Session::spread() {
  for (uint32_t i = 0; i < rings_.size(); ++i) {
    Status s = co_await context_.queues[i]->move(context_.owner(i));
    if (!s) co_return s;
  }
  co_return Status{};
}

bool Session::wants_to_run(const Ring& r) const {
  const bool enabled = r.enabled || (features_ & kFeatureProtocol) == 0;
  return r.kick && r.have_addr && r.num != 0 && enabled && !slots_.empty();
}

// `started`: rings that began to run with this call. Strict: an error when one cannot.
Task<Status> Session::run_rings(bool strict, uint32_t* started) {
  for (uint32_t i = 0; i < rings_.size(); ++i) {
    Ring& r = rings_[i];
    if (context_.queues[i]->running() || !wants_to_run(r)) continue;
    Status s = co_await start_ring(i, r.started);
    if (s) *started |= 1u << i;
    else if (strict || s.error().kind() != ErrorKind::kOutOfRange) co_return s;
  }
  co_return Status{};
}

Task<Status> Session::start_ring(uint32_t i, bool adopted) {
  Ring& r = rings_[i];
  const RingAreas sizes = RingAreas::of(r.num, packed());
  Queue::Start start;
  virtio::RingConfig& ring = start.ring;
  ring.size = static_cast<uint16_t>(r.num);
  ring.packed = packed();
  ring.event_idx = (features_ & virtio::kFeatureEventIdx) != 0;
  ring.indirect = (features_ & virtio::kFeatureIndirect) != 0;
  ring.desc = memory_.translate_user(r.addr.desc, sizes.desc, RingAreas::kDescAlign);
  ring.driver = memory_.translate_user(r.addr.avail, sizes.driver, RingAreas::driver_align(packed()));
  ring.device = memory_.translate_user(r.addr.used, sizes.device, RingAreas::kDeviceAlign);
  if (ring.desc == nullptr || ring.driver == nullptr || ring.device == nullptr)
    co_return fail(ErrorKind::kOutOfRange, fmt::format("ring {}: an address outside of memory, or misaligned", i));
  ring.next_avail = static_cast<uint16_t>(r.base);
  if (packed()) {
    ring.next_used = static_cast<uint16_t>(r.base >> 16);
    if ((ring.next_avail & 0x7fff) >= r.num || (ring.next_used & 0x7fff) >= r.num)
      co_return fail(ErrorKind::kInvalid, fmt::format("ring {}: base {:#x}", i, r.base));
  } else {
    using u16 = uint16_t __attribute__((may_alias));
    ring.next_used = __atomic_load_n(reinterpret_cast<const u16*>(ring.device + 2), __ATOMIC_ACQUIRE);
  }
  bool new_log = false;
  if (inflight_region(i, r.num) == nullptr) {
    // The front-end keeps none (or a smaller one): our own, for what a restart of the worker needs.
    const bool others = std::any_of(rings_.begin(), rings_.end(), [](const Ring& o) { return o.started; });
    if (others && inflight_map_)
      co_return fail(ErrorKind::kInvalid, fmt::format("ring {}: not covered by the in-flight log", i));
    SPILLWAY_CO_CHECK(make_inflight(static_cast<uint16_t>(rings_.size()), kVhostMaxQueueSize));
    new_log = true;
  }
  Dirty dirty;
  dirty.inflight = new_log;
  if (!r.started) {
    r.started = true;
    dirty.rings = 1u << i;
  }
  Status stored = co_await store(dirty);
  if (!stored)
    LOG_LIMITED(LogLevel::kWarn, "vhost-user", "{}: ring {} will not survive a restart: {}",
                context_.options.name, i, stored.error().message());
  InflightLog::Recovered recovered;
  start.log = InflightLog::recover(inflight_region(i, r.num), r.num, ring, adopted, &recovered);
  ring.next_avail = recovered.next_avail;
  ring.next_used = recovered.next_used;
  start.left = std::move(recovered.left);
  start.memory = &memory_;
  start.kick = r.kick.dup().release();
  start.call = r.call ? r.call.dup().release() : -1;
  start.call_first = adopted;
  Queue& q = *context_.queues[i];
  log(LogLevel::kDebug, "vhost-user", "{}: ring {} starts at {:#x}, used {:#x}{}", context_.options.name, i, ring.next_avail,
      ring.next_used, adopted ? " (goes on)" : "");
  if (!start.left.empty())
    log(LogLevel::kInfo, "vhost-user", "{}: ring {}: {} requests in flight are taken up again",
        context_.options.name, i, start.left.size());
  co_return co_await q.start(context_.owner(i), std::move(start));
}

void Session::config_changed() {
  if (!backend_) return;
  Header h{kBackendConfigChange, kVersion, 0};
  if (::send(backend_.get(), &h, sizeof h, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof h)
    log(LogLevel::kWarn, "vhost-user", "{}: the front-end could not be told of a size change",
        context_.options.name);
}

// ---- what a successor finds ---------------------------------------------------------------------------------------

namespace {

struct StoredConnection {
  uint32_t version = 1;
  uint32_t queues = 0;
  uint64_t features = 0;
  uint64_t protocol = 0;
  uint8_t status = 0;
  uint8_t wce = 1;
  uint8_t padding[6] = {};
};
struct StoredRing {
  uint32_t num = 0;
  uint32_t base = 0;
  VringAddr addr{};
  uint8_t have_addr = 0, enabled = 0, started = 0, fds = 0;  // fds: bits kick, call, err
  uint8_t padding[4] = {};
};

template <class T>
std::string_view bytes_of(const T& v) {
  return {reinterpret_cast<const char*>(&v), sizeof v};
}
template <class T>
bool from_bytes(const std::string& s, T& v) {
  if (s.size() != sizeof v) return false;
  std::memcpy(&v, s.data(), sizeof v);
  return true;
}

}  // namespace

Status Session::store_connection() {
  FdStore* store = context_.options.store;
  if (store == nullptr) return {};
  StoredConnection c;
  c.queues = static_cast<uint32_t>(rings_.size());
  c.features = features_;
  c.protocol = protocol_;
  c.status = status_;
  c.wce = wce_;
  const int fd = connection_.get();
  return store->put(context_.prefix() + "conn", {&fd, 1}, bytes_of(c));
}

Status Session::store_ring(uint32_t i) {
  const Ring& r = rings_[i];
  StoredRing s;
  s.num = r.num;
  s.base = r.base;
  s.addr = r.addr;
  s.have_addr = r.have_addr;
  s.enabled = r.enabled;
  s.started = r.started;
  std::vector<int> fds;
  for (const Fd* fd : {&r.kick, &r.call, &r.err}) {
    if (!*fd) continue;
    s.fds = static_cast<uint8_t>(s.fds | 1 << (fd == &r.kick ? 0 : fd == &r.call ? 1 : 2));
    fds.push_back(fd->get());
  }
  return context_.options.store->put(fmt::format("{}ring{}", context_.prefix(), i), fds, bytes_of(s));
}

Status Session::store_memory() {
  std::string blob;
  std::vector<int> fds;
  for (const Slot& s : slots_) {
    blob += bytes_of(s.wire);
    fds.push_back(s.fd.get());
  }
  return context_.options.store->put(context_.prefix() + "memory", fds, blob);
}

Status Session::store_inflight() {
  const int fd = inflight_fd_.get();
  return context_.options.store->put(context_.prefix() + "inflight", {&fd, inflight_fd_ ? 1u : 0u},
                                     bytes_of(inflight_));
}

Status Session::store_backend() {
  const int fd = backend_.get();
  return context_.options.store->put(context_.prefix() + "backend", {&fd, backend_ ? 1u : 0u}, {});
}

Task<Status> Session::store(const Dirty& dirty) {
  if (context_.options.store == nullptr) co_return Status{};
  if (!dirty.connection && !dirty.memory && !dirty.inflight && !dirty.backend && dirty.rings == 0)
    co_return Status{};
  auto all = [this, &dirty]() -> Status {
    if (dirty.memory) SPILLWAY_CHECK(store_memory());
    if (dirty.inflight) SPILLWAY_CHECK(store_inflight());
    if (dirty.backend) SPILLWAY_CHECK(store_backend());
    for (uint32_t i = 0; i < rings_.size(); ++i)
      if ((dirty.rings >> i & 1) != 0) SPILLWAY_CHECK(store_ring(i));
    if (dirty.connection) SPILLWAY_CHECK(store_connection());
    return {};
  };
  // A round trip to the holder: not on the reactor if there is somebody else.
  if (context_.options.blocking == nullptr) co_return all();
  auto job = context_.options.blocking->run(all);
  Status s = co_await job;
  co_return s;
}

Task<Status> Session::adopt() {
  FdStore& store = *context_.options.store;
  const std::string prefix = context_.prefix();
  SPILLWAY_CO_TRY(auto conn, store.get(prefix + "conn"));
  StoredConnection c;
  if (!from_bytes(conn.blob, c) || c.version != 1 || c.queues != rings_.size())
    co_return fail(ErrorKind::kCorrupt, "stored connection does not fit this export");
  features_ = c.features;
  protocol_ = c.protocol;
  status_ = c.status;
  wce_ = c.wce;
  apply_cache_mode();
  if (auto memory = store.get(prefix + "memory")) {
    if (memory->blob.size() != memory->fds.size() * sizeof(MemRegion))
      co_return fail(ErrorKind::kCorrupt, "stored memory table");
    for (size_t i = 0; i < memory->fds.size(); ++i) {
      MemRegion wire;
      std::memcpy(&wire, memory->blob.data() + i * sizeof wire, sizeof wire);
      SPILLWAY_CO_TRY(auto map, Mapping::create(memory->fds[i].get(), wire.offset, wire.size));
      slots_.push_back({wire, std::move(memory->fds[i]), std::move(map)});
    }
    SPILLWAY_CO_CHECK(rebuild_memory());
  }
  if (auto log = store.get(prefix + "inflight"); log && !log->fds.empty()) {
    if (!from_bytes(log->blob, inflight_)) co_return fail(ErrorKind::kCorrupt, "stored in-flight log");
    inflight_fd_ = std::move(log->fds[0]);
    SPILLWAY_CO_TRY(inflight_map_,
                    Mapping::create(inflight_fd_.get(), inflight_.mmap_offset, inflight_.mmap_size));
  }
  if (auto backend = store.get(prefix + "backend"); backend && !backend->fds.empty())
    backend_ = std::move(backend->fds[0]);
  for (uint32_t i = 0; i < rings_.size(); ++i) {
    auto entry = store.get(fmt::format("{}ring{}", prefix, i));
    if (!entry) continue;
    StoredRing s;
    if (!from_bytes(entry->blob, s)) co_return fail(ErrorKind::kCorrupt, "stored ring");
    Ring& r = rings_[i];
    r.num = s.num;
    r.base = s.base;
    r.addr = s.addr;
    r.have_addr = s.have_addr != 0;
    r.enabled = s.enabled != 0;
    r.started = s.started != 0;
    size_t next = 0;
    for (unsigned bit = 0; bit < 3; ++bit) {
      if ((s.fds >> bit & 1) == 0) continue;
      if (next >= entry->fds.size()) co_return fail(ErrorKind::kCorrupt, "stored ring: descriptors");
      (bit == 0 ? r.kick : bit == 1 ? r.call : r.err) = std::move(entry->fds[next++]);
    }
  }
  uint32_t started = 0;
  co_return co_await run_rings(false, &started);
}

std::string Session::to_text() const {
  std::string text = fmt::format("features: {:#x}\nprotocol-features: {:#x}\nwrite-cache: {}\nmemory-regions: {}\n",
                                 features_, protocol_, wce_, slots_.size());
  for (uint32_t i = 0; i < rings_.size(); ++i)
    text += fmt::format("queue {}: {} entries, {}, {} bytes\n", i, rings_[i].num,
                        context_.queues[i]->running() ? "running" : "stopped", context_.queues[i]->memory_bytes());
  return text;
}

}  // namespace spillway::vhost
