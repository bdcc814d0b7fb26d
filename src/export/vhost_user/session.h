// Session: one connected front-end. Handles its messages on the control reactor, starts and stops the rings, and keeps
// the store up to date.
//
// A message is peeked, handled, its effect put in the store, then answered and consumed in one step: a successor that
// finds it still in the socket handles it again, and every message can be handled twice. Rings start only after their state is
// stored, and stand still while what they depend on changes.
//
// Thread-confined to the control reactor, except `fail_later` and `config_changed`.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "src/export/vhost_user/inflight.h"
#include "src/export/vhost_user/mapping.h"
#include "src/export/vhost_user/protocol.h"
#include "src/export/vhost_user/queue.h"

namespace spillway::vhost {

// What the export owns and every session uses.
struct Context {
  ExportOptions options;
  Device device;
  std::vector<std::unique_ptr<Queue>> queues;
  Reactor* control = nullptr;
  uint32_t spread = 0;    // reactors that serve queues; control reactor
  AsyncMutex changing;    // held while a message is handled, queues are handed over or a session ends
  // The owner of queue `i`: stable, and other exports begin elsewhere.
  Reactor& owner(uint32_t i) const {
    const size_t first = std::hash<std::string>{}(options.name) % spread;
    return options.reactors->at((first + i) % spread);
  }
  std::string prefix() const { return "vhost/" + options.name + "/"; }
};

class Session {
 public:
  Session(Context& context, Fd connection);
  ~Session();

  // Takes over what a predecessor stored. kCorrupt / errors of mapping: the connection cannot go on.
  Task<Status> adopt();
  // Until the peer closes (success), breaks a rule or `cancel` (error with the one reason). The rings stand still then.
  Task<Status> serve();
  // Hands the running queues over to their owners as `Context::owner` says now. With `Context::changing` held.
  Task<Status> spread();
  // Ends serve() soon.
  void cancel(Error why);
  // The volume grew: tells the guest if there is a backend channel.
  void config_changed();
  // Stops the rings: all that was taken is answered. Their logs stay as they are, for a successor or for a front-end that brings
  // its log to a new connection: a packed ring has its position there and nowhere else.
  Task<void> stop_rings();
  Status store_connection();
  std::string to_text() const;

 private:
  struct Slot {
    MemRegion wire{};
    Fd fd;
    Mapping map;
  };
  struct Ring {
    uint32_t num = 0;
    VringAddr addr{};
    bool have_addr = false;
    bool enabled = false;
    bool started = false;  // its log holds its position
    uint32_t base = 0;
    Fd kick, call, err;
  };
  struct Incoming {
    Header head{};
    alignas(8) std::array<std::byte, kMaxPayload> payload;
    std::vector<Fd> fds;
    size_t have = 0;      // bytes of head and payload
    bool consumed = false;
    template <class T>
    const T* as() const {
      return head.size >= sizeof(T) ? reinterpret_cast<const T*>(payload.data()) : nullptr;
    }
  };
  struct Reply {
    bool has = false;
    std::vector<std::byte> payload;
    int fd = -1;
    template <class T>
    void set(const T& v) {
      has = true;
      const auto* p = reinterpret_cast<const std::byte*>(&v);
      payload.assign(p, p + sizeof v);
    }
  };
  // What must be stored after a message.
  struct Dirty {
    bool connection = false, memory = false, inflight = false, backend = false;
    uint32_t rings = 0;
    uint32_t retire = 0;     // rings whose log ends
    bool run = false;        // rings may have to start
    bool strict = false;     // a ring that should run and cannot is the peer's mistake
  };

  Task<Result<bool>> receive(Incoming& in);  // false: the peer closed
  Task<Status> handle(Incoming& in);
  Task<Status> dispatch(Incoming& in, Reply& reply, Dirty& dirty);
  Task<Status> send_reply(const Incoming& in, const Reply& reply, uint64_t ack);
  Task<Status> answer_and_consume(Incoming& in, const Reply& reply, bool ack, uint64_t value);
  Task<Status> consume(Incoming& in);
  Task<int32_t> readable();
  int32_t look(Incoming& in);

  Task<Status> set_mem_table(Incoming& in, Dirty& dirty);
  Task<Status> add_region(Incoming& in, Dirty& dirty);
  Task<Status> remove_region(Incoming& in, Dirty& dirty);
  Task<Status> set_vring(Incoming& in, Dirty& dirty);
  Task<Status> set_vring_fd(Incoming& in, Dirty& dirty);
  Task<Status> get_vring_base(Incoming& in, Reply& reply, Dirty& dirty);
  Status get_config(Incoming& in, Reply& reply);
  Task<Status> set_config(Incoming& in, Dirty& dirty);
  Status get_inflight(Incoming& in, Reply& reply, Dirty& dirty);
  Task<Status> set_inflight(Incoming& in, Dirty& dirty);
  Task<Status> set_features(Incoming& in, Dirty& dirty);
  Task<void> reset_device(Dirty& dirty);
  void end_ring(uint32_t i, Dirty& dirty);

  Task<Status> run_rings(bool strict, uint32_t* started);
  Task<Status> start_ring(uint32_t i, bool adopted);
  bool wants_to_run(const Ring& r) const;
  Status rebuild_memory();
  Status make_inflight(uint16_t queues, uint16_t queue_size);
  std::byte* inflight_region(uint32_t ring, uint32_t num);
  void keep_cache_mode();
  void recall_cache_mode();
  uint64_t offered_features() const;
  bool packed() const { return (features_ & virtio::kFeaturePacked) != 0; }
  void apply_cache_mode();
  bool torn() const;

  Status store_ring(uint32_t i);
  Status store_memory();
  Status store_inflight();
  Status store_backend();
  Task<Status> store(const Dirty& dirty);

  Context& context_;
  Fd connection_;
  Fd backend_;
  uint64_t features_ = 0;
  uint64_t protocol_ = 0;
  uint8_t status_ = 0;
  uint8_t wce_ = 1;
  std::vector<Slot> slots_;
  virtio::GuestMemory memory_;
  std::vector<Ring> rings_;
  Inflight inflight_{};
  Fd inflight_fd_;
  Mapping inflight_map_;
  IoOp* waiting_ = nullptr;
  bool canceled_ = false;
  Error why_{ErrorKind::kCanceled};
};

}  // namespace spillway::vhost
