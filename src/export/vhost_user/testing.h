// For tests: a vhost-user front-end with a virtio-blk driver of its own, split and packed, that can also lie.
// It shares the wire structs with the server (protocol.h) and nothing else. Blocking; one thread.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "src/base/fd.h"
#include "src/base/result.h"
#include "src/export/vhost_user/protocol.h"
#include "src/virtio/blk.h"
#include "src/virtio/ring_format.h"
#include "src/virtio/virtqueue.h"

namespace spillway::vhost::testing {

// One piece of a request, by offset in the client's memory.
struct Piece {
  uint64_t at;
  uint32_t len;
  bool write;  // the device writes it
};

// The driver's half of a ring.
class DriverRing {
 public:
  // `base` points at three areas at fixed distances; `guest` is the guest address of memory's start.
  void init(std::byte* memory, uint64_t guest, uint64_t at, uint16_t size, bool packed, bool event_idx) {
    memory_ = memory, guest_ = guest, size_ = size, packed_ = packed, event_idx_ = event_idx;
    desc_at = at, driver_at = at + 16 * size, device_at = align_up(driver_at + 8 + 2 * size, 64);
    next_avail_ = last_used_ = 0;
    avail_wrap_ = used_wrap_ = true;
    free_.clear();
    for (uint16_t i = 0; i < size; ++i) free_.push_back(i);
    slots_.assign(size, 0);
    chains_.assign(size, {});
    std::memset(memory_ + at, 0, 64 + 16 * size + 8 + 2 * size + 64 + 8 * size + 8);
  }
  uint64_t desc_at = 0, driver_at = 0, device_at = 0;
  static uint64_t bytes(uint16_t size) { return 4096 + 32u * size; }

  // Makes a chain available; its id. True in *kick: the device wants a kick.
  uint16_t add(const std::vector<Piece>& pieces, bool* kick, uint64_t indirect_at = 0) {
    const uint16_t id = packed_ ? add_packed(pieces, indirect_at) : add_split(pieces, indirect_at);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    *kick = wants_kick();
    return id;
  }
  // The next used element.
  std::optional<std::pair<uint16_t, uint32_t>> take() {
    return packed_ ? take_packed() : take_split();
  }
  // Interrupts on, then look again.
  bool arm() {
    if (packed_) {
      store16(driver_at + 2, 0);
    } else if (event_idx_) {
      store16(driver_at + 4 + 2u * size_, last_used_);
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (packed_) {
      const uint16_t f = load16(desc_at + 16u * last_used_ + 14);
      return is_used(f);
    }
    return load16(device_at + 2) != last_used_;
  }

  uint16_t load16(uint64_t at) const {
    return __atomic_load_n(reinterpret_cast<const uint16_t*>(memory_ + at), __ATOMIC_ACQUIRE);
  }
  void store16(uint64_t at, uint16_t v) {
    __atomic_store_n(reinterpret_cast<uint16_t*>(memory_ + at), v, __ATOMIC_RELEASE);
  }
  void put_desc(uint64_t at, uint64_t addr, uint32_t len, uint16_t a, uint16_t b) {
    std::memcpy(memory_ + at, &addr, 8);
    std::memcpy(memory_ + at + 8, &len, 4);
    std::memcpy(memory_ + at + 12, &a, 2);
    store16(at + 14, b);
  }
  // Makes `head` available as it is (split).
  void offer(uint16_t head) {
    store16(driver_at + 4 + 2u * (next_avail_ % size_), head);
    store16(driver_at + 2, ++next_avail_);
  }
  uint16_t size() const { return size_; }
  size_t free_slots() const { return free_.size(); }

 private:
  static uint64_t align_up(uint64_t v, uint64_t to) { return (v + to - 1) / to * to; }
  bool is_used(uint16_t f) const {
    return ((f & virtio::kDescUsed) != 0) == used_wrap_ && ((f & virtio::kDescAvail) != 0) == used_wrap_;
  }
  bool wants_kick() const {
    if (packed_) return load16(device_at + 2) != virtio::kEventDisable;
    if (event_idx_) {
      const uint16_t event = load16(device_at + 4 + 8u * size_);
      return static_cast<uint16_t>(next_avail_ - event - 1) < 1;
    }
    return (load16(device_at) & virtio::kUsedNoNotify) == 0;
  }
  uint16_t add_split(const std::vector<Piece>& pieces, uint64_t indirect_at) {
    const uint16_t head = free_.front();
    std::vector<uint16_t> ids;
    if (indirect_at != 0) {
      ids = {head};
      free_.pop_front();
      for (size_t i = 0; i < pieces.size(); ++i) {
        const bool last = i + 1 == pieces.size();
        put_split(indirect_at + 16 * i, pieces[i], last, static_cast<uint16_t>(i + 1));
      }
      const auto flags = virtio::kDescIndirect;
      uint64_t addr = guest_ + indirect_at;
      auto len = static_cast<uint32_t>(16 * pieces.size());
      put_desc(desc_at + 16u * head, addr, len, flags, 0);
    } else {
      for (size_t i = 0; i < pieces.size(); ++i) {
        ids.push_back(free_.front());
        free_.pop_front();
      }
      for (size_t i = 0; i < pieces.size(); ++i)
        put_split(desc_at + 16u * ids[i], pieces[i], i + 1 == pieces.size(),
                  i + 1 < pieces.size() ? ids[i + 1] : uint16_t{0});
    }
    chains_[head] = ids;
    offer(head);
    return head;
  }
  void put_split(uint64_t at, const Piece& p, bool last, uint16_t next) {
    const auto flags = static_cast<uint16_t>((p.write ? virtio::kDescWrite : 0) | (last ? 0 : virtio::kDescNext));
    put_desc(at, guest_ + p.at, p.len, flags, next);
  }
  std::optional<std::pair<uint16_t, uint32_t>> take_split() {
    if (load16(device_at + 2) == last_used_) return std::nullopt;
    uint32_t elem[2];
    std::memcpy(elem, memory_ + device_at + 4 + 8u * (last_used_ % size_), 8);
    ++last_used_;
    const auto id = static_cast<uint16_t>(elem[0]);
    for (uint16_t i : chains_[id]) free_.push_back(i);
    chains_[id].clear();
    return std::pair{id, elem[1]};
  }
  uint16_t add_packed(const std::vector<Piece>& pieces, uint64_t indirect_at) {
    const uint16_t id = free_.front();
    free_.pop_front();
    const uint16_t first = next_avail_;
    uint16_t first_flags = 0;
    auto flag = [&] { return avail_wrap_ ? virtio::kDescAvail : virtio::kDescUsed; };
    const size_t n = indirect_at != 0 ? 1 : pieces.size();
    if (indirect_at != 0)
      for (size_t i = 0; i < pieces.size(); ++i)
        put_desc(indirect_at + 16 * i, guest_ + pieces[i].at, pieces[i].len, 0,
                 pieces[i].write ? virtio::kDescWrite : uint16_t{0});
    for (size_t i = 0; i < n; ++i) {
      auto flags = static_cast<uint16_t>(flag() | (i + 1 < n ? virtio::kDescNext : 0));
      uint64_t addr = guest_ + pieces[i].at;
      uint32_t len = pieces[i].len;
      if (indirect_at != 0) {
        flags |= virtio::kDescIndirect;
        addr = guest_ + indirect_at;
        len = static_cast<uint32_t>(16 * pieces.size());
      } else if (pieces[i].write) {
        flags |= virtio::kDescWrite;
      }
      const uint64_t at = desc_at + 16u * next_avail_;
      if (i == 0) {
        first_flags = flags;
        std::memcpy(memory_ + at, &addr, 8);
        std::memcpy(memory_ + at + 8, &len, 4);
        std::memcpy(memory_ + at + 12, &id, 2);
      } else {
        put_desc(at, addr, len, id, flags);
      }
      if (++next_avail_ == size_) next_avail_ = 0, avail_wrap_ = !avail_wrap_;
    }
    slots_[id] = static_cast<uint16_t>(n);
    store16(desc_at + 16u * first + 14, first_flags);
    return id;
  }
  std::optional<std::pair<uint16_t, uint32_t>> take_packed() {
    const uint64_t at = desc_at + 16u * last_used_;
    if (!is_used(load16(at + 14))) return std::nullopt;
    uint32_t len;
    uint16_t id;
    std::memcpy(&len, memory_ + at + 8, 4);
    std::memcpy(&id, memory_ + at + 12, 2);
    free_.push_back(id);
    last_used_ = static_cast<uint16_t>(last_used_ + slots_[id]);
    if (last_used_ >= size_) last_used_ = static_cast<uint16_t>(last_used_ - size_), used_wrap_ = !used_wrap_;
    return std::pair{id, len};
  }

  std::byte* memory_ = nullptr;
  uint64_t guest_ = 0;
  uint16_t size_ = 0, next_avail_ = 0, last_used_ = 0;
  bool packed_ = false, event_idx_ = false, avail_wrap_ = true, used_wrap_ = true;
  std::deque<uint16_t> free_;
  std::vector<uint16_t> slots_;
  std::vector<std::vector<uint16_t>> chains_;
};

class Client {
 public:
  static constexpr uint64_t kGuestBase = 0x100000000, kMemory = 32 << 20;
  static constexpr uint64_t kBuffers = 1 << 20;  // rings below, request buffers above

  explicit Client(uint64_t memory = kMemory) : size_(memory) {
    memfd_ = Fd(::memfd_create("client", MFD_CLOEXEC));
    SPILLWAY_ASSERT(::ftruncate(memfd_.get(), static_cast<off_t>(memory)) == 0);
    map_ = static_cast<std::byte*>(
        ::mmap(nullptr, memory, PROT_READ | PROT_WRITE, MAP_SHARED, memfd_.get(), 0));
    SPILLWAY_ASSERT(map_ != MAP_FAILED);
  }
  Client(const Client&) = delete;
  ~Client() { ::munmap(map_, size_); }

  // False when nobody listens.
  bool connect(const std::string& path) {
    socket_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un addr{};
    addr.sun_family = AF_UNIX;
    std::memcpy(addr.sun_path, path.data(), path.size());
    return ::connect(socket_.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) == 0;
  }
  void disconnect() { socket_.reset(); }

  bool send_raw(const void* data, size_t size, const std::vector<int>& fds = {}) {
    iovec v{const_cast<void*>(data), size};
    msghdr m{};
    m.msg_iov = &v;
    m.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
    if (!fds.empty()) {
      m.msg_control = control;
      m.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* c = CMSG_FIRSTHDR(&m);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
    }
    return ::sendmsg(socket_.get(), &m, MSG_NOSIGNAL) == static_cast<ssize_t>(size);
  }
  bool send(Request request, const void* payload, uint32_t size, const std::vector<int>& fds = {},
            uint32_t flags = kVersion) {
    std::string bytes(sizeof(Header) + size, '\0');
    Header h{static_cast<uint32_t>(request), flags, size};
    std::memcpy(bytes.data(), &h, sizeof h);
    if (size > 0) std::memcpy(bytes.data() + sizeof h, payload, size);
    return send_raw(bytes.data(), bytes.size(), fds);
  }
  // Payload of the next reply; empty optional when the server closed. Waits up to 20 s.
  std::optional<std::string> reply(Fd* fd = nullptr) {
    pollfd p{socket_.get(), POLLIN, 0};
    if (::poll(&p, 1, 20'000) != 1) return std::nullopt;
    Header h;
    char control[CMSG_SPACE(sizeof(int))];
    iovec v{&h, sizeof h};
    msghdr m{};
    m.msg_iov = &v;
    m.msg_iovlen = 1;
    m.msg_control = control;
    m.msg_controllen = sizeof control;
    if (::recvmsg(socket_.get(), &m, MSG_WAITALL | MSG_CMSG_CLOEXEC) != sizeof h) return std::nullopt;
    if (cmsghdr* c = CMSG_FIRSTHDR(&m); c != nullptr && fd != nullptr) {
      int n;
      std::memcpy(&n, CMSG_DATA(c), sizeof n);
      fd->reset(n);
    }
    std::string payload(h.size, '\0');
    if (h.size > 0 && ::recv(socket_.get(), payload.data(), h.size, MSG_WAITALL) != static_cast<ssize_t>(h.size))
      return std::nullopt;
    return payload;
  }
  template <class T>
  T get(Request request) {
    T v{};
    if (!send(request, nullptr, 0)) return v;
    auto r = reply();
    if (r && r->size() == sizeof v) std::memcpy(&v, r->data(), sizeof v);
    return v;
  }
  // With NEED_REPLY: the acknowledgement, or -1 when the connection ended.
  template <class T>
  int64_t set(Request request, const T& v, const std::vector<int>& fds = {}) {
    if (!send(request, &v, sizeof v, fds, kVersion | kFlagNeedReply)) return -1;
    auto r = reply();
    if (!r || r->size() != 8) return -1;
    uint64_t ack;
    std::memcpy(&ack, r->data(), 8);
    return static_cast<int64_t>(ack);
  }

  struct Setup {
    uint64_t features = ~uint64_t{0};  // masked by what is offered
    uint16_t queues = 1;
    uint16_t size = 64;
    bool inflight = true;
  };
  // The usual handshake up to enabled rings. False when anything is refused.
  bool start(const Setup& setup) {
    if (!shake_hands(setup)) return false;
    rings.clear();
    rings.resize(setup.queues);
    for (uint32_t i = 0; i < setup.queues; ++i)
      if (!start_ring(i, setup.size, true)) return false;
    return true;
  }
  // Up to the memory table: what a front-end with rings that exist does on a new connection.
  bool shake_hands(const Setup& setup) {
    const auto offered = get<uint64_t>(Request::kGetFeatures);
    features = offered & setup.features;
    const auto protocol = get<uint64_t>(Request::kGetProtocolFeatures);
    if (!send(Request::kSetProtocolFeatures, &protocol, 8)) return false;
    if (!send(Request::kSetOwner, nullptr, 0)) return false;
    if (set(Request::kSetFeatures, features) != 0) return false;
    if (setup.inflight && !share_inflight(setup)) return false;
    SingleMemRegion region{0, {kGuestBase, size_, reinterpret_cast<uint64_t>(map_), 0}};
    return set(Request::kAddMemReg, region, {memfd_.get()}) == 0;
  }
  // `fresh`: a new ring; else the ring as it is, after a reconnect.
  bool start_ring(uint32_t i, uint16_t n, bool fresh, uint32_t base = 0) {
    R& r = rings[i];
    const bool packed = (features & virtio::kFeaturePacked) != 0;
    if (fresh) {
      r.ring.init(map_, kGuestBase, i * 64 * 1024, n, packed, (features & virtio::kFeatureEventIdx) != 0);
      r.kick = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      r.call = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      if (packed) base = 0x80008000;
    }
    const auto user = reinterpret_cast<uint64_t>(map_);
    if (set(Request::kSetVringNum, VringState{i, n}) != 0) return false;
    if (set(Request::kSetVringBase, VringState{i, base}) != 0) return false;
    VringAddr addr{i, 0, user + r.ring.desc_at, user + r.ring.device_at, user + r.ring.driver_at, 0};
    if (set(Request::kSetVringAddr, addr) != 0) return false;
    if (set(Request::kSetVringCall, uint64_t{i}, {r.call.get()}) != 0) return false;
    if (set(Request::kSetVringKick, uint64_t{i}, {r.kick.get()}) != 0) return false;
    return set(Request::kSetVringEnable, VringState{i, 1}) == 0;
  }
  bool share_inflight(const Setup& setup) {
    if (!inflight_fd) {
      Inflight want{0, 0, setup.queues, setup.size};
      if (!send(Request::kGetInflightFd, &want, 20)) return false;
      auto r = reply(&inflight_fd);
      if (!r || r->size() != 20 || !inflight_fd) return false;
      std::memcpy(&inflight, r->data(), 20);
    }
    struct __attribute__((packed)) Wire { uint64_t a, b; uint16_t c, d; } w{inflight.mmap_size, inflight.mmap_offset,
                                                                         inflight.queues, inflight.queue_size};
    return set(Request::kSetInflightFd, w, {inflight_fd.get()}) == 0;
  }

  struct R {
    DriverRing ring;
    Fd kick, call;
  };
  void kick(uint32_t q) {
    const uint64_t one = 1;
    [[maybe_unused]] ssize_t n = ::write(rings[q].kick.get(), &one, 8);
  }
  // A request: header and status live in slot `slot` (0..511), data at `data_at`. Returns its id.
  uint16_t submit(uint32_t q, uint32_t slot, uint32_t type, uint64_t sector, uint64_t data_at, uint32_t length,
                  bool indirect = false) {
    const uint64_t head = kBuffers + slot * 256;
    struct { uint32_t type, reserved; uint64_t sector; } h{type, 0, sector};
    std::memcpy(map_ + head, &h, 16);
    map_[head + 16] = std::byte{0xee};
    std::vector<Piece> pieces{{head, 16, false}};
    if (length > 0) pieces.push_back({data_at, length, type == 0 || type == 8});
    pieces.push_back({head + 16, 1, true});
    bool wanted = false;
    const uint16_t id = rings[q].ring.add(pieces, &wanted, indirect ? head + 64 : 0);
    if (wanted) kick(q);
    return id;
  }
  uint8_t status(uint32_t slot) const {
    return *reinterpret_cast<const volatile uint8_t*>(map_ + kBuffers + slot * 256 + 16);
  }
  // Waits for one completion on a ring (interrupt-driven). Empty after `ms`.
  std::optional<std::pair<uint16_t, uint32_t>> wait(uint32_t q, int ms = 20'000) {
    R& r = rings[q];
    for (;;) {
      if (auto u = r.ring.take()) return u;
      if (r.ring.arm()) continue;
      pollfd p{r.call.get(), POLLIN, 0};
      if (::poll(&p, 1, ms) != 1) return r.ring.take();
      uint64_t count;
      [[maybe_unused]] ssize_t n = ::read(r.call.get(), &count, 8);
    }
  }
  // One request from start to end; its status, or -1.
  int request(uint32_t q, uint32_t type, uint64_t sector, uint64_t data_at, uint32_t length, bool indirect = false) {
    submit(q, 0, type, sector, data_at, length, indirect);
    return wait(q) ? status(0) : -1;
  }
  // True when the server closes the connection within 20 s.
  bool closed() {
    pollfd p{socket_.get(), POLLIN | POLLRDHUP, 0};
    for (;;) {
      if (::poll(&p, 1, 20'000) != 1) return false;
      char c[256];
      const ssize_t n = ::recv(socket_.get(), c, sizeof c, MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno != EAGAIN)) return true;
    }
  }
  std::byte* memory() { return map_; }
  uint64_t data(uint32_t slot, uint32_t length) const { return kBuffers + 512 * 256 + uint64_t{slot} * length; }

  uint64_t features = 0;
  std::vector<R> rings;
  Inflight inflight{};
  Fd inflight_fd;
  Fd memfd_;
  Fd socket_;

 private:
  uint64_t size_;
  std::byte* map_;
};

}  // namespace spillway::vhost::testing
