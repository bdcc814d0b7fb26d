// A vfio-user client without a VMM: what a client may send, and what it must not be able to do.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <random>
#include <vector>

#include "src/export/vfio_user/protocol.h"
#include "src/export/vfio_user/state.h"
#include "src/export/vfio_user/vfio_user.h"
#include "src/io/reactor.h"

namespace spillway {
namespace {

using namespace vfio;

class TestBacking final : public PmemBacking {
 public:
  explicit TestBacking(uint64_t size) : size_(size), fd_(::memfd_create("backing", MFD_CLOEXEC)) {
    EXPECT_EQ(::ftruncate(fd_.get(), static_cast<off_t>(size)), 0);
  }
  const std::string& name() const override { return name_; }
  uint64_t size() const override { return size_; }
  bool read_only() const override { return false; }
  int fd() const override { return fd_.get(); }
  Status sync() override {
    ++syncs;
    return fail_sync ? fail(ErrorKind::kIo, "told to") : Status{};
  }
  std::chrono::nanoseconds stalled() const override { return {}; }
  void add_mapper(pid_t) override {}
  void remove_mapper(pid_t) override {}
  std::atomic<uint64_t> syncs{0};
  std::atomic<bool> fail_sync{false};

 private:
  std::string name_ = "test";
  uint64_t size_;
  Fd fd_;
};

Fd guest_memory(uint64_t size) {
  Fd fd(::memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(size)), 0);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  return fd;
}

template <class T>
std::string bytes(const T& v) {
  return {reinterpret_cast<const char*>(&v), sizeof v};
}

struct Reply {
  Header h{};
  std::string body;
  std::vector<Fd> fds;
};

class VfioUser : public ::testing::Test {
 protected:
  static constexpr uint64_t kSize = 6 * kMiB;  // no power of two: a sparse BAR
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / ("spillway-vfio-" + std::to_string(::getpid()));
    std::filesystem::create_directories(dir_);
    main_ = std::move(*UringReactor::create(64));
    pool_ = std::move(*ReactorPool::start({-1}));
    start();
  }
  void TearDown() override {
    stop(false);
    pool_.reset();
    std::filesystem::remove_all(dir_);
  }
  void start() {
    ExportOptions o;
    o.name = "t";
    o.socket = dir_ / "s";
    o.reactors = pool_.get();
    o.store = &store_;
    auto e = start_vfio_user_pmem(o, backing_);
    ASSERT_TRUE(e) << e.error().message();
    export_ = std::move(*e);
  }
  void stop(bool keep) {
    if (export_) main_->block_on(export_->stop(keep));
    export_.reset();
  }
  void connect() {
    client_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    std::strncpy(a.sun_path, (dir_ / "s").c_str(), sizeof a.sun_path - 1);
    ASSERT_EQ(::connect(client_.get(), reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
    ask(Command::kVersion, bytes(Version{0, 0}) + "{}" + '\0');
    ASSERT_EQ(reply().h.error, 0u);
  }
  static std::string message(Command c, const std::string& body, uint16_t id, uint32_t flags = 0) {
    Header h{id, static_cast<uint16_t>(c), static_cast<uint32_t>(sizeof(Header) + body.size()), flags, 0};
    return bytes(h) + body;
  }
  void send(const std::string& m, const std::vector<int>& fds = {}) {
    iovec iov{const_cast<char*>(m.data()), m.size()};
    msghdr h{};
    h.msg_iov = &iov;
    h.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 64)] = {};
    if (!fds.empty()) {
      h.msg_control = control;
      h.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* c = CMSG_FIRSTHDR(&h);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
    }
    ASSERT_EQ(::sendmsg(client_.get(), &h, MSG_NOSIGNAL), static_cast<ssize_t>(m.size()));
  }
  void ask(Command c, const std::string& body, const std::vector<int>& fds = {}) { send(message(c, body, ++id_), fds); }
  // A header without anything: the server has closed the connection.
  Reply reply() {
    Reply r;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 8)];
    iovec iov{&r.h, sizeof r.h};
    msghdr m{};
    m.msg_iov = &iov;
    m.msg_iovlen = 1;
    m.msg_control = control;
    m.msg_controllen = sizeof control;
    if (::recvmsg(client_.get(), &m, MSG_WAITALL | MSG_CMSG_CLOEXEC) != sizeof r.h) return {};
    for (cmsghdr* c = CMSG_FIRSTHDR(&m); c != nullptr; c = CMSG_NXTHDR(&m, c)) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c), sizeof fd);
      r.fds.emplace_back(fd);
    }
    r.body.resize(r.h.size - sizeof r.h);
    if (!r.body.empty())
      EXPECT_EQ(::recv(client_.get(), r.body.data(), r.body.size(), MSG_WAITALL), static_cast<ssize_t>(r.body.size()));
    return r;
  }
  static DmaMap map_of(uint64_t address, uint64_t size, uint64_t offset = 0) {
    return {sizeof(DmaMap), 3, offset, address, size};
  }
  // The text is published before the next message is waited for: ask something, and what came before is in it.
  std::string text() {
    for (int i = 0; i < 2; ++i) {
      ask(Command::kGetInfo, bytes(DeviceInfo{sizeof(DeviceInfo), 0, 0, 0}));
      EXPECT_EQ(reply().h.error, 0u);
    }
    return export_->to_text();
  }
  std::filesystem::path dir_;
  MemoryFdStore store_;
  std::unique_ptr<UringReactor> main_;
  std::unique_ptr<ReactorPool> pool_;
  std::shared_ptr<TestBacking> backing_ = std::make_shared<TestBacking>(kSize);
  std::unique_ptr<Export> export_;
  Fd client_;
  uint16_t id_ = 0;
};

// Linux hands a peek of a message without descriptors those of the next one. QEMU sends its DMA_MAPs in bursts: an unmap was
// refused for "its" descriptor, and the guest's memory stayed as it had been mapped first.
TEST_F(VfioUser, Descriptors_of_the_next_message_are_not_taken_for_those_of_this_one) {
  connect();
  const Fd ram = guest_memory(4 * kMiB);
  ask(Command::kDmaMap, bytes(map_of(0, 4 * kMiB)), {ram.get()});
  ASSERT_EQ(reply().h.error, 0u);
  // One burst, while the server has not begun: read-only memory without a descriptor before memory with one.
  for (int round = 0; round < 50; ++round) {
    std::vector<Command> asked;
    auto burst = [&](Command c, const std::string& body, const std::vector<int>& fds = {}) {
      ask(c, body, fds);
      asked.push_back(c);
    };
    burst(Command::kDmaUnmap, bytes(DmaUnmap{sizeof(DmaUnmap), 0, 0, 4 * kMiB}));
    burst(Command::kDmaMap, bytes(map_of(0, kMiB)));
    burst(Command::kDmaMap, bytes(map_of(kMiB, kMiB, kMiB)), {ram.get()});
    burst(Command::kDmaMap, bytes(map_of(2 * kMiB, kMiB)));
    burst(Command::kDmaMap, bytes(map_of(3 * kMiB, kMiB, 3 * kMiB)), {ram.get()});
    for (size_t i = 0; i < asked.size(); ++i) EXPECT_EQ(reply().h.error, 0u) << "round " << round << " message " << i;
    ASSERT_NE(text().find("dma regions 4 (2 not touched)"), std::string::npos) << text();
    for (uint64_t at = 0; at < 4; ++at) {
      ask(Command::kDmaUnmap, bytes(DmaUnmap{sizeof(DmaUnmap), 0, at * kMiB, kMiB}));
      ASSERT_EQ(reply().h.error, 0u);
    }
    ask(Command::kDmaMap, bytes(map_of(0, 4 * kMiB)), {ram.get()});
    ASSERT_EQ(reply().h.error, 0u);
  }
}

TEST_F(VfioUser, Successor_handles_what_its_predecessor_had_taken_out_of_the_socket) {
  connect();
  const Fd ram = guest_memory(4 * kMiB);
  stop(true);
  // As after a kill between receiving and handling.
  auto state = store_.get("vfio/t/state");
  ASSERT_TRUE(state);
  auto* s = static_cast<DeviceState*>(
      ::mmap(nullptr, sizeof(DeviceState), PROT_READ | PROT_WRITE, MAP_SHARED, state->fds[0].get(), 0));
  const std::string m = message(Command::kDmaMap, bytes(map_of(0, 4 * kMiB)), 77);
  const int raw = ram.get();
  ASSERT_TRUE(store_.put("vfio/t/taking", {&raw, 1}, m));
  s->taking_id = 77;
  s->taking = kTaken;
  start();
  const Reply r = reply();
  EXPECT_EQ(r.h.id, 77);
  EXPECT_EQ(r.h.error, 0u);
  EXPECT_NE(text().find("dma regions 1 (0 not touched)"), std::string::npos);
  EXPECT_EQ(s->taking, 0u);
  // And before receiving: the message is still there, and is handled once.
  stop(true);
  const std::string again = message(Command::kDmaMap, bytes(map_of(8 * kMiB, 4 * kMiB)), 78);
  send(again, {ram.get()});
  ASSERT_TRUE(store_.put("vfio/t/taking", {&raw, 1}, again));
  s->taking_id = 78;
  s->taking = kTaking;
  start();
  EXPECT_EQ(reply().h.id, 78);
  EXPECT_NE(text().find("dma regions 2 (0 not touched)"), std::string::npos);
  ::munmap(s, sizeof *s);
}

TEST_F(VfioUser, Bar_is_the_file_and_only_its_part_is_mapped) {
  connect();
  RegionInfo info{sizeof(RegionInfo), 0, 2, 0, 0, 0};
  ask(Command::kGetRegionInfo, bytes(info));
  Reply r = reply();
  EXPECT_TRUE(r.fds.empty());  // it asks again, with room for the capability
  std::memcpy(&info, r.body.data(), sizeof info);
  EXPECT_EQ(info.size, 8 * kMiB);
  EXPECT_EQ(info.argsz, sizeof(RegionInfo) + sizeof(SparseMmap));
  ask(Command::kGetRegionInfo, bytes(info) + bytes(SparseMmap{}));
  r = reply();
  ASSERT_EQ(r.fds.size(), 1u);
  SparseMmap sparse{};
  std::memcpy(&sparse, r.body.data() + sizeof info, sizeof sparse);
  EXPECT_EQ(sparse.size, kSize);
}

TEST_F(VfioUser, Wrong_sizes_are_refused_and_the_connection_goes_on) {
  connect();
  const Fd ram = guest_memory(kMiB);
  const auto refused = [&](Command c, const std::string& body, const std::vector<int>& fds = {}) {
    ask(c, body, fds);
    const Reply r = reply();
    EXPECT_EQ(r.h.id, id_);
    EXPECT_NE(r.h.error, 0u) << static_cast<int>(c);
  };
  refused(Command::kDmaMap, bytes(DmaMap{8, 3, 0, 0, kMiB}));                      // argsz
  refused(Command::kDmaMap, bytes(map_of(0, 0)));                                  // empty
  refused(Command::kDmaMap, bytes(map_of(UINT64_MAX - 4095, 8192)));               // wraps around
  refused(Command::kDmaMap, bytes(map_of(100, 4096)));                             // no page
  refused(Command::kDmaMap, bytes(map_of(0, 4096)), {ram.get(), ram.get()});       // two descriptors
  refused(Command::kDmaMap, "short");
  refused(Command::kDmaUnmap, bytes(DmaUnmap{sizeof(DmaUnmap), 1, 0, 4096}));      // dirty pages are not tracked
  refused(Command::kRegionRead, bytes(RegionAccess{250, kRegionConfig, 8}));       // across the end
  refused(Command::kRegionRead, bytes(RegionAccess{UINT64_MAX, 0, 4}));
  refused(Command::kRegionRead, bytes(RegionAccess{0, 9, 4}));                     // no such region
  refused(Command::kRegionRead, bytes(RegionAccess{0, 0, 1 << 20}));
  refused(Command::kRegionWrite, bytes(RegionAccess{0, 0, 4}) + "12");             // less data than it says
  refused(Command::kSetIrqs, bytes(IrqSet{sizeof(IrqSet), kSetDataEventfd | kSetTrigger, kIrqMsix, 0, 3}),
          {ram.get(), ram.get(), ram.get()});                                      // more vectors than there are
  refused(Command::kGetRegionInfo, bytes(RegionInfo{sizeof(RegionInfo), 0, 77, 0, 0, 0}));
  refused(static_cast<Command>(99), "");
  // The memory behind a region must be there: a file that is shorter would be a SIGBUS. Accepted, never touched.
  ask(Command::kDmaMap, bytes(map_of(0, 2 * kMiB)), {ram.get()});
  EXPECT_EQ(reply().h.error, 0u);
  EXPECT_NE(text().find("dma regions 1 (1 not touched)"), std::string::npos);
}

TEST_F(VfioUser, Client_that_breaks_the_framing_is_dropped_and_another_one_served) {
  for (int way = 0; way < 4; ++way) {
    connect();
    Header h{1, static_cast<uint16_t>(Command::kGetInfo), 32, 0, 0};
    if (way == 0) h.size = 4;              // smaller than a header
    if (way == 1) h.size = kMaxMessage + 1;
    if (way == 2) h.flags = kFlagReply;    // we asked for nothing
    std::string m = bytes(h) + std::string(16, 'x');
    if (way == 3) {
      std::vector<int> many(16, client_.get());
      send(m, many);
    } else {
      send(m);
    }
    EXPECT_EQ(reply().h.size, 0u) << way;
  }
  connect();
  EXPECT_NE(text().find("device:"), std::string::npos);
}

TEST_F(VfioUser, Random_bytes_never_end_the_server) {
  std::mt19937 random(5);
  for (int round = 0; round < 50; ++round) {
    connect();
    std::string m(64 + random() % 512, 0);
    for (char& c : m) c = static_cast<char>(random());
    if (round % 2 == 0) {  // a header that is right
      Header h{static_cast<uint16_t>(random()), static_cast<uint16_t>(2 + random() % 12), static_cast<uint32_t>(m.size()), 0, 0};
      std::memcpy(m.data(), &h, sizeof h);
    }
    send(m);
    ::shutdown(client_.get(), SHUT_WR);
    while (reply().h.size != 0) {}
  }
  connect();
  EXPECT_NE(text().find("device:"), std::string::npos);
}

}  // namespace
}  // namespace spillway
